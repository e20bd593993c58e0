#!/usr/bin/env python
"""Put released weights into a training checkpoint, or make such a checkpoint from a config, for `main.py --resume`.

python tools/hack_weights.py                                          # into the newest logs/*/checkpoints/last.ckpt
python tools/hack_weights.py --train-ckpt logs/RUN/checkpoints/last.ckpt
python tools/hack_weights.py --base finetune_stable_diffusion.yaml    # without an aborted run
python tools/hack_weights.py --release models/ldm/sd_xl_base_1.0.safetensors --base    # config of the release's family
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import add_parameterization_option, add_vae_option
from ldm.cli.paths import check_release, newest_checkpoint
from ldm.cli.run import run
from ldm.config.trust import add_trust_option
from ldm.release import CONVENTIONAL_RELEASE
from ldm.util import UserError


def main() -> None:
    arguments = parse_arguments()
    from ldm.release.configs import training_config  # imports torch, which --help does not need
    from ldm.release.hack import hack_config, hack_training

    release, predicts = arguments.release, arguments.parameterization
    training = arguments.train_ckpt
    if training is None and arguments.base is None:
        training = newest_checkpoint(required=not release.exists())
    check_release("--release", release)
    if training is None:
        chosen = training_config(release, arguments.base or (), predicts, arguments.trust_config)
        hack_config(chosen, release, arguments.out or release.with_name("hacked.ckpt"), arguments.vae)
    else:
        hack_training(training, release, arguments.out or training, arguments.vae, predicts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--release",
        type=Path,
        default=CONVENTIONAL_RELEASE,
        help="released weights, a file or a folder of diffusers (default: %(default)s)",
    )
    add("--train-ckpt", type=Path, help="training checkpoint to change (default: the newest last.ckpt in logs/)")
    add("--base", nargs="*", metavar="CONFIG", help="make a training checkpoint from these configs instead of changing "
        "one; a bare --base, or a logs/ without runs, selects the finetune config of the release's family")  # fmt: skip
    add("--out", type=Path, help="file to write; an existing file is kept as NAME.before-hack.ckpt "
        "(default: the training checkpoint; with --base, hacked.ckpt in the folder of the release)")  # fmt: skip
    add_parameterization_option(parser)
    add_vae_option(parser)
    add_trust_option(parser)
    arguments = parser.parse_args()
    if arguments.base is not None and arguments.train_ckpt:
        raise UserError("--base makes a training checkpoint, --train-ckpt changes one; give only one of them")
    return arguments


if __name__ == "__main__":
    run(main)
