#!/usr/bin/env python
"""Pictures from a release checkpoint: one PNG a sample, with its settings in the metadata, and a grid of all."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from whichever folder this is run

from ldm.cli import CONVENTIONAL_RELEASE, add_trust_option, run
from ldm.util import UserError

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=CONVENTIONAL_RELEASE, help="release checkpoint")
    parser.add_argument("--config", type=Path, default=Path("stable_diffusion_v1.yaml"), help="its config")
    parser.add_argument("--prompt", nargs="+", action="extend", default=[], help="one or more captions")
    parser.add_argument("--from-file", type=Path, help="a text file with one caption a line")
    parser.add_argument("--n", type=int, default=1, help="samples a prompt; their seeds count up from --seed")
    parser.add_argument("--seed", type=int, default=42, help="seed of the first sample of each prompt")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--scale", type=float, default=7.5, help="classifier-free guidance; 1 for none")
    parser.add_argument("--sampler", choices=["ddim", "plms", "dpm_solver"], default="ddim", help="sampling method")
    parser.add_argument("--eta", type=float, default=0.0, help="noise added in ddim steps; 0 is deterministic")
    parser.add_argument("--H", type=int, help="height in pixels; default: the model's own")
    parser.add_argument("--W", type=int, help="width in pixels; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=4, help="samples at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the networks")
    parser.add_argument("--out", type=Path, default=Path("outputs/txt2img"), help="folder for the pictures")
    add_trust_option(parser)
    return parser.parse_args()


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """The captions given, and those of the file, without its empty lines."""
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: is not UTF-8 text; save it as UTF-8") from error
        prompts = prompts + [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("no caption: give --prompt or --from-file")
    return prompts


def next_number(folder: Path, pattern: str) -> int:
    """One more than the highest number among the files of `folder` that match, so that none is overwritten."""
    numbers = [path.stem.split("-")[-1] for path in folder.glob(pattern)]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def main() -> None:
    options = parse_arguments()
    prompts = read_prompts(options.prompt, options.from_file)
    for name in ("n", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give 1 or more")
    if not math.isfinite(options.scale) or not 0 <= options.eta <= 1:
        raise UserError(f"--scale {options.scale} --eta {options.eta}: give a finite scale, and an eta from 0 to 1")
    if not 0 <= options.seed < 2**63 - options.n:
        raise UserError(f"--seed {options.seed}: give a number from 0 to 2^63")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: is a file; name a folder")

    import torch

    from ldm.models.diffusion.text_to_image import Request, latent_shape, text_to_image
    from ldm.pictures import image_grid, save_png, to_images
    from ldm.training.release import PRECISIONS, load_release, pick_device

    device, dtype = pick_device(options.device), PRECISIONS[options.precision]
    model = load_release(options.ckpt, options.config, device, dtype, options.trust_config)
    shape = latent_shape(model, options.H, options.W)
    requests = [Request(prompt, options.seed + index) for prompt in prompts for index in range(options.n)]
    number = next_number(options.out, "[0-9]*.png")
    pictures = []
    settings = {key: getattr(options, key) for key in ("steps", "scale", "sampler", "eta")}
    drawn = text_to_image(model, requests, shape, **settings, batch_size=options.batch_size)
    for offset, (request, picture) in enumerate(zip(requests, drawn, strict=True)):
        pictures.append(picture)
        path = options.out / f"{number + offset:05d}.png"
        metadata = {**request._asdict(), **settings, "ckpt": str(options.ckpt), "precision": options.precision}
        save_png(to_images(picture[None])[0], path, {"parameters": json.dumps(metadata)})
        logger.info("%s  seed %d  %s", path, request.seed, request.prompt)
    grid = options.out / f"grid-{next_number(options.out, 'grid-*.png'):04d}.png"
    columns = options.n if options.n > 1 else None
    save_png(
        image_grid(torch.stack(pictures), columns), grid, {"parameters": json.dumps({"prompts": prompts, **settings})}
    )
    logger.info("%s  all %d", grid, len(pictures))


if __name__ == "__main__":
    run(main)
