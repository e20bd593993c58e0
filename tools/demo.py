#!/usr/bin/env python
"""Run the whole recipe on a tiny model, without and with keep.yaml, and compare the samples in one image.

The steps are: pre-encode, hack, train, merge, sample.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
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
SAMPLES = 2  # per prompt
KNOWN = Path("data/emoji/metadata.jsonl")  # what the tiny model was trained on
OTHERS = 40  # captions of the prior, beside those of the animals that look like a cat


def fine_tune(start: Path, out: Path, name: str, steps: int, configs: Sequence[str], merging: Sequence[str]) -> Path:
    """Train from `start`, merge, sample into the folder `out`/`name`, and return this folder.

    `configs` are added to the training config, and `merging` to the command that merges.
    """
    logs, tuned = out / f"logs-{name}", out / f"{name}.safetensors"
    train = ("--base", TRAINING_CONFIG, *configs, "-t", "--no-test", "--max_steps", steps, "--logdir", logs)
    shards = [f"data.params.training_urls={out}/shards/cats-000000.tar"]
    if configs:
        shards.append(f"data.params.prior_urls={out}/shards/kept/*.tar")
    call("main.py", "--resume", start, *train, *shards)
    call(
        "tools/merge_release.py",
        "--train-ckpt",
        newest_checkpoint(logs),
        "--release",
        RELEASE,
        *merging,
        "--out",
        tuned,
    )
    return sample(tuned, out / name)


def write_prompts(path: Path) -> Path:
    """Write the captions of the prior to `path`, one per line, and return it: neighbours of a cat, and `OTHERS`."""
    known = [json.loads(line) for line in KNOWN.read_text(encoding="utf-8").splitlines()]
    near = [entry["text"] for entry in known if entry.get("cat_neighbour")]
    others = [entry["text"] for entry in known if not entry.get("cat_neighbour")]
    spread = [others[number * len(others) // OTHERS] for number in range(OTHERS)]
    path.write_text("".join(f"{caption}\n" for caption in near + spread), encoding="utf-8")
    return path


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
    cats, kept = (f"{out}/shards/{name}-%06d.tar" for name in ("cats", "kept/known"))
    call("tools/preencode.py", *release, "--images", "data/cats", "--size", 64, "--out", cats)
    call("tools/hack_weights.py", "--release", RELEASE, "--base", TRAINING_CONFIG, "--out", start)
    folders = {"before": sample(RELEASE, out / "before")}
    folders["fine-tuned"] = fine_tune(start, out, "tuned", options.steps, [], [])
    prompts = ("--from-file", write_prompts(out / "known.txt"), *SAMPLER, "--batch-size", 16)
    call("tools/make_prior.py", *release, *prompts, "--teacher", 16, "--out", kept)
    folders["with keep.yaml"] = fine_tune(start, out, "kept", options.steps, ["keep.yaml"], ["--keep"])
    draw_comparison(folders, out / "before-and-after.png")
    logger.info(
        "\n%s: samples of the same prompts and seeds, before and after fine-tuning", out / "before-and-after.png"
    )


if __name__ == "__main__":
    run(main)
