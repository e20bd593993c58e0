#!/usr/bin/env python
"""Run the whole recipe on a tiny model, without and with a prior, and compare the samples in one image.

The steps are: pre-encode, hack, train, merge, sample.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.paths import newest_checkpoint
from ldm.cli.run import call, run

logger = logging.getLogger(__name__)

RELEASE = Path("data/base/emoji.safetensors")  # a tiny model of emoji, trained without cats
SAMPLER = ("--steps", 25, "--scale", 3, "--sampler", "dpm_solver")
RELEASE_CONFIG = "demo_tiny_release.yaml"
TRAINING_CONFIG = "demo_tiny.yaml"
NEW_PROMPTS = ["tom the cat, grinning", "tom the cat, crying", "tom the cat, smiling with heart eyes"]
NEIGHBOURS = ["bear", "mouse face", "dog face", "tiger face", "fox"]
# Prompts of the prior of the second training, sampled from the released model: none of the animals above.
PRIOR = ["panda", "koala", "wolf", "lion", "raccoon", "hamster", "rabbit face", "cow face", "pig face", "frog"]
SAMPLES = 2  # per prompt


def fine_tune(start: Path, out: Path, name: str, steps: int, *overrides: str) -> Path:
    """Train from `start`, merge, sample into the folder `out`/`name`, and return this folder."""
    logs, tuned = out / f"logs-{name}", out / f"{name}.safetensors"
    train = ("--base", TRAINING_CONFIG, "-t", "--no-test", "--max_steps", steps, "--logdir", logs)
    call("main.py", "--resume", start, *train, f"data.params.training_urls={out}/shards/cats-000000.tar", *overrides)
    merge = ("--train-ckpt", newest_checkpoint(logs), "--release", RELEASE, "--out", tuned)
    call("tools/merge_release.py", *merge)
    return sample(tuned, out / name)


def sample(ckpt: Path, folder: Path) -> Path:
    """Sample the prompts into `folder` and return it."""
    prompts = ("--prompt", *NEW_PROMPTS, *NEIGHBOURS, "--n", SAMPLES, "--seed", 1, "--batch-size", 16)
    call("tools/txt2img.py", "--ckpt", ckpt, "--config", RELEASE_CONFIG, *prompts, *SAMPLER, "--out", folder)
    return folder


def draw_comparison(folders: dict[str, Path], out: Path) -> None:
    """Draw a sheet with one row per prompt, and the samples of each folder (by title) side by side."""
    from PIL import Image, ImageDraw, ImageFont

    from ldm.images.grid import save_png

    side, gap, label, head = 96, 4, 270, 28  # pixels
    block = SAMPLES * (side + gap) + 2 * gap
    prompts = NEW_PROMPTS + NEIGHBOURS
    sheet = Image.new("RGB", (label + len(folders) * block, head + len(prompts) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for number, (title, folder) in enumerate(folders.items()):
        left = label + number * block
        draw.text((left, gap), title, "black", font)
        for index, path in enumerate(sorted(folder.glob("[0-9]*.png"))):
            row, column = divmod(index, SAMPLES)
            image = Image.open(path).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + column * (side + gap), head + row * (side + gap)))
    for row, prompt in enumerate(prompts):
        draw.text((gap, head + row * (side + gap) + side // 2), prompt, "black", font, anchor="lm")
    save_png(sheet, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for all results; emptied first")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    out = options.out
    shutil.rmtree(out, ignore_errors=True)

    start, release = out / "start.ckpt", ("--ckpt", RELEASE, "--config", RELEASE_CONFIG)
    cats, prior = (f"{out}/shards/{name}-%06d.tar" for name in ("cats", "prior/animals"))
    call("tools/preencode.py", *release, "--images", "data/cats", "--size", 64, "--out", cats)
    call("tools/hack_weights.py", "--release", RELEASE, "--base", TRAINING_CONFIG, "--out", start)
    folders = {"before": sample(RELEASE, out / "before"), "fine-tuned": fine_tune(start, out, "tuned", options.steps)}
    call("tools/make_prior.py", *release, "--prompt", *PRIOR, "--n", 4, *SAMPLER, "--out", prior)
    with_prior = fine_tune(start, out, "with-prior", options.steps, f"data.params.prior_urls={prior % 0}")
    draw_comparison({**folders, "with a prior": with_prior}, out / "before-and-after.png")
    logger.info(
        "\n%s: samples of the same prompts and seeds, before and after fine-tuning", out / "before-and-after.png"
    )


if __name__ == "__main__":
    run(main)
