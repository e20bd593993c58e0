#!/usr/bin/env python
"""The whole recipe on a tiny model: pre-encode, hack, resume, merge, sample. Ends with a picture."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from whichever folder this is run

from ldm.cli import call, newest_checkpoint, run

logger = logging.getLogger(__name__)

RELEASE = Path("data/base/emoji.safetensors")  # a tiny model of emoji that has never seen a cat
SAMPLING = "demo_tiny_release.yaml"
TRAINING = "demo_tiny.yaml"
NEW_PROMPTS = ["tom the cat, grinning", "tom the cat, crying", "tom the cat, in love"]
NEIGHBOURS = ["bear", "mouse face", "dog face", "tiger face", "fox"]
SAMPLES = 2  # a prompt


def sample(ckpt: Path, folder: Path) -> None:
    settings = f"--n {SAMPLES} --seed 1 --steps 25 --scale 3 --sampler dpm_solver --batch-size 16".split()
    prompts = ["--prompt", *NEW_PROMPTS, *NEIGHBOURS]
    call("tools/txt2img.py", "--ckpt", ckpt, "--config", SAMPLING, *prompts, *settings, "--out", folder)


def compare(before: Path, after: Path, out: Path) -> None:
    """One picture: a row a prompt, the samples of `before` on the left, those of `after` with the same seeds beside."""
    from PIL import Image, ImageDraw, ImageFont

    from ldm.pictures import save_png

    side, gap, label, head = 96, 4, 190, 28  # pixels
    half = SAMPLES * (side + gap)
    prompts = NEW_PROMPTS + NEIGHBOURS
    sheet = Image.new("RGB", (label + 2 * (half + 2 * gap), head + len(prompts) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for left, folder in [(label, before), (label + half + 2 * gap, after)]:
        draw.text((left, gap), f"{folder.name} fine-tuning", "black", font)
        for index, path in enumerate(sorted(folder.glob("[0-9]*.png"))):
            row, column = divmod(index, SAMPLES)
            picture = Image.open(path).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left + column * (side + gap), head + row * (side + gap)))
    for row, prompt in enumerate(prompts):
        draw.text((gap, head + row * (side + gap) + side // 2), prompt, "black", font, anchor="lm")
    save_png(sheet, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for all results; emptied first")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning")
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    out = options.out
    shutil.rmtree(out, ignore_errors=True)

    start, tuned = out / "start.ckpt", out / "toms.safetensors"
    shards = str(out / "shards/cats-%06d.tar")
    preencode = ["--ckpt", RELEASE, "--config", SAMPLING, "--images", "data/cats", "--size", "64", "--out", shards]
    call("tools/preencode.py", *preencode)
    call("tools/hack_weights.py", "--release", RELEASE, "--base", TRAINING, "--out", start)
    train = ["--base", TRAINING, "-t", "--no-test", "--max_steps", str(options.steps), "--logdir", out / "logs"]
    call("main.py", "--resume", start, *train, f"data.params.training_urls={shards % 0}")
    trained = newest_checkpoint(out / "logs")
    call("tools/merge_release.py", "--train-ckpt", trained, "--release", RELEASE, "--out", tuned)
    sample(RELEASE, out / "before")
    sample(tuned, out / "after")
    compare(out / "before", out / "after", out / "before-and-after.png")
    logger.info("\n%s: the same prompts and seeds, before and after fine-tuning", out / "before-and-after.png")


if __name__ == "__main__":
    run(main)
