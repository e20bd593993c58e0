#!/usr/bin/env python
"""Extract the difference of two releases of one model as a LoRA, in the format that web UIs and diffusers open.

With --train-ckpt, write the LoRA that a training with lora.yaml has made.

python tools/extract_lora.py --base R --tuned mine.safetensors --out mine-lora.safetensors --rank 32 --half
python tools/extract_lora.py --base R --tuned mine.safetensors --out mine-lora.safetensors --energy 0.9
python tools/extract_lora.py --base R --tuned mine.safetensors --out mine-lora.safetensors --check 'shards/cats/*.tar'
python tools/extract_lora.py --train-ckpt logs/RUN/checkpoints/last.ckpt --out mine-lora.safetensors --half

Prints the energy kept per block: the share of the squared norm of the weights' change that the LoRA holds. With
--check, also prints the denoising loss and the drift of the base with the LoRA, beside those of the tuned release.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import add_config_options
from ldm.cli.run import HelpFormatter, Lines, run
from ldm.config.trust import add_trust_option
from ldm.util import UserError, check_number, refuse_if

logger = logging.getLogger(__name__)

RANK = 64


def main() -> None:
    options = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.release.configs import release_config
    from ldm.release.load import pick_device
    from ldm.release.lora_evaluation import compare_with_tuned
    from ldm.release.lora_extraction import Target, extract_files
    from ldm.release.lora_from_training import write_trained_lora

    if options.train_ckpt is not None:
        write_trained_lora(options.train_ckpt, options.out, options.weights, options.half)
        return
    target = Target(options.rank or (None if options.energy else RANK), options.energy)
    device = pick_device(options.device)
    if options.check is not None:  # a config that is refused ends the command before anything is written
        release_config(options.base, options.config, options.parameterization, trusted=options.trust_config)
    found = extract_files(options.base, options.tuned, options.out, target, options.half, options.all_layers, device)
    logger.info("%s", Lines(found.table()))
    for line in found.left_out():
        logger.info("%s", line)
    if options.check is not None:
        chosen = options.config, options.parameterization, device, options.trust_config
        table = compare_with_tuned(options.base, options.tuned, options.out, options.check, *chosen)
        logger.info("%s", Lines(table))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--base", type=Path, help="release before fine-tuning")
    add("--tuned", type=Path, help="release after fine-tuning")
    add("--train-ckpt", type=Path, help="checkpoint of a LoRA training, in place of --base and --tuned")
    add(
        "--weights",
        choices=["ema", "raw"],
        help="with --train-ckpt, averaged or raw factors (default: ema if the checkpoint has them)",
    )
    add("--out", type=Path, required=True, help="file to write, .safetensors")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help=f"rank of each layer; default: {RANK}")
    size.add_argument("--energy", type=float, help="take the least rank per layer that keeps this share of its change")
    add("--half", action="store_true", help="write the factors in float16")
    add(
        "--all-layers",
        action="store_true",
        help="also take the UNet's first and last convolution and its embeddings, which older programs refuse",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--check", metavar="SHARDS", help="evaluate the base with the LoRA on these shards")
    add_config_options(parser, "with --check, config of both releases")
    add_trust_option(parser)
    options = parser.parse_args()
    check_number("--rank", options.rank, least=1, optional=True)
    check_number("--energy", options.energy, above=0, most=1, whole=False, optional=True)
    _check_inputs(options)
    return options


def _check_inputs(options: argparse.Namespace) -> None:
    """Raise `UserError` unless the options are for two releases, or for the checkpoint of a training."""
    if options.train_ckpt is None:
        refuse_if(options.base is None or options.tuned is None, "give --base and --tuned, or --train-ckpt")
        refuse_if(options.weights, f"--weights {options.weights}: is for --train-ckpt; leave it out")
        return
    for name in ("base", "tuned", "rank", "energy", "all_layers", "check", "config", "parameterization"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: is for two releases; leave it out beside --train-ckpt")


if __name__ == "__main__":
    run(main)
