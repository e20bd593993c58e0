#!/usr/bin/env python
"""Sample images from a release checkpoint: one PNG per sample, with its settings in the metadata, and a grid of all.

python tools/txt2img.py --ckpt R --prompt "a red apple"
python tools/txt2img.py --ckpt R --prompt "a red apple" --init-image sketch.png --strength 0.6
python tools/txt2img.py --ckpt R --prompt "a red apple" --image table.png --mask white-where-to-paint.png
python tools/txt2img.py --ckpt R --prompt "make it autumn" --image park.png --image-scale 1.5
python tools/txt2img.py --ckpt R --prompt "a stone statue" --depth park.npy
python tools/txt2img.py --ckpt R --prompt "a red apple" --lora style.safetensors:0.8
"""

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

from ldm.cli.input_options import add_input_options, check_input_options, read_inputs
from ldm.cli.options import (
    SETTINGS,
    add_image_options,
    add_lora_option,
    add_spacing_options,
    check_image_options,
    check_spacing_options,
    read_prompts,
)
from ldm.cli.run import HelpFormatter, run
from ldm.config.trust import add_trust_option
from ldm.files import claim_file
from ldm.util import refuse_if

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_image_options(parser)
    add_spacing_options(parser)
    add_input_options(parser)
    add_lora_option(parser)
    parser.add_argument(
        "--negative-prompt", default="", help="prompt that guidance leads away from; default: the empty prompt"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/txt2img"), help="folder for the images")
    add_trust_option(parser)
    options = parser.parse_args()
    options.prompt = read_prompts(options.prompt, options.from_file)
    check_image_options(options, options.n)
    check_spacing_options(options)
    check_input_options(options)
    is_guided = options.scale != 1 or options.image_scale not in (None, 1)
    refuse_if(
        options.negative_prompt and not is_guided,
        "--negative-prompt needs guidance, which --scale 1 turns off; give a larger --scale",
    )
    refuse_if(
        options.guidance_rescale and not is_guided,
        f"--guidance-rescale {options.guidance_rescale}: needs guidance, which --scale 1 turns off; leave it out",
    )
    refuse_if(options.out.exists() and not options.out.is_dir(), f"--out {options.out}: is a file; name a folder")
    return options


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
    files = read_inputs(options)

    import torch

    from ldm.images.grid import image_grid, save_png, to_images
    from ldm.models.diffusion.inputs import image_scale_of
    from ldm.models.diffusion.prompts import image_sizes
    from ldm.models.diffusion.samplers import sampler_class
    from ldm.models.diffusion.text_to_image import Request, image_size, latent_shape, text_to_image
    from ldm.modules.encoders.caption_length import warn_of_cut
    from ldm.modules.encoders.caption_settings import caption_settings, set_caption_settings
    from ldm.release.configs import release_config
    from ldm.release.load import load_release, pick_device, pick_precision
    from ldm.release.lora_merging import Lora
    from ldm.release.model_family import own_side

    chosen = options.config, options.parameterization, max(filter(None, (options.H, options.W)), default=None)
    config_name, config = release_config(options.ckpt, *chosen, options.trust_config)
    device = pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    model = load_release(options.ckpt, config, device, dtype, options.vae, [Lora(*lora) for lora in options.lora])
    set_caption_settings(model.cond_stage_model, options.max_tokens, options.clip_skip)
    warn_of_cut(model.cond_stage_model, [*options.prompt, options.negative_prompt])
    side = own_side(model)
    shape = latent_shape(model, *(side if size is None else size for size in (options.H, options.W)))
    height, width = image_size(model, shape)
    inputs = files.fitted(height, width)
    settings = {
        **{key: getattr(options, key) for key in SETTINGS},
        "spacing": options.spacing or sampler_class(options.sampler)(model).own_spacing,
        "guidance_rescale": options.guidance_rescale,
        "image_scale": image_scale_of(model, options.image_scale),
    }
    made_from = {"ckpt": options.ckpt, "config": config_name, "vae": options.vae, "precision": options.precision}
    about = {
        **settings,
        **{"parameterization": model.parameterization, "H": height, "W": width},
        **files.settings(),
        **image_sizes(model, inputs.sizes, height, width),
        **{key: value and str(value) for key, value in made_from.items()},
        **caption_settings(model.cond_stage_model).entries(),
        **({"lora": [f"{path}:{strength:g}" for path, strength in options.lora]} if options.lora else {}),
    }
    seeds = range(options.seed, options.seed + options.n)
    requests = [Request(prompt, seed, options.negative_prompt) for prompt in options.prompt for seed in seeds]
    sampled = text_to_image(model, requests, shape, inputs, **settings, batch_size=options.batch_size)
    names = numbered(options.out, "", 5)
    images = []
    for request, image in zip(requests, sampled, strict=True):
        images.append(image)
        metadata = {"parameters": json.dumps({**request._asdict(), **about})}
        path = save_numbered(partial(save_png, to_images(image[None])[0], metadata=metadata), names)
        logger.info("%s  seed %d  %s", path, request.seed, request.prompt)
    sheet = image_grid(torch.stack(images), options.n if options.n > 1 else None)
    metadata = {"prompts": options.prompt, "negative_prompt": options.negative_prompt, "seed": options.seed, **about}
    write = partial(save_png, sheet, metadata={"parameters": json.dumps(metadata)})
    grid = save_numbered(write, numbered(options.out, "grid-", 4))
    logger.info("%s  grid of %d images", grid, len(images))


if __name__ == "__main__":
    run(main)
