#!/usr/bin/env python
"""Sample images from a release checkpoint: one PNG per sample with its settings in the metadata, and a grid of all."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import SETTINGS, add_image_options, check_image_options, read_prompts
from ldm.cli.run import HelpFormatter, run
from ldm.config.trust import add_trust_option
from ldm.files import claim_file
from ldm.util import UserError

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_image_options(parser)
    parser.add_argument(
        "--negative-prompt", default="", help="prompt that guidance leads away from; default: the empty prompt"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/txt2img"), help="folder for the images")
    add_trust_option(parser)
    return parser.parse_args()


def numbered(folder: Path, before: str, digits: int) -> Iterator[Path]:
    """Yield paths of PNG files with rising numbers, from the highest existing number plus 1."""
    numbers = [path.stem.removeprefix(before) for path in folder.glob(f"{before}*.png")]
    first = max((int(number) for number in numbers if number.isdigit()), default=-1) + 1
    return (folder / f"{before}{number:0{digits}d}.png" for number in itertools.count(first))


def save_numbered(save: Callable[[Path], None], names: Iterable[Path]) -> Path:
    """Save to the first of `names` that no other process has claimed, and return it; a failure leaves no file."""
    path = claim_file(names)
    try:
        save(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def main() -> None:
    options = parse_arguments()
    prompts = read_prompts(options.prompt, options.from_file)
    check_image_options(options, options.n)
    if options.negative_prompt and options.scale == 1:
        raise UserError("--negative-prompt needs guidance, which --scale 1 turns off; give a larger --scale")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: is a file; name a folder")

    import torch

    from ldm.images.grid import image_grid, save_png, to_images
    from ldm.models.diffusion.text_to_image import Request, latent_shape, text_to_image
    from ldm.modules.encoders.tokenizer import warn_of_cut
    from ldm.release.configs import release_config
    from ldm.release.load import PRECISIONS, load_release, pick_device

    chosen = options.config, options.parameterization, max(filter(None, (options.H, options.W)), default=None)
    _, config = release_config(options.ckpt, *chosen, options.trust_config)
    device, dtype = pick_device(options.device), PRECISIONS[options.precision]
    model = load_release(options.ckpt, config, device, dtype, options.vae)
    warn_of_cut(model.cond_stage_model, prompts)
    shape = latent_shape(model, options.H, options.W)
    seeds = range(options.seed, options.seed + options.n)
    requests = [Request(prompt, seed, options.negative_prompt) for prompt in prompts for seed in seeds]
    names = numbered(options.out, "", 5)
    images = []
    settings = {key: getattr(options, key) for key in SETTINGS}
    sampled = text_to_image(model, requests, shape, **settings, batch_size=options.batch_size)
    for request, image in zip(requests, sampled, strict=True):
        images.append(image)
        metadata = {**request._asdict(), **settings, "ckpt": str(options.ckpt), "precision": options.precision}
        png, about = to_images(image[None])[0], {"parameters": json.dumps(metadata)}
        path = save_numbered(partial(save_png, png, metadata=about), names)
        logger.info("%s  seed %d  %s", path, request.seed, request.prompt)
    sheet = image_grid(torch.stack(images), options.n if options.n > 1 else None)
    about = {"prompts": prompts, "negative_prompt": options.negative_prompt, **settings}
    write = partial(save_png, sheet, metadata={"parameters": json.dumps(about)})
    grid = save_numbered(write, numbered(options.out, "grid-", 4))
    logger.info("%s  grid of %d images", grid, len(images))


if __name__ == "__main__":
    run(main)
