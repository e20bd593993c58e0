#!/usr/bin/env python
"""Merge a training checkpoint and the release it started from into a new release, .ckpt, .safetensors or a folder.

python tools/merge_release.py                        # the newest last.ckpt in logs/; writes merged.ckpt
python tools/merge_release.py --train-ckpt logs/RUN/checkpoints/last.ckpt --out my-model.safetensors --half
python tools/merge_release.py --out my-model/         # a folder in the layout of diffusers
python tools/merge_release.py --strength 0.7 --out mine.ckpt  # 70 % of the way from the release to the training
python tools/merge_release.py --keep --out mine.ckpt          # the lowest strength that keeps what was learnt
python tools/merge_release.py --release R --lora style.safetensors:0.8 --out R-style.safetensors  # without a training

The training may be of a UNet, of a LoRA, or of an autoencoder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import add_lora_option, add_out_options, add_vae_option
from ldm.cli.paths import check_release, newest_checkpoint
from ldm.cli.run import run
from ldm.release import CONVENTIONAL_RELEASE
from ldm.util import UserError, check_number, refuse_if

KEEP = 0.95  # default share of --keep


def main() -> None:
    arguments = parse_arguments()
    from ldm.release.destination import Destination  # these import torch, which --help does not need
    from ldm.release.lora_merging import Lora, add_lora_files
    from ldm.release.merge import merge_files

    loras = [Lora(*lora) for lora in arguments.lora]
    if loras and arguments.train_ckpt is None:
        out = Destination.of(arguments.out, arguments.config)
        add_lora_files(arguments.release, out, loras, arguments.half, arguments.vae)
        return
    training = arguments.train_ckpt or newest_checkpoint()
    check_release("--release", arguments.release)
    out = Destination.of(arguments.out or training.with_name("merged.ckpt"), arguments.config)
    if arguments.keep is not None:
        from ldm.release.keep import keeping_strength

        measured = training, arguments.release, arguments.keep, arguments.weights, arguments.vae
        arguments.strength = keeping_strength(*measured)
    options = arguments.weights, arguments.half, arguments.vae, arguments.strength, loras, arguments.embed_settings
    merge_files(training, arguments.release, out, *options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train-ckpt", type=Path, help="training checkpoint (default: the newest logs/*/checkpoints/last.ckpt)")
    add(
        "--release",
        type=Path,
        default=CONVENTIONAL_RELEASE,
        help="release that training started from, a file or a folder of diffusers (default: %(default)s)",
    )
    add_out_options(parser, "merged.ckpt in the folder of the training checkpoint")
    add(
        "--weights",
        choices=["ema", "raw"],
        help="averaged or raw trained weights (default: ema if the checkpoint has them)",
    )
    add("--half", action="store_true", help="write the weights in float16")
    add(
        "--strength",
        type=float,
        default=1.0,
        help="share of the training's change: 0 is the release, 1 the training (default: 1)",
    )
    add(
        "--keep",
        type=float,
        nargs="?",
        const=KEEP,
        metavar="SHARE",
        help="find the lowest strength that keeps this share of what was learnt, on the shards of the run "
        f"(default: {KEEP})",
    )
    add(
        "--embed-settings",
        action="store_true",
        help="tell step, optimizer and numbers of the training's config in the metadata; never paths or captions",
    )
    add_vae_option(parser)
    add_lora_option(parser)
    arguments = parser.parse_args()
    check_number("--strength", arguments.strength, least=0, whole=False)
    check_number("--keep", arguments.keep, above=0, most=1, whole=False, optional=True)
    if arguments.keep is not None and arguments.strength != 1:
        raise UserError(f"--keep finds the strength; leave out --strength {arguments.strength:g}")
    if arguments.lora and arguments.train_ckpt is None:
        refuse_if(arguments.out is None, "--lora without --train-ckpt: give --out too, the release to write")
        refuse_if(arguments.embed_settings, "--embed-settings: with --lora, give --train-ckpt too, or leave it out")
        refuse_if(arguments.keep is not None, "--keep: with --lora, give --train-ckpt too, or leave it out")
        refuse_if(
            arguments.weights, f"--weights {arguments.weights}: with --lora, give --train-ckpt too, or leave it out"
        )
        refuse_if(
            arguments.strength != 1,
            "--strength: needs --train-ckpt; give the strength of a LoRA after its name, --lora FILE:0.8",
        )
    return arguments


if __name__ == "__main__":
    run(main)
