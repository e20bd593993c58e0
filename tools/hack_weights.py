#!/usr/bin/env python
"""Put released weights into a training checkpoint, or make such a checkpoint from a config, for `main.py --resume`.

python tools/hack_weights.py                                          # into the newest logs/*/checkpoints/last.ckpt
python tools/hack_weights.py --train-ckpt logs/RUN/checkpoints/last.ckpt
python tools/hack_weights.py --base finetune_stable_diffusion.yaml    # without an aborted run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import add_vae_option
from ldm.cli.paths import CONVENTIONAL_RELEASE, newest_checkpoint
from ldm.cli.run import run
from ldm.config.trust import add_trust_option
from ldm.util import UserError


def main() -> None:
    arguments = parse_arguments()
    from ldm.config.load import load_config
    from ldm.release.hack import hack_config, hack_training  # imports torch, which --help does not need

    if arguments.base:
        out = arguments.out or arguments.release.with_name("hacked.ckpt")
        config = load_config(arguments.base, trusted=arguments.trust_config)
        hack_config(config, arguments.base, arguments.release, out, arguments.vae)
    else:
        training = arguments.train_ckpt or newest_checkpoint()
        hack_training(training, arguments.release, arguments.out or training, arguments.vae)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--release", type=Path, default=CONVENTIONAL_RELEASE, help="released weights (default: %(default)s)")
    add("--train-ckpt", type=Path, help="training checkpoint to change (default: the newest last.ckpt in logs/)")
    add("--base", nargs="+", metavar="CONFIG", help="make a training checkpoint from these configs instead")
    add("--out", type=Path, help="file to write; an existing file is kept as NAME.before-hack.ckpt "
        "(default: the training checkpoint; with --base, hacked.ckpt in the folder of the release)")  # fmt: skip
    add_vae_option(parser)
    add_trust_option(parser)
    arguments = parser.parse_args()
    if arguments.base and arguments.train_ckpt:
        raise UserError("--base makes a training checkpoint, --train-ckpt changes one; give only one of them")
    return arguments


if __name__ == "__main__":
    run(main)
