#!/usr/bin/env python
"""Predict the GPU memory of a training step without a GPU, or the batch that fits a card.

python tools/plan_memory.py --base finetune_stable_diffusion.yaml --size 512 --batch 1
python tools/plan_memory.py --base finetune_stable_diffusion.yaml --card 8
python tools/plan_memory.py --ckpt models/ldm/sd_xl_base_1.0.safetensors --card 4 --ram 16
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import add_parameterization_option
from ldm.cli.run import run
from ldm.config.trust import add_trust_option
from ldm.util import UserError, check_number

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", nargs="+", default=[], metavar="YAML", help="configs of a training, merged left to right")
    add("--ckpt", type=Path, help="release whose family's finetune config comes before those of --base")
    add("--batch", type=int, help="images per step (default: data.params.batch_size)")
    add("--size", type=int, help="side of an image in pixels (default: from the model's image_size)")
    add(
        "--card",
        type=float,
        metavar="GB",
        help="print the largest batch per tier that fits a card with this much memory",
    )
    add(
        "--ram",
        type=float,
        metavar="GB",
        help="with --card: recommend no tier that needs more host memory (default: any amount)",
    )
    add("--json", action="store_true", help="print JSON alone, with sizes in bytes")
    add_parameterization_option(parser)
    add_trust_option(parser)
    add(
        "overrides",
        nargs="*",
        metavar="a.b.c=value",
        help="changes to the config, such as lightning.trainer.precision=16",
    )
    arguments = parser.parse_args()
    # argparse adds all words after --base to it.
    arguments.overrides += [word for word in arguments.base if "=" in word]
    arguments.base = [word for word in arguments.base if "=" not in word]
    if not (arguments.base or arguments.ckpt):
        raise UserError("name the configs of a training with --base, or a release with --ckpt")
    if arguments.parameterization and not arguments.ckpt:
        raise UserError(
            f"--parameterization {arguments.parameterization}: tells what --ckpt predicts; without it, set "
            "model.params.parameterization"
        )
    check_number("--card", arguments.card, above=0, whole=False, optional=True, unit="GB")
    check_number("--ram", arguments.ram, above=0, whole=False, optional=True, unit="GB")
    if arguments.ram is not None and arguments.card is None:
        raise UserError("--ram limits the tiers for a card; give --card too")
    if arguments.card is not None and arguments.batch is not None:
        raise UserError("--card computes the batch size; leave out --batch")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.config.load import load_config

    if arguments.ckpt is not None:
        from ldm.release.configs import training_config

        chosen = training_config(arguments.ckpt, (), arguments.parameterization, size=arguments.size)
        arguments.base, arguments.overrides = chosen.names + arguments.base, chosen.overrides + arguments.overrides
    if arguments.card is None:
        config = load_config(arguments.base, arguments.overrides, arguments.trust_config)
        print_step(config, arguments)
    else:
        from ldm.planning.card import is_tier

        config = load_config(
            [name for name in arguments.base if not is_tier(name)], arguments.overrides, arguments.trust_config
        )
        print_fits(config, arguments)


def print_step(config: DictConfig, arguments: argparse.Namespace) -> None:
    from ldm.planning.card import ALLOWANCE, FRAGMENTATION, GIB, HOST_ALLOWANCE, needed_bytes, needed_host_bytes
    from ldm.planning.ledger import CATEGORIES, HOST
    from ldm.planning.step import on_device, peak_of_step

    peak = peak_of_step(config, arguments.batch, arguments.size)
    total = on_device(peak)
    if arguments.json:
        logger.info(json.dumps({**peak, "peak": total, "card": needed_bytes(total)}))
        return
    logger.info("predicted memory of the second training step, on one device:")
    for name, size in [*((name, peak[name]) for name in CATEGORIES), ("peak", total)]:
        logger.info("  %-12s %7.2f GiB", name, size / GIB)
    logger.info(
        "  %-12s %7.2f GiB, including %.1f GiB for the CUDA context, and %.0f %% for fragmentation",
        "card", needed_bytes(total) / GIB, ALLOWANCE / GIB, 100 * FRAGMENTATION,
    )  # fmt: skip
    logger.info(
        "  %-12s %7.2f GiB of host memory, including %.1f GiB for Python and the libraries",
        "host", needed_host_bytes(peak[HOST]) / GIB, HOST_ALLOWANCE / GIB,
    )  # fmt: skip


def print_fits(config: DictConfig, arguments: argparse.Namespace) -> None:
    from ldm.planning import AS_GIVEN
    from ldm.planning.card import ALLOWANCE, FRAGMENTATION, GIB, fits, needed_host_bytes

    found = fits(config, int(arguments.card * GIB), arguments.size)
    most = None if arguments.ram is None else arguments.ram * GIB
    fitting = [fit for fit in found if fit.images and (most is None or needed_host_bytes(fit.host) <= most)]
    use = fitting[0].tier if fitting else None
    if arguments.json:
        logger.info(json.dumps({"tiers": [vars(fit) for fit in found], "use": use}))
        return
    logger.info(
        "predicted to fit a card of %g GB, including %.1f GiB for the CUDA context, and %.0f %% for fragmentation:",
        arguments.card, ALLOWANCE / GIB, 100 * FRAGMENTATION,
    )  # fmt: skip
    for fit in found:
        batch = f"batch {fit.images}" if fit.images else "not even batch 1"
        logger.info(
            "  %-14s %-16s %7.2f GiB of tensors, %5.1f GiB of host memory",
            fit.tier, batch, fit.peak / GIB, needed_host_bytes(fit.host) / GIB,
        )  # fmt: skip
    if use is None:
        more = "" if most is None else ", or more host memory"
        logger.info("nothing fits; use a larger card or a smaller --size%s", more)
    elif use != AS_GIVEN:
        logger.info("use %s: --base %s %s", use, " ".join(arguments.base), use)


if __name__ == "__main__":
    run(main)
