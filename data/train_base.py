#!/usr/bin/env python
"""Training of the tiny base model in `data/base`: from scratch on `data/emoji` to a release and its `loss_curves.csv`.

    python data/train_base.py --folder logs/base --out data/base/emoji.safetensors

On one core with AMX, the autoencoder and the UNet take an hour and a half, and the decoder as long again. Elsewhere
they take several hours. To continue after a stop, run the same command again.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a start from any folder

from ldm.cli.paths import newest_checkpoint
from ldm.cli.run import call, run
from ldm.files import atomic_write
from ldm.util import UserError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
SEED = 23
RELEASE_CONFIG, AUTOENCODER_CONFIG, BASE_CONFIG = "demo_tiny_release.yaml", "emoji_autoencoder.yaml", "emoji_base.yaml"
IMAGES = Path("data/emoji")
# Name, steps and learning rate of each round. It starts from the weights of the one before.
AUTOENCODER_ROUNDS = [("coarse", 2400, 6e-4), ("fine", 1000, 1.5e-4)]
# Rounds of the decoder alone. The encoder is frozen.
DECODER_ROUNDS = [
    ("coarse", 2000, 4e-4), ("fine", 1000, 1e-4), ("last", 400, 2e-5),
    ("long", 7000, 2e-4), ("long_fine", 3000, 6e-5), ("long_last", 1500, 1.5e-5),
]  # fmt: skip
_DECODER = ["model.params.freeze_encoder=true", "model.params.lossconfig.params.kl_weight=0"]
CAPTIONS = 3  # per image: its name and two paraphrases
_EPS = "model.params.parameterization=eps"
_LINEAR = "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaLinearScheduler"
# Last step, captions per image and overrides of each round of one run. The first three rounds belong to the history of
# this model. They predict noise, and taught it almost nothing about captions: the caption matters at high noise, where
# the error of the predicted noise is too small. After the change to v, 2200 steps were enough.
UNET_ROUNDS = [
    (4619, 3, [_EPS, _LINEAR, "model.base_learning_rate=8e-4"]),
    (6790, 1, [_EPS, _LINEAR, "model.base_learning_rate=8e-4", "model.params.min_snr_gamma=1"]),
    (9293, 1, [_EPS, "model.params.min_snr_gamma=1"]),
    (13250, 1, []),  # the names only
    (17500, 3, []),  # names and paraphrases
]
CURVE_STEPS = 250


def train_autoencoder(
    folder: Path, rounds: list[tuple[str, int, float]], overrides: Sequence[str] = (), start: Path | None = None
) -> Path:
    """Train the autoencoder, from the weights in `start` if given, and return its last training checkpoint."""
    for name, steps, rate in rounds:
        settings = [f"model.base_learning_rate={rate}", *overrides]
        if start is not None:
            settings.append(f"model.params.ckpt_path={start}")
        start = train(folder / name, AUTOENCODER_CONFIG, steps, settings)
    return start


def train(logdir: Path, config: str, steps: int, overrides: list[str], start: Path | None = None) -> Path:
    """Run main.py to `steps`, or continue the run under `logdir`; return its last checkpoint.

    Raises:
        UserError: the run was stopped before `steps`.
    """
    last = next(iter(sorted(logdir.glob("*/checkpoints/last.ckpt"))), None)
    if last is None or steps_of(last) < steps:
        resume = last or start
        resumed = ["--resume", resume] if resume is not None else []
        settings = ["-t", "--scale_lr", "False", "--no-test", "--precision", "bf16-mixed", "--max_steps", steps]
        call("main.py", *resumed, "--base", config, *settings, "-s", SEED, "--logdir", logdir, *overrides)
        last = newest_checkpoint(logdir)
    if steps_of(last) < steps:
        raise UserError(f"{last}: stopped at step {steps_of(last)} of {steps}; run the same command again")
    return last


def steps_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps of a training checkpoint."""
    from ldm.checkpoint import open_checkpoint

    return open_checkpoint(checkpoint).content["global_step"]


def assemble(autoencoder: Path, out: Path) -> None:
    """Write a release of the trained autoencoder, an untrained UNet and an untrained text tower."""
    import torch

    from ldm.checkpoint import load_into, load_state_dict, save_state_dict
    from ldm.config.load import build_model, load_config

    torch.manual_seed(SEED)
    model = build_model(load_config([RELEASE_CONFIG]))
    load_into(model.first_stage_model, load_state_dict(autoencoder), source=str(autoencoder))
    save_state_dict(model.state_dict(), out)


def caption_sets(folder: Path) -> list[Path]:
    """Copy the images once per caption of an image, and return the folders."""
    rows = [json.loads(line) for line in (IMAGES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    folders = []
    for number in range(CAPTIONS):
        target = folder / f"captions-{number}"
        shutil.copytree(IMAGES, target, dirs_exist_ok=True)
        lines = [
            json.dumps({"file_name": row["file_name"], "text": [row["text"], *row["paraphrases"]][number]})
            for row in rows
        ]
        (target / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        folders.append(target)
    return folders


def encode(folder: Path, release: Path) -> list[str]:
    """Pre-encode every image with each of its captions; return the shard pattern of each set."""
    shards = []
    for images in caption_sets(folder / "images"):
        out = folder / "shards" / images.name / "%06d.tar"
        if not (out.parent / "null.t5.npy").exists():
            options = ["--size", "64", "--batch-size", "32", "--num-workers", "0", "--overwrite"]
            call("tools/preencode.py", "--ckpt", release, "--config", RELEASE_CONFIG, "--images", images,
                 "--out", out, *options)  # fmt: skip
        shards.append(f"{out.parent}/*.tar")
    return shards


def latent_scale(shards: str) -> float:
    """Return 1 / standard deviation of latents that are sampled from the posteriors in the shards."""
    import numpy as np

    from ldm.shards.open import open_shards

    dataset = open_shards(shards, cond_stage_key="txt")
    values = np.stack([dataset[index]["f8"] for index in range(len(dataset))]).astype(np.float64)
    mean, logvar = np.split(values, 2, axis=1)
    return float((mean.var() + np.exp(logvar).mean()) ** -0.5)


def loss_curves(folder: Path, out: Path) -> None:
    """Write a table of the runs' training losses. Each value is a mean over `CURVE_STEPS` steps."""
    with atomic_write(out) as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "steps", "loss"])
        for name, column in [
            *((f"autoencoder/{name}", "train/rec_loss") for name, *_ in AUTOENCODER_ROUNDS),
            ("unet", "train/loss_simple"),
            *((f"decoder/{name}", "train/rec_loss") for name, *_ in DECODER_ROUNDS),
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
    parser.add_argument("--folder", type=Path, default=Path("logs/base"), help="run folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="release to write")
    options = parser.parse_args()
    folder, out = options.folder.resolve(), options.out.resolve()
    os.chdir(ROOT)

    fresh, start = folder / "fresh.safetensors", folder / "start.ckpt"
    autoencoder = train_autoencoder(folder / "autoencoder", AUTOENCODER_ROUNDS)
    if not fresh.exists():
        assemble(autoencoder, fresh)
    shards = encode(folder, fresh)
    logger.info("scale_factor of these latents: %.4f", latent_scale(shards[0]))
    if not start.exists():
        call("tools/hack_weights.py", "--release", fresh, "--base", BASE_CONFIG, "--out", start)
    for steps, captions, overrides in UNET_ROUNDS:
        urls = f"data.params.training_urls={shards[:captions]}"
        trained = train(folder / "unet", BASE_CONFIG, steps, [urls, *overrides], start)
    decoder = train_autoencoder(folder / "decoder", DECODER_ROUNDS, _DECODER, autoencoder)
    files = ["--train-ckpt", trained, "--release", fresh, "--vae", decoder]
    call("tools/merge_release.py", *files, "--out", out, "--half")
    loss_curves(folder, out.with_name("loss_curves.csv"))


if __name__ == "__main__":
    run(main)
