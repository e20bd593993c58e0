#!/usr/bin/env python
"""Train the tiny base model from scratch on `data/emoji`, and write it as a release: what `data/base` holds.
Beside it goes `loss_curves.csv`.

    python data/train_base.py --folder logs/base --out data/base/emoji.safetensors

An hour and a half on one core with AMX, hours elsewhere. It goes on where it stopped: give the same command again.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from whichever folder this is run

from ldm.cli.paths import newest_checkpoint
from ldm.cli.run import call, run
from ldm.files import atomic_write
from ldm.util import UserError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
SEED = 23
RELEASE_CONFIG, AUTOENCODER_CONFIG, BASE_CONFIG = "demo_tiny_release.yaml", "emoji_autoencoder.yaml", "emoji_base.yaml"
PICTURES = Path("data/emoji")
# Two rounds, the second at a lower learning rate and from the first's weights: name, steps, learning rate.
AUTOENCODER_ROUNDS = [("coarse", 2400, 6e-4), ("fine", 1000, 1.5e-4)]
CAPTIONS = 3  # a picture: its name and two paraphrases
_EPS = "model.params.parameterization=eps"
_LINEAR = "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaLinearScheduler"
# Rounds of one run: its step at the end, captions a picture, overrides. The first three are how this model came to be,
# and taught it next to nothing of captions: predicting noise, the error at much noise, where the caption decides, is
# too small to count. Predicting v, 2200 steps did.
UNET_ROUNDS = [
    (4619, 3, [_EPS, _LINEAR, "model.base_learning_rate=8e-4"]),
    (6790, 1, [_EPS, _LINEAR, "model.base_learning_rate=8e-4", "model.params.min_snr_gamma=1"]),
    (9293, 1, [_EPS, "model.params.min_snr_gamma=1"]),
    (13250, 1, []),  # names
    (17500, 3, []),  # and paraphrases
]
CURVE_STEPS = 250


def train_autoencoder(folder: Path) -> Path:
    """Its last training checkpoint."""
    start: Path | None = None
    for name, steps, rate in AUTOENCODER_ROUNDS:
        overrides = [f"model.base_learning_rate={rate}"]
        if start is not None:
            overrides.append(f"model.params.ckpt_path={start}")
        start = train(folder / name, AUTOENCODER_CONFIG, steps, overrides)
    return start


def train(logdir: Path, config: str, steps: int, overrides: list[str], start: Path | None = None) -> Path:
    """Run main.py to `steps`, or take up the run that is under `logdir`; return its last checkpoint.

    Raises:
        UserError: it was stopped before.
    """
    last = next(iter(sorted(logdir.glob("*/checkpoints/last.ckpt"))), None)
    if last is None or steps_of(last) < steps:
        resume = last or start
        resumed = ["--resume", resume] if resume is not None else []
        settings = ["-t", "--scale_lr", "False", "--no-test", "--precision", "bf16-mixed", "--max_steps", steps]
        call("main.py", *resumed, "--base", config, *settings, "-s", SEED, "--logdir", logdir, *overrides)
        last = newest_checkpoint(logdir)
    if steps_of(last) < steps:
        raise UserError(f"{last}: stopped at step {steps_of(last)} of {steps}; give the same command again")
    return last


def steps_of(checkpoint: Path) -> int:
    """Optimizer steps that a training checkpoint has behind it."""
    from ldm.checkpoint import open_checkpoint

    return open_checkpoint(checkpoint).content["global_step"]


def assemble(autoencoder: Path, out: Path) -> None:
    """A release with the trained autoencoder, and a UNet and a text tower that have learnt nothing yet."""
    import torch

    from ldm.checkpoint import load_into, load_state_dict, save_state_dict
    from ldm.config.load import build_model, load_config

    torch.manual_seed(SEED)
    model = build_model(load_config([RELEASE_CONFIG]))
    load_into(model.first_stage_model, load_state_dict(autoencoder), source=str(autoencoder))
    save_state_dict(model.state_dict(), out)


def caption_sets(folder: Path) -> list[Path]:
    """Copies of the pictures, one for each caption that a picture has."""
    rows = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    folders = []
    for number in range(CAPTIONS):
        target = folder / f"captions-{number}"
        shutil.copytree(PICTURES, target, dirs_exist_ok=True)
        lines = [
            json.dumps({"file_name": row["file_name"], "text": [row["text"], *row["paraphrases"]][number]})
            for row in rows
        ]
        (target / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        folders.append(target)
    return folders


def encode(folder: Path, release: Path) -> list[str]:
    """Pre-encode every picture with each of its captions; the shards of each set."""
    shards = []
    for pictures in caption_sets(folder / "pictures"):
        out = folder / "shards" / pictures.name / "%06d.tar"
        if not (out.parent / "null.t5.npy").exists():
            options = ["--size", "64", "--batch-size", "32", "--num-workers", "0", "--overwrite"]
            call("tools/preencode.py", "--ckpt", release, "--config", RELEASE_CONFIG, "--images", pictures,
                 "--out", out, *options)  # fmt: skip
        shards.append(f"{out.parent}/*.tar")
    return shards


def latent_scale(shards: str) -> float:
    """1 / standard deviation of the latents in the shards, drawn from their posteriors."""
    import numpy as np

    from ldm.shards.open import open_shards

    dataset = open_shards(shards, cond_stage_key="txt")
    values = np.stack([dataset[index]["f8"] for index in range(len(dataset))]).astype(np.float64)
    mean, logvar = np.split(values, 2, axis=1)
    return float((mean.var() + np.exp(logvar).mean()) ** -0.5)


def loss_curves(folder: Path, out: Path) -> None:
    """A table of the runs' training losses, each value the mean over what was logged in `CURVE_STEPS` steps."""
    with atomic_write(out) as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "steps", "loss"])
        for name, column in [(f"autoencoder/{name}", "train/rec_loss") for name, *_ in AUTOENCODER_ROUNDS] + [
            ("unet", "train/loss_simple")
        ]:
            binned: dict[int, list[float]] = {}
            for metrics in sorted((folder / name).glob("*/csv/*/metrics.csv")):
                with metrics.open(encoding="utf-8") as rows:
                    for row in csv.DictReader(rows):
                        if row.get(column):
                            binned.setdefault(int(row["step"]) // CURVE_STEPS, []).append(float(row[column]))
            for number, values in sorted(binned.items()):
                writer.writerow([name, (number + 1) * CURVE_STEPS, f"{sum(values) / len(values):.4f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("logs/base"), help="of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="release to write")
    options = parser.parse_args()
    folder, out = options.folder.resolve(), options.out.resolve()
    os.chdir(ROOT)

    fresh, start = folder / "fresh.safetensors", folder / "start.ckpt"
    autoencoder = train_autoencoder(folder / "autoencoder")
    if not fresh.exists():
        assemble(autoencoder, fresh)
    shards = encode(folder, fresh)
    logger.info("scale_factor of these latents: %.4f", latent_scale(shards[0]))
    if not start.exists():
        call("tools/hack_weights.py", "--release", fresh, "--base", BASE_CONFIG, "--out", start)
    for steps, captions, overrides in UNET_ROUNDS:
        urls = f"data.params.training_urls={shards[:captions]}"
        trained = train(folder / "unet", BASE_CONFIG, steps, [urls, *overrides], start)
    call("tools/merge_release.py", "--train-ckpt", trained, "--release", fresh, "--out", out, "--half")
    loss_curves(folder, out.with_name("loss_curves.csv"))


if __name__ == "__main__":
    run(main)
