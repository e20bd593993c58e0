#!/usr/bin/env python
"""Inspect a set of pre-encoded shards before training on it.

    python tools/inspect_shards.py 'data/train/*.tar'
    python tools/inspect_shards.py 'data/train/*.tar' --sheet sheet.png \\
        --ckpt models/ldm/stable-diffusion-v1/model.ckpt

Prints counts, sizes, caption lengths, duplicates, and statistics of the latents. With a model, writes a contact sheet
of decoded samples. Like training, the tool refuses a damaged set. In an unfinished set, it inspects the existing
samples. A set made by another autoencoder than the model's gives a warning.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import add_config_options, add_vae_option
from ldm.cli.run import Lines, run
from ldm.config.trust import add_trust_option
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", nargs="+", help="tars, folders, globs or brace patterns, as in data.params.training_urls")
    add("--json", type=Path, metavar="FILE", help="write all results, with complete lists of duplicates")
    add("--sheet", type=Path, metavar="FILE", help="write a PNG of samples; needs --ckpt")
    add("--samples", type=int, default=24, help="samples on the sheet, spread over the set (default: 24)")
    add("--ckpt", type=Path, help="release that made the set")
    add_config_options(parser)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_vae_option(parser)
    add_trust_option(parser)
    options = parser.parse_args()
    if options.config is not None and options.ckpt is None:
        raise UserError(f"--config {options.config}: give its release too, with --ckpt")
    if options.sheet is not None and options.ckpt is None:
        raise UserError(f"--sheet {options.sheet}: needs an autoencoder; give --ckpt")
    if options.sheet is not None and options.sheet.suffix != ".png":
        raise UserError(f"--sheet {options.sheet}: the name must end in .png")
    check_number("--samples", options.samples, least=1)
    return options


def main() -> None:
    options = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.checkpoint import encoder_digests
    from ldm.files import atomic_write
    from ldm.images.grid import save_png
    from ldm.inspection.data_report import format_inspection
    from ldm.inspection.measure import inspect, is_complete, latent_channels, open_to_inspect, read_first_index
    from ldm.inspection.sheet import contact_sheet
    from ldm.release.configs import release_config
    from ldm.release.load import load_release, pick_device
    from ldm.shards.open import check_encoders

    dataset = open_to_inspect(options.shards)
    index = read_first_index(dataset)
    model = None
    if options.ckpt is not None:
        _, config = release_config(options.ckpt, options.config, options.parameterization, trusted=options.trust_config)
        model = load_release(options.ckpt, config, pick_device(options.device), vae=options.vae)
        try:
            check_encoders(dataset, encoder_digests(model.state_dict()), str(options.ckpt))
        except UserError as error:
            logger.warning("%s", error)
    channels = latent_channels(dataset) if model is None else model.channels
    scale_factor = index.get("scale_factor") if model is None else float(model.scale_factor)
    found = {"complete": is_complete(dataset), **inspect(dataset, channels, scale_factor)}
    logger.info("%s", Lines(format_inspection(found, index)))
    if options.json is not None:
        with atomic_write(options.json) as path:
            path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.sheet is not None:
        save_png(contact_sheet(model, dataset, options.samples), options.sheet)
        logger.info("\n%s: %d decoded samples", options.sheet, min(options.samples, len(dataset)))


if __name__ == "__main__":
    run(main)
