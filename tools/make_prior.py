#!/usr/bin/env python
"""Make the shards of a prior, which reduces forgetting, from samples of the model or from your own images.

python tools/make_prior.py --keep cat
python tools/make_prior.py --prompt "a photo of a cat" "a drawing of a cat" --n 200 --out data/prior/%06d.tar
python tools/make_prior.py --prompt "a photo of a cat" --n 200 --out data/with_teacher/%06d.tar --teacher 8
python tools/make_prior.py --shards 'data/class/*.tar' --out data/with_teacher/%06d.tar --teacher 8
python tools/make_prior.py --keep cat --shards 'data/train/*.tar'

--keep CLASS makes the prior of keep.yaml for a subject of this class: prompts for the class, for its neighbours and of
general things, with --teacher 8, in data/kept/. With --teacher, the shards also hold the model's predictions on the
samples. --shards takes pre-encoded images in place of samples; prompts then replace their captions. An interrupted
command continues when it is given again. Under torchrun or srun, each process makes its share of the shards.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import SETTINGS, add_image_options, check_image_options, read_prompts
from ldm.cli.run import HelpFormatter, run
from ldm.config.trust import add_trust_option
from ldm.encoding.keep_prompts import keep_prompts
from ldm.util import UserError, check_number, refuse_if

if TYPE_CHECKING:
    from ldm.encoding.encoder import SampleEncoder
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

PROMPTS = Path(__file__).resolve().parents[1] / "data/prompts"
KEPT = "data/kept/%06d.tar"  # the prior of keep.yaml
GENERAL = 150


def add_prior_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool beside those for sampling images."""
    add = parser.add_argument
    add(
        "--keep",
        nargs="+",
        metavar="CLASS",
        help="class of the subject, such as cat, dog or woman, in place of prompts",
    )
    add("--general", type=int, default=GENERAL, help="with --keep: number of general prompts (default: %(default)s)")
    add(
        "--shards",
        help="pre-encoded images in place of samples, a folder or a pattern; needs --teacher. Without prompts, their "
        "captions are kept",
    )
    add("--out", help=f"shards to write, such as data/prior/%%06d.tar; default with --keep: {KEPT.replace('%', '%%')}")
    add(
        "--teacher",
        type=int,
        help="store the model's predictions at this number of timesteps per sample (default: none; with --keep: 8)",
    )
    add(
        "--null-share",
        type=float,
        default=0.1,
        help="with --teacher: fraction of samples that get the empty caption, for guidance",
    )
    add(
        "--teacher-power",
        type=float,
        default=0.0,
        metavar="P",
        help="with --teacher: more timesteps of low noise, with density (1 - t/T)^P; training then needs the "
        "timestep_config Split with power P",
    )
    add("--shard-size", type=int, default=1000, help="samples per shard")
    add("--overwrite", action="store_true", help="replace existing shards of --out")
    add_trust_option(parser)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_image_options(parser)
    add_prior_options(parser)
    options = parser.parse_args()

    def given(*names: str) -> str:
        """Return the flags among `names` whose values are not the default."""
        return " and ".join(
            f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != parser.get_default(name)
        )

    check_keep(options)
    check_number("--shard-size", options.shard_size, least=1)
    check_number("--teacher", options.teacher, least=0)
    check_number("--null-share", options.null_share, least=0, most=1, whole=False)
    check_number("--teacher-power", options.teacher_power, least=0, whole=False)
    for unused in (given("null_share"), given("teacher_power")):
        if unused and not options.teacher:
            raise UserError(f"{unused} has no effect without --teacher; leave it out, or give both")
    if options.keep:
        lists = PROMPTS / "neighbours.txt", PROMPTS / "general.txt"
        options.prompt += keep_prompts(options.keep, *lists, options.general)
    elif options.shards is None or options.prompt or options.from_file:
        options.prompt = read_prompts(options.prompt, options.from_file)
    if options.shards is not None:
        check_shards(options, given)
    check_image_options(options, options.n * len(options.prompt))
    return options


def check_shards(options: argparse.Namespace, given: Callable[..., str]) -> None:
    """Raise `UserError` for options that --shards cannot use. `given` names those of the command line."""
    refuse_if(
        not options.teacher,
        f"--shards {options.shards}: images need the model's predictions beside them; give --teacher, such as 8",
    )
    unused = given(*(() if options.prompt else ("n",)), *SETTINGS, "H", "W")
    refuse_if(unused, f"--shards {options.shards}: nothing is sampled; leave out {unused}")
    unused = given("max_tokens", "clip_skip")
    refuse_if(unused, f"--shards {options.shards}: its own caption settings apply; leave out {unused}")


def check_keep(options: argparse.Namespace) -> None:
    """Raise `UserError` for options that --keep cannot use or that need it, and set the defaults of both cases."""
    if options.keep is None:
        if options.general != GENERAL:
            raise UserError(f"--general {options.general}: belongs to --keep; give that too, or leave it out")
        if options.out is None:
            raise UserError("--out: give the shards to write, such as data/prior/%06d.tar")
    elif options.from_file:
        raise UserError(f"--keep {' '.join(options.keep)}: has prompts of its own; leave out --from-file")
    options.out = options.out or KEPT
    options.teacher = (8 if options.keep else 0) if options.teacher is None else options.teacher


def main() -> None:
    options = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.data.dropout import CaptionDropout
    from ldm.distributed.ranks import Ranks
    from ldm.encoding.prior import digest_of, digest_shards, make_prior
    from ldm.encoding.prior_samples import latents_of_images, open_images, prompts_on_images, sampled, with_teacher
    from ldm.encoding.shard_set import check_out
    from ldm.encoding.teacher import Teacher
    from ldm.models.diffusion.text_to_image import Request, latent_shape
    from ldm.modules.encoders.caption_length import warn_of_cut
    from ldm.shards.index import TEACHER_POWER

    ranks = Ranks.from_environment()
    if ranks.world > 1 and options.overwrite:
        raise UserError("--overwrite: not possible with several processes; remove the set first")
    if ranks.rank == 0:
        check_out(options.out, options.overwrite)
    model, encoder, unet = load_release_for_prior(options, ranks.local)
    prompts = [prompt for prompt in options.prompt for _ in range(options.n)]
    made_from = {"prompts": digest_of(prompts)} if prompts else {}
    if options.shards is not None:
        dataset = open_images(encoder, options.shards, options.out)
        made_from, about = {**made_from, "images": digest_shards(dataset)}, {}
        kept = dataset, model.channels, options.seed
        source = prompts_on_images(*kept, prompts, encoder) if prompts else latents_of_images(*kept)
        count = len(prompts or dataset)
    else:
        requests = [Request(prompt, options.seed + number) for number, prompt in enumerate(prompts)]
        count, about = len(requests), {key: getattr(options, key) for key in SETTINGS}
        shape = latent_shape(model, options.H, options.W)
        made_from |= {"shape": list(shape)}
        source = sampled(encoder, requests, shape, about)
    warn_of_cut(model.cond_stage_model, options.prompt)  # with the settings of the images, if there are any
    if options.teacher:
        made_from["null_share"] = options.null_share
        about = {**about, TEACHER_POWER: options.teacher_power} if options.teacher_power else about
        teacher = Teacher(model, options.teacher, options.seed, options.teacher_power)
        dropout = CaptionDropout(encoder.captions([""])[0].arrays, options.null_share, options.seed)
        source = with_teacher(source, teacher, dropout)
    shards = make_prior(
        encoder,
        source,
        count,
        options.out,
        made_from=made_from | unet,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        overwrite=options.overwrite,
        ranks=ranks,
        seed=options.seed,
        teacher=options.teacher,
        **about,
    )
    written = sum(shard["samples"] for shard in shards)
    logger.info("wrote %d samples in %d shards to %s", written, len(shards), Path(options.out).parent)


def load_release_for_prior(
    options: argparse.Namespace, local_rank: int
) -> tuple[LatentDiffusion, SampleEncoder, dict[str, str | None]]:
    """Return the model on its device, its encoder, and the digests of its UNet."""
    from ldm.encoding.encoder import SampleEncoder
    from ldm.encoding.prior import unet_digests
    from ldm.modules.encoders.caption_settings import set_caption_settings
    from ldm.release.configs import release_config
    from ldm.release.load import load_release, pick_device, pick_precision

    size = max(filter(None, (options.H, options.W)), default=None)
    _, config = release_config(options.ckpt, options.config, options.parameterization, size, options.trust_config)
    device = pick_device(options.device, local_rank)
    dtype = pick_precision(options.precision, device)
    model = load_release(options.ckpt, config, vae=options.vae)
    set_caption_settings(model.cond_stage_model, options.max_tokens, options.clip_skip)
    encoder = SampleEncoder(model, device, dtype)  # takes the digests of the weights in float32
    unet = unet_digests(model)
    model.model.to(dtype)
    model.to(device)
    return model, encoder, unet


if __name__ == "__main__":
    run(main)
