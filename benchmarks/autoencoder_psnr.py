#!/usr/bin/env python
"""PSNR of the reconstructions of an `AutoencoderKL`, from the mode of the posterior: the mean per folder.

    python benchmarks/autoencoder_psnr.py --ckpt data/base/emoji.safetensors --config demo_tiny_release.yaml --size 64 \
        data/emoji data/cats data/clocks
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from ldm.cli.options import add_vae_option
from ldm.cli.run import run

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of images")
    parser.add_argument("--ckpt", type=Path, required=True, help="release checkpoint")
    parser.add_argument("--config", type=Path, required=True, help="config of the checkpoint")
    parser.add_argument("--size", type=int, default=512, help="images are cropped and scaled to it (default 512)")
    parser.add_argument("--out", type=Path, help="grid of the first 64 images of each folder, with reconstructions")
    add_vae_option(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    from ldm.data.datasets import ImageCaptionDataset
    from ldm.images.grid import image_grid, save_png
    from ldm.release.load import load_release

    autoencoder = load_release(options.ckpt, options.config, vae=options.vae).first_stage_model
    shown = []
    for folder in options.folders:
        dataset = ImageCaptionDataset(folder, options.size, caption="")
        values = []
        for number in range(len(dataset)):
            image = dataset[number]["image"].permute(2, 0, 1)[None]  # (1, 3, H, W)
            with torch.no_grad():
                decoded = autoencoder.decode(autoencoder.encode(image).mode()).clamp(-1, 1)
            values.append(peak_signal_noise_ratio(decoded, image, data_range=(-1.0, 1.0)))
            if number < 64:
                shown += [image, decoded]
        psnr = torch.stack(values)
        logger.info("%s: %d images, PSNR %.2f dB (worst %.2f dB)", folder, len(psnr), psnr.mean(), psnr.min())
    if options.out:
        save_png(image_grid(torch.cat(shown), columns=16), options.out)
        logger.info("%s: images, each with its reconstruction to the right", options.out)


if __name__ == "__main__":
    run(main)
