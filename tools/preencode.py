#!/usr/bin/env python
"""Encode images and captions once, for training without the autoencoder and the text encoder.

    python tools/preencode.py --ckpt models/ldm/stable-diffusion-v1/model.ckpt \\
        --config configs/latent-diffusion/stable_diffusion_v1.yaml \\
        --images images/ --out shards/toms-%06d.tar --size 512 --flip

Interrupted, it goes on when the same command is given again. Under torchrun or srun, on one machine or several that
share the folder of --out, each process makes its share of the shards.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from whichever folder this is run

from ldm.cli.options import add_config_options, add_vae_option
from ldm.cli.run import run
from ldm.config.trust import add_trust_option
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, type=Path, help="release checkpoint, .ckpt or .safetensors")
    add_config_options(parser, "its config, with the text encoder")
    add(
        "--images",
        required=True,
        nargs="+",
        help="folders with name.txt beside name.jpg, or with metadata.jsonl; tars of images and .txt; images",
    )
    add("--out", required=True, help="shards to write, such as shards/toms-%%06d.tar or shards/toms-{000..009}.tar")
    add("--size", type=int, default=512, help="pixels; images are cropped to a square in the middle (default: 512)")
    add("--buckets", action="store_true", help="crop less: to sizes of up to the area of the square, in steps of 64")
    add("--batch-size", type=int, default=8, help="images encoded at once (default: 8)")
    add("--shard-size", type=int, default=1000, help="samples in a shard (default: 1000)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes this process's GPU if there is one")
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the encoders (default: fp32)")
    add("--flip", action="store_true", help="also encode the mirror image of each image")
    add("--caption", help="one caption for all images, in place of their own")
    add("--num-workers", type=int, help="processes that decode images (default: up to 16)")
    add("--overwrite", action="store_true", help="replace the shards of --out that are there, finished or not")
    add_vae_option(parser)
    add_trust_option(parser)
    arguments = parser.parse_args()
    for name in ("size", "batch_size", "shard_size"):
        check_number(f"--{name.replace('_', '-')}", getattr(arguments, name), least=1)
    check_number("--num-workers", arguments.num_workers, least=0, optional=True)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # Only now the slow imports: --help should answer at once.
    from ldm.data.sources import find_images
    from ldm.distributed.ranks import Ranks
    from ldm.encoding.encoder import SampleEncoder
    from ldm.encoding.preencode import preencode
    from ldm.encoding.read import default_workers
    from ldm.encoding.shard_set import check_out
    from ldm.release.configs import release_config
    from ldm.release.load import PRECISIONS, load_release, pick_device

    ranks = Ranks.from_environment()
    if ranks.world > 1 and arguments.overwrite:
        raise UserError("--overwrite: none of several processes may remove what others write; remove the set first")
    if ranks.rank == 0:
        check_out(arguments.out, arguments.overwrite)
    items = find_images(arguments.images, arguments.caption)
    logger.info("%d images in %s", len(items), ", ".join(arguments.images))
    chosen = arguments.config, arguments.parameterization, arguments.size
    _, config = release_config(arguments.ckpt, *chosen, arguments.trust_config)
    device, dtype = pick_device(arguments.device, ranks.local), PRECISIONS[arguments.precision]
    model = load_release(arguments.ckpt, config, vae=arguments.vae)
    report = preencode(
        SampleEncoder(model, device, dtype),
        items,
        arguments.out,
        size=arguments.size,
        buckets=arguments.buckets,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        flip=arguments.flip,
        workers=default_workers(ranks.local_world) if arguments.num_workers is None else arguments.num_workers,
        overwrite=arguments.overwrite,
        ranks=ranks,
    )
    logger.info(
        "%swrote %d samples of %d images in %d shards to %s; %d images failed, %d without a caption",
        f"rank {ranks.rank} of {ranks.world} " if ranks.rank else "",
        report.samples,
        report.images,
        len(report.shards),
        Path(arguments.out).parent,
        len(report.failed),
        report.without_caption,
    )


if __name__ == "__main__":
    run(main)
