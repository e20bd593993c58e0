#!/usr/bin/env python
"""Look at a set of pre-encoded shards before training on it.

    python tools/inspect_shards.py 'data/train/*.tar'
    python tools/inspect_shards.py 'data/train/*.tar' --sheet sheet.png \\
        --ckpt models/ldm/stable-diffusion-v1/model.ckpt --config stable_diffusion_v1.yaml

Counts, sizes, caption lengths, duplicates, and statistics of the latents; with a model, also a sheet of what its
autoencoder makes of them. A set that training would refuse as damaged is refused here too; of one that is unfinished,
what is there is shown, and of one that another autoencoder made than the model's, all: with a warning.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from whichever folder this is run

from ldm.cli.run import Lines, run
from ldm.config.trust import add_trust_option
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", nargs="+", help="as data.params.training_urls names them: tars, folders, globs, brace patterns")
    add("--json", type=Path, metavar="FILE", help="write all that was found, lists of duplicates included")
    add("--sheet", type=Path, metavar="FILE", help="write a PNG of samples; needs --ckpt and --config")
    add("--samples", type=int, default=24, help="on the sheet, spread over the set (default: 24)")
    add("--ckpt", type=Path, help="release that made the set")
    add("--config", help="its config")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_trust_option(parser)
    options = parser.parse_args()
    if (options.ckpt is None) != (options.config is None):
        raise UserError("--ckpt and --config: give both, or none")
    if options.sheet is not None and options.ckpt is None:
        raise UserError(f"--sheet {options.sheet}: give --ckpt and --config, whose autoencoder draws it")
    if options.sheet is not None and options.sheet.suffix != ".png":
        raise UserError(f"--sheet {options.sheet}: the name must end in .png")
    check_number("--samples", options.samples, least=1)
    return options


def main() -> None:
    options = parse_arguments()
    # Only now the slow imports: --help should answer at once.
    from ldm.checkpoint import encoder_digests
    from ldm.config.load import load_config
    from ldm.files import atomic_write
    from ldm.images.grid import save_png
    from ldm.inspection.measure import inspect, is_complete, latent_channels, open_to_inspect, read_about
    from ldm.inspection.sheet import contact_sheet
    from ldm.inspection.text import inspection_text
    from ldm.release.load import load_release, pick_device
    from ldm.shards.open import check_encoders

    dataset = open_to_inspect(options.shards)
    about = read_about(dataset)
    model = None
    if options.ckpt is not None:
        config = load_config([options.config], trusted=options.trust_config)
        model = load_release(options.ckpt, config, pick_device(options.device))
        try:
            check_encoders(dataset, encoder_digests(model.state_dict()), str(options.ckpt))
        except UserError as error:
            logger.warning("%s", error)
    channels = latent_channels(dataset) if model is None else model.channels
    scale_factor = about.get("scale_factor") if model is None else float(model.scale_factor)
    found = {"complete": is_complete(dataset), **inspect(dataset, channels, scale_factor)}
    logger.info("%s", Lines(inspection_text(found, about)))
    if options.json is not None:
        with atomic_write(options.json) as path:
            path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.sheet is not None:
        save_png(contact_sheet(model, dataset, options.samples), options.sheet)
        logger.info(
            "\n%s: %d samples as the autoencoder decodes them", options.sheet, min(options.samples, len(dataset))
        )


if __name__ == "__main__":
    run(main)
