#!/usr/bin/env python
"""Measure what fine-tuning changed: loss, drift and samples of a tuned release and its base, on sets of shards.

    python tools/evaluate.py --base data/base/emoji.safetensors --ckpt toms.safetensors \\
        --config demo_tiny_release.yaml --set 'new=shards/cats/*.tar' --set 'neighbours=shards/neighbours/*.tar' \\
        --set 'rest=shards/rest/*.tar' --sample 6 --scale 3 --out outputs/evaluation

Writes evaluation.json and evaluation.png into --out. The loss is the mean square error at fixed timesteps and noise.
The drift is ‖ε_tuned − ε_base‖² / ‖ε_base‖², the squared relative distance of the noise predictions. Brackets are 95 %
confidence intervals over images. Each model encodes the captions with its own text encoder if the config has one.
Otherwise it takes the caption embeddings in the shards. Like training, the tool refuses a set that other encoders than
those of the releases made.

    python tools/evaluate.py … --sweep-strength 0.5 0.7 0.9 --subject new

evaluates the weights between base and tuned at these strengths, and writes strengths.json and strengths.png. Its table
marks the Pareto front of the subjects' loss and the drift of the other sets. Give the strength that you choose to
`merge_release.py --strength`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.evaluation.releases import Settings
    from ldm.models.diffusion.ddpm import LatentDiffusion

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.options import (
    add_config_options,
    add_network_options,
    add_sampling_options,
    add_vae_option,
    check_sampling_options,
)
from ldm.cli.run import HelpFormatter, Lines, run
from ldm.config.trust import add_trust_option
from ldm.locks import LOCK, locked
from ldm.util import UserError, check_choice, check_number

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="release before fine-tuning")
    add("--ckpt", type=Path, required=True, help="release after fine-tuning")
    add_config_options(parser, "config of both releases")
    add(
        "--set",
        dest="sets",
        action="append",
        required=True,
        metavar="NAME=SHARDS",
        help="name and shards of a set; repeat for more sets",
    )
    add("--timesteps", type=int, default=8, help="number of timesteps, at the midpoints of equal strata")
    add("--limit", type=int, help="maximum number of images per set, spread over it; default: all")
    add("--batch-size", type=int, default=8, help="images per batch")
    sample_help = "also sample images of N captions per set; not for models that take images"
    add("--sample", type=int, default=0, metavar="N", help=sample_help)
    add_sampling_options(parser)
    add_network_options(parser)
    add(
        "--sweep-strength",
        dest="strengths",
        nargs="*",
        type=float,
        metavar="A",
        help="evaluate at these shares of the change from base to tuned; default: 0.1 to 1 in tenths",
    )
    add(
        "--subject",
        nargs="+",
        metavar="NAME",
        help="sets that fine-tuning was for, in a sweep; default: the first --set",
    )
    add("--block", metavar="NAME", help="sweep only the weights whose names begin with NAME, such as middle_block")
    add("--out", type=Path, default=Path("outputs/evaluation"), help="folder for the results")
    add_vae_option(parser)
    add_trust_option(parser)
    return parser.parse_args()


def check_arguments(options: argparse.Namespace) -> None:
    """Raise `UserError` for the first option out of its range."""
    check_number("--timesteps", options.timesteps, least=1)
    check_number("--limit", options.limit, least=1, optional=True)
    check_number("--batch-size", options.batch_size, least=1)
    check_number("--sample", options.sample, least=0)
    check_sampling_options(options, options.sample)
    check_sweep(options)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: is a file; name a folder")


def check_sweep(options: argparse.Namespace) -> None:
    """Raise `UserError` for an option that a sweep of strengths cannot use, or that needs one."""
    if options.strengths is None:
        for name in ("subject", "block"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: belongs to --sweep-strength; give that too")
        return
    options.strengths = options.strengths or [tenths / 10 for tenths in range(1, 11)]
    for strength in options.strengths:
        check_number("--sweep-strength", strength, least=0, whole=False)
    if options.sample:
        raise UserError(f"--sample {options.sample}: a sweep samples no images; sample from a merged release")


def main() -> None:
    options = parse_arguments()
    check_arguments(options)
    with locked(options.out / LOCK, f"--out {options.out}"):  # two processes would mix their files
        evaluate(options)


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate, and write the results to the folder `options.out`."""
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.evaluation.releases import Settings
    from ldm.evaluation.samples import Sampling
    from ldm.evaluation.sets import parse_sets
    from ldm.release.configs import release_config
    from ldm.release.load import load_release, pick_device, pick_precision

    config_name, config = release_config(
        options.base, options.config, options.parameterization, trusted=options.trust_config
    )
    sets, device = parse_sets(options.sets), pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    sampling = Sampling(options.sample, options.seed, options.steps, options.scale, options.sampler)
    settings = Settings(options.timesteps, options.batch_size, options.limit, sampling if options.sample else None)
    about = {
        "base": str(options.base),
        "tuned": str(options.ckpt),
        "config": config_name,
        "settings": {
            **{name: getattr(options, name) for name in ("timesteps", "batch_size", "limit", "precision")},
            "device": str(device),
            "sampling": sampling._asdict() if options.sample else None,
        },
    }
    load = partial(load_release, config=config, device=device, dtype=dtype, vae=options.vae)
    act = compare_releases if options.strengths is None else sweep
    act(options, load, sets, settings, about)


def compare_releases(
    options: argparse.Namespace,
    load: Callable[[Path], LatentDiffusion],
    sets: dict[str, str],
    settings: Settings,
    about: dict[str, Any],
) -> None:
    """Compare the tuned release with the base."""
    from ldm.checkpoint import encoder_digests
    from ldm.evaluation.plots import write_figure
    from ldm.evaluation.releases import evaluate_releases
    from ldm.evaluation.report import format_table, summarise_results, write_json
    from ldm.release.opening import open_release

    # Read both releases before the evaluation, so that a wrong name or a set of other encoders is refused at once.
    encoders = {path: encoder_digests(open_release(path, options.vae).weights) for path in (options.base, options.ckpt)}
    rows = summarise_results(evaluate_releases(load, options.base, options.ckpt, sets, settings, encoders))
    write_json(rows, about, options.out / "evaluation.json")
    write_figure(
        rows, f"{options.ckpt.name} compared with its base {options.base.name}", options.out / "evaluation.png"
    )
    logger.info("\n%s\n\nwrote evaluation.json and evaluation.png to %s", Lines(format_table(rows)), options.out)


def sweep(
    options: argparse.Namespace,
    load: Callable[[Path], LatentDiffusion],
    sets: dict[str, str],
    settings: Settings,
    about: dict[str, Any],
) -> None:
    """Evaluate the weights between base and tuned at several strengths."""
    from ldm.evaluation.front import draw_strengths, format_strengths, write_strengths
    from ldm.release.strength_sweep import sweep_strengths

    subjects = options.subject or list(sets)[:1]
    for subject in subjects:
        check_choice("--subject", subject, list(sets))
    if not set(sets) - set(subjects):
        raise UserError(f"--set {options.sets[-1]}: a sweep needs a further set, whose drift it measures")
    files = options.base, options.ckpt
    swept = list(sweep_strengths(*files, load, options.strengths, sets, settings, options.block, options.vae))
    about["settings"]["block"] = options.block
    write_strengths(swept, subjects, about, options.out / "strengths.json")
    title = f"from {options.base.name} to {options.ckpt.name}" + (f", {options.block}" if options.block else "")
    draw_strengths(swept, subjects, title, options.out / "strengths.png")
    table = Lines(format_strengths(swept, subjects))
    logger.info("\n%s\n\nwrote strengths.json and strengths.png to %s", table, options.out)


if __name__ == "__main__":
    run(main)
