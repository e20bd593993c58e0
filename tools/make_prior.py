#!/usr/bin/env python
"""Shards of what a model should not forget: its own samples, or pictures of yours, and what it predicts on them.

python tools/make_prior.py --prompt "a photo of a cat" "a drawing of a cat" --n 200 --out data/prior/%06d.tar
python tools/make_prior.py --prompt "a photo of a cat" --n 200 --out data/taught/%06d.tar --teacher 8
python tools/make_prior.py --shards 'data/class/*.tar' --out data/taught/%06d.tar --teacher 8
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from whichever folder this is run

from ldm.cli.options import SETTINGS, add_drawing_options, check_at_least, check_drawing_options, read_prompts
from ldm.cli.run import HelpFormatter, run
from ldm.config.trust import add_trust_option
from ldm.util import UserError

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_drawing_options(parser)
    add = parser.add_argument
    add("--shards", help="instead of captions: pre-encoded pictures, as training_urls names them; needs --teacher")
    add("--out", required=True, help="shards to write, such as data/prior/%%06d.tar")
    add("--teacher", type=int, default=0, help="timesteps a sample at which to store the model's predictions")
    add(
        "--null-share", type=float, default=0.1, help="with --teacher: samples that get the empty caption, for guidance"
    )
    add("--shard-size", type=int, default=1000, help="samples in a shard")
    add("--overwrite", action="store_true", help="replace the shards of --out that are there")
    add_trust_option(parser)
    options = parser.parse_args()

    def given(*names: str) -> str:
        """Those of the options whose values are not the default, as they are typed."""
        return " and ".join(f"--{name}" for name in names if getattr(options, name) != parser.get_default(name))

    check_at_least(options, shard_size=1, teacher=0)
    if not 0 <= options.null_share <= 1:
        raise UserError(f"--null-share {options.null_share}: give a number from 0 to 1")
    if not options.teacher and given("null_share"):
        raise UserError("--null-share says nothing without --teacher; leave it out, or give both")
    if options.shards is None:
        options.prompt = read_prompts(options.prompt, options.from_file)
    elif options.prompt or options.from_file or not options.teacher:
        raise UserError(f"--shards {options.shards}: has its own captions, and needs --teacher, the predictions to add")
    elif unread := given("n", *SETTINGS, "H", "W"):
        raise UserError(f"--shards {options.shards}: its pictures are taken, nothing is drawn; leave out {unread}")
    check_drawing_options(options, options.n * len(options.prompt))
    return options


def main() -> None:
    options = parse_arguments()
    # Only now the slow imports: --help should answer at once.
    from ldm.data.dropout import CaptionDropout
    from ldm.encoding.encoder import Encoder
    from ldm.encoding.prior import drawn, make_prior, open_pictures, pictured, taught
    from ldm.encoding.shard_set import check_out
    from ldm.encoding.teacher import Teacher
    from ldm.models.diffusion.text_to_image import Request, latent_shape
    from ldm.release.load import PRECISIONS, load_release, pick_device
    from ldm.release.matching import release_config

    check_out(options.out, options.overwrite)
    chosen = options.config, options.parameterization, max(filter(None, (options.H, options.W)), default=None)
    _, options.config = release_config(options.ckpt, *chosen, options.trust_config)
    device, dtype = pick_device(options.device), PRECISIONS[options.precision]
    model = load_release(options.ckpt, options.config, trusted=options.trust_config)
    encoder = Encoder(model, device, dtype)  # which tells the weights by their float32 values
    model.model.to(dtype)
    model.to(device)
    if options.shards is not None:
        dataset = open_pictures(encoder, options.shards, options.out)
        count, about = len(dataset), {}
        batches = pictured(dataset, model.channels, options.seed, options.batch_size)
    else:
        prompts = [prompt for prompt in options.prompt for _ in range(options.n)]
        requests = [Request(prompt, options.seed + number) for number, prompt in enumerate(prompts)]
        count, about = len(requests), {key: getattr(options, key) for key in SETTINGS}
        shape = latent_shape(model, options.H, options.W)
        batches = drawn(encoder, requests, shape, about, options.batch_size)
    if options.teacher:
        teacher = Teacher(model, options.teacher, options.seed)
        dropout = CaptionDropout("t5", encoder.captions([""])[0], options.null_share, options.seed)
        batches = taught(batches, teacher, dropout)
    shards = make_prior(
        encoder,
        batches,
        count,
        options.out,
        shard_size=options.shard_size,
        overwrite=options.overwrite,
        seed=options.seed,
        teacher=options.teacher,
        **about,
    )
    logger.info("wrote %d samples in %d shards to %s", count, len(shards), Path(options.out).parent)


if __name__ == "__main__":
    run(main)
