#!/usr/bin/env python
"""Pictures from a release checkpoint: one PNG a sample, with its settings in the metadata, and a grid of all."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from whichever folder this is run

from ldm.cli.options import SETTINGS, add_drawing_options, check_drawing_options, read_prompts
from ldm.cli.run import HelpFormatter, run
from ldm.config.trust import add_trust_option
from ldm.util import UserError

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_drawing_options(parser)
    parser.add_argument(
        "--negative-prompt", default="", help="a caption that guidance moves away from; default: the empty one"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/txt2img"), help="folder for the pictures")
    add_trust_option(parser)
    return parser.parse_args()


def next_number(folder: Path, pattern: str) -> int:
    """One more than the highest number among the files of `folder` that match, so that none is overwritten."""
    numbers = [path.stem.split("-")[-1] for path in folder.glob(pattern)]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def main() -> None:
    options = parse_arguments()
    prompts = read_prompts(options.prompt, options.from_file)
    check_drawing_options(options, options.n)
    if options.negative_prompt and options.scale == 1:
        raise UserError("--negative-prompt needs guidance, which --scale 1 turns off; give a larger --scale")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: is a file; name a folder")

    import torch

    from ldm.images.grid import image_grid, save_png, to_images
    from ldm.models.diffusion.text_to_image import Request, latent_shape, text_to_image
    from ldm.release.load import PRECISIONS, load_release, pick_device
    from ldm.release.matching import release_config

    chosen = options.config, options.parameterization, max(filter(None, (options.H, options.W)), default=None)
    _, options.config = release_config(options.ckpt, *chosen, options.trust_config)
    device, dtype = pick_device(options.device), PRECISIONS[options.precision]
    model = load_release(options.ckpt, options.config, device, dtype, options.trust_config)
    shape = latent_shape(model, options.H, options.W)
    seeds = range(options.seed, options.seed + options.n)
    requests = [Request(prompt, seed, options.negative_prompt) for prompt in prompts for seed in seeds]
    number = next_number(options.out, "[0-9]*.png")
    pictures = []
    settings = {key: getattr(options, key) for key in SETTINGS}
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
        image_grid(torch.stack(pictures), columns),
        grid,
        {"parameters": json.dumps({"prompts": prompts, "negative_prompt": options.negative_prompt, **settings})},
    )
    logger.info("%s  all %d", grid, len(pictures))


if __name__ == "__main__":
    run(main)
