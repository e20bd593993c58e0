#!/usr/bin/env python
"""Mix releases of one model, weight by weight, into a new release, .ckpt, .safetensors or a folder of diffusers.

python tools/merge_models.py A B --alpha 0.3 --out M.safetensors                          # 0.7 A + 0.3 B
python tools/merge_models.py A B C --alpha 0.3 0.2 --out M.safetensors                    # 0.5 A + 0.3 B + 0.2 C
python tools/merge_models.py A B C --method add-difference --alpha 1 --out M.safetensors  # A + B - C
python tools/merge_models.py A B --method slerp --alpha 0.5 --out M.safetensors           # along the arc from A to B
python tools/merge_models.py A B --alpha 0.3 --block middle_block=0 --block output_blocks.11=0.8 --out M.safetensors

Names, dtypes and metadata are those of the first file. A block is the beginning of a key's name. For keys of the UNet,
`model.diffusion_model.` may be left out. If several blocks match a key, the longest applies.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import add_out_options
from ldm.cli.run import HelpFormatter, run
from ldm.util import UserError, check_number


def main() -> None:
    arguments = parse_arguments()
    from ldm.release.destination import Destination  # these import torch, which --help does not need
    from ldm.release.mixture import METHODS, Recipe, mix_files

    method, files = METHODS[arguments.method], len(arguments.files)
    if files < method.least or files > (method.most or files):
        raise UserError(f"--method {arguments.method}: takes {method.least} files{'' if method.most else ' or more'}")
    count = method.alphas(files)
    blocks = dict(parse_block(entry, count) for entry in arguments.block)
    check_alphas("--alpha", arguments.alpha, count)
    out = Destination.of(arguments.out, arguments.config)
    mix_files(arguments.files, out, Recipe(arguments.method, arguments.alpha, blocks))


def check_alphas(name: str, alphas: list[float], count: int) -> None:
    """Raise `UserError` unless `alphas` are `count` finite numbers."""
    for alpha in alphas:
        check_number(name, alpha, whole=False)
    if len(alphas) != count:
        raise UserError(f"{name}: has {len(alphas)} numbers; these files and this method take {count}")


def parse_block(entry: str, count: int) -> tuple[str, list[float]]:
    """Return the name and the `count` numbers of an entry `NAME=ALPHA[,ALPHA ...]`."""
    name, equals, numbers = entry.partition("=")
    try:
        alphas = [float(number) for number in numbers.split(",")]
    except ValueError:
        alphas = []
    if not (name and equals and alphas):
        raise UserError(f"--block {entry}: write NAME=ALPHA, such as middle_block=0.5")
    check_alphas(f"--block {name}", alphas, count)
    return name, alphas


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="releases; the others are mixed into the first")
    add_out_options(parser, required=True)
    add("--method", choices=["sum", "add-difference", "slerp"], default="sum", help="formula of the mixture")
    add("--alpha", type=float, nargs="+", default=[0.5], help="sum: a weight per further file; others: one weight")
    add(
        "--block",
        action="append",
        default=[],
        metavar="NAME=ALPHA",
        help="other weights for the keys that begin with NAME; repeat for more blocks",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
