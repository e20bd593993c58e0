#!/usr/bin/env python
"""Encode images and captions once, so that training needs neither the autoencoder nor the text encoder.

    python tools/preencode.py --ckpt models/ldm/stable-diffusion-v1/model.ckpt \\
        --config configs/latent-diffusion/stable_diffusion_v1.yaml \\
        --images images/ --out shards/toms-%06d.tar --size 512 --flip

An interrupted command continues when it is given again. Under torchrun or srun, each process makes its share of the
shards; several machines must share the folder of --out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import add_caption_options, add_config_options, add_vae_option
from ldm.cli.run import run
from ldm.config.trust import add_trust_option
from ldm.modules.encoders.caption_settings import check_caption_options, set_caption_settings
from ldm.util import UserError, check_number

if TYPE_CHECKING:
    from ldm.encoding.image_stream import ImageStream
    from ldm.images.find import ImageItem

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, type=Path, help="release, .ckpt, .safetensors or a folder of diffusers")
    add_config_options(parser, "config with the text encoder")
    add(
        "--images",
        required=True,
        nargs="+",
        help="folders of images with .txt files or metadata.jsonl; tars of images and .txt files; image files",
    )
    add("--out", required=True, help="shards to write, such as shards/toms-%%06d.tar or shards/toms-{000..009}.tar")
    add("--size", type=int, help="side in pixels of the central square crop (default: the model's, such as 512)")
    add(
        "--buckets",
        action="store_true",
        help="crop less: to rectangles of up to the same area, with sides in steps of 64",
    )
    add("--batch-size", type=int, default=8, help="images per batch (default: 8)")
    add("--shard-size", type=int, default=1000, help="samples per shard (default: 1000)")
    add(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, ...; auto takes the GPU of the process if there is one",
    )
    add(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="precision of the encoders (default: fp32)",
    )
    add("--flip", action="store_true", help="also encode the mirror image of every image")
    add("--masks", type=int, help="masks per sample, for an inpainting model (default: 4)")
    add("--loss-masks", action="store_true", help="store masks for the masked loss: name.mask.png beside name.jpg, "
        "white where the image is trained, or else the image's alpha channel")  # fmt: skip
    add_caption_options(parser)
    _add_variant_options(parser)
    _add_caption_choice_options(parser)
    add("--no-repeats", action="store_true", help="do not repeat the images of folders such as 10_name in training")
    add("--num-workers", type=int, help="processes that decode images (default: at most 16)")
    add("--overwrite", action="store_true", help="replace existing shards of --out")
    add_vae_option(parser)
    add_trust_option(parser)
    arguments = parser.parse_args()
    check_caption_options(arguments.max_tokens, arguments.clip_skip)
    check_number("--keep-tags", arguments.keep_tags, least=0, optional=True)
    check_number("--tag-dropout", arguments.tag_dropout, least=0, most=1, whole=False, optional=True)
    check_number("--variant-area", arguments.variant_area, above=0, most=1, whole=False, optional=True)
    check_number("--variant-jitter", arguments.variant_jitter, least=0, most=1, whole=False, optional=True)
    for name in ("batch_size", "shard_size", "tag_variants", "variants"):
        check_number(f"--{name.replace('_', '-')}", getattr(arguments, name), least=1)
    for name in ("size", "masks"):
        check_number(f"--{name}", getattr(arguments, name), least=1, optional=True)
    check_number("--num-workers", arguments.num_workers, least=0, optional=True)
    if arguments.tag_variants > 1 and arguments.several_captions:
        raise UserError("--tag-variants and --several-captions: give one of them")
    _check_needed(arguments, "tag_variants", ("keep_tags", "tag_dropout"), "variants of tags")
    _check_needed(arguments, "variants", ("variant_area", "variant_jitter"), "variants of images")
    return arguments


def _add_variant_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--variants", type=int, default=1, metavar="K", help="variants per image: itself, and K - 1 random crops; "
        "training chooses one per epoch (default: 1)")  # fmt: skip
    add("--variant-area", type=float, metavar="A", help="least area of a random crop, as a share (default: 0.8)")
    add("--variant-jitter", type=float, metavar="J", help="greatest change of brightness, contrast and saturation of a "
        "variant; hues turn by up to a tenth of it (default: 0)")  # fmt: skip


def _add_caption_choice_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--caption", help="one caption for all images, in place of their own captions")
    add("--several-captions", action="store_true", help="each line of a caption file is a caption, and metadata.jsonl "
        "may have lists; training chooses one per epoch")  # fmt: skip
    add("--tag-variants", type=int, default=1, metavar="K", help="captions per image: its own, and others with the "
        "tags between its commas in random order; training chooses one per epoch (default: 1)")  # fmt: skip
    add("--keep-tags", type=int, metavar="N", help="first tags that keep their places in variants (default: 1)")
    add("--tag-dropout", type=float, metavar="P", help="share of the other tags that a variant lacks (default: 0)")


def _check_needed(arguments: argparse.Namespace, count: str, names: Sequence[str], what: str) -> None:
    """Raise `UserError` for one of the options `names` without more than one variant by the option `count`."""
    for name in names:
        if getattr(arguments, count) == 1 and getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')} {getattr(arguments, name)}"
            raise UserError(f"{option}: changes {what} only; give --{count.replace('_', '-')} too, 2 or more")


def _open_images(arguments: argparse.Namespace, pairs: bool) -> Sequence[ImageItem] | ImageStream:
    """Return the images to encode, or pairs of them, with their captions, masks and repeats."""
    from ldm.data.image_sources import find_images
    from ldm.encoding.image_stream import open_images
    from ldm.images.repeats import FolderRepeats
    from ldm.images.tags import with_tag_variants
    from ldm.shards.writer import is_unlimited

    changes = []
    if arguments.tag_variants > 1:
        keep = 1 if arguments.keep_tags is None else arguments.keep_tags
        tags = {"count": arguments.tag_variants, "keep": keep, "dropout": arguments.tag_dropout or 0.0}
        changes.append(partial(with_tag_variants, **tags))
    repeats = None if arguments.no_repeats else FolderRepeats()
    chosen = arguments.images, arguments.caption, pairs, arguments.several_captions, arguments.loss_masks
    if is_unlimited(arguments.out):
        may_have_several = arguments.several_captions or arguments.tag_variants > 1
        stream = open_images(*chosen, changes, repeats, may_have_several)
        if stream is not None:
            logger.info("%s in %s, read while they are encoded", stream.count, stream.where)
            return stream
    items = find_images(*chosen)
    for change in [*changes, *([repeats.of] if repeats else [])]:
        items = [change(item) for item in items]
    if repeats:
        repeats.log()
    logger.info("%d %s in %s", len(items), "pairs of images" if pairs else "images", ", ".join(arguments.images))
    return items


def main() -> None:
    arguments = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.distributed.ranks import Ranks
    from ldm.encoding.encoder import SampleEncoder
    from ldm.encoding.kinds import takes_pairs
    from ldm.encoding.preencode import preencode
    from ldm.encoding.read import default_workers
    from ldm.encoding.shard_set import check_out
    from ldm.encoding.variants import LEAST_AREA, Variants
    from ldm.release.configs import release_config
    from ldm.release.load import load_release, pick_device, pick_precision
    from ldm.release.model_family import own_side

    ranks = Ranks.from_environment()
    if ranks.world > 1 and arguments.overwrite:
        raise UserError("--overwrite: not possible with several processes; remove the set first")
    if ranks.rank == 0:
        check_out(arguments.out, arguments.overwrite)
    chosen = arguments.config, arguments.parameterization, arguments.size
    _, config = release_config(arguments.ckpt, *chosen, arguments.trust_config)
    items = _open_images(arguments, takes_pairs(config))
    area = LEAST_AREA if arguments.variant_area is None else arguments.variant_area
    variants = Variants(arguments.variants, area, arguments.variant_jitter or 0.0)
    device = pick_device(arguments.device, ranks.local)
    dtype = pick_precision(arguments.precision, device)
    model = load_release(arguments.ckpt, config, vae=arguments.vae)
    set_caption_settings(model.cond_stage_model, arguments.max_tokens, arguments.clip_skip)
    report = preencode(
        SampleEncoder(model, device, dtype),
        items,
        arguments.out,
        size=arguments.size or own_side(model),
        buckets=arguments.buckets,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        flip=arguments.flip,
        masks=arguments.masks,
        loss_masks=arguments.loss_masks,
        variants=variants,
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
