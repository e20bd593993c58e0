#!/usr/bin/env python
"""Recall of the training images: sample their captions and find the nearest training image of each sample.

A sample is right if the nearest training image is the one with the sample's caption.
The distance is the root mean square difference of RGB values in [0, 1] at 32x32 (`ldm.images.grid.image_distances`).

    python benchmarks/base_recall.py --ckpt data/base/emoji.safetensors --config demo_tiny_release.yaml --n 200
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from ldm.cli.run import run
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="release checkpoint")
    parser.add_argument("--config", type=Path, required=True, help="config of the checkpoint")
    parser.add_argument("--images", type=Path, default=ROOT / "data/emoji", help="image folder with metadata.jsonl")
    parser.add_argument("--n", type=int, default=200, help="number of captions to sample (default 200)")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default 25)")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of captions and for the noise")
    parser.add_argument("--out", type=Path, default=Path("outputs/base_recall.png"), help="grid of samples to write")
    options = parser.parse_args()
    if options.n < 1 or options.seed < 0:
        raise UserError(f"--n {options.n} --seed {options.seed}: give --n of at least 1 and --seed of at least 0")
    return options


def main() -> None:
    options = parse_arguments()
    import numpy as np
    import torch
    from PIL import Image

    from ldm.images.grid import image_distances, image_grid, save_png
    from ldm.models.diffusion.text_to_image import Request, latent_shape, text_to_image
    from ldm.release.load import load_release

    lines = (options.images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    arrays = [np.asarray(Image.open(options.images / entry["file_name"]).convert("RGB")) for entry in entries]
    known = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (M, 3, H, W)

    chosen = np.random.default_rng(options.seed).choice(len(entries), min(options.n, len(entries)), replace=False)
    requests = [Request(entries[index]["text"], options.seed) for index in chosen]
    model = load_release(options.ckpt, options.config)
    generated = text_to_image(
        model,
        requests,
        latent_shape(model, None, None),
        sampler="dpm_solver",
        steps=options.steps,
        scale=options.scale,
        batch_size=50,
    )
    samples = torch.stack(list(generated))  # (n, 3, H, W)
    distances = image_distances(samples, known)
    nearest = distances.argmin(1)
    targets = torch.from_numpy(chosen)
    right = nearest == targets
    own = distances[torch.arange(len(targets)), targets]
    share = f"{int(right.sum())} of {len(requests)} samples are nearest to their own image"
    logger.info("%s (%.1f %%)", share, 100 * right.float().mean())
    nearest_of_all = distances.amin(1).median()
    logger.info(
        "median distance of a sample to the image of its caption: %.4f, to the nearest: %.4f",
        own.median(),
        nearest_of_all,
    )
    side_by_side = torch.stack([known[targets[:32]], samples[:32]], dim=1).flatten(0, 1)
    save_png(image_grid(side_by_side, columns=16), options.out)
    logger.info("%s: training images, each with its sample to the right", options.out)


if __name__ == "__main__":
    run(main)
