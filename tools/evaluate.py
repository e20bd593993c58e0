#!/usr/bin/env python
"""Measure what fine-tuning changed: loss, drift and samples of a tuned release and its base, on sets of shards.

    python tools/evaluate.py --base data/base/emoji.safetensors --ckpt toms.safetensors \\
        --config demo_tiny_release.yaml --set 'new=shards/cats/*.tar' --set 'neighbours=shards/neighbours/*.tar' \\
        --set 'rest=shards/rest/*.tar' --sample 6 --scale 3 --out outputs/evaluation

Writes evaluation.json and evaluation.png into --out. The loss is the mean square error at fixed timesteps and noise.
The drift is ‖ε_tuned − ε_base‖² / ‖ε_base‖², the squared relative distance of the noise predictions. Brackets are 95 %
confidence intervals over images. Each model encodes the captions with its own text encoder if the config has one;
otherwise the caption embeddings stored in the shards are used. A set made by other encoders than the releases' is
refused, as in training.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

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
from ldm.util import UserError, check_number

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
    sample_help = "also sample N captions per set, from a model that takes no images"
    add("--sample", type=int, default=0, metavar="N", help=sample_help)
    add_sampling_options(parser)
    add_network_options(parser)
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
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: is a file; name a folder")


def main() -> None:
    options = parse_arguments()
    check_arguments(options)
    with locked(options.out / LOCK, f"--out {options.out}"):  # two processes would mix their files
        evaluate(options)


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate, and write the results to the folder `options.out`."""
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.checkpoint import encoder_digests
    from ldm.evaluation.plots import draw_figure
    from ldm.evaluation.releases import Settings, evaluate_releases
    from ldm.evaluation.report import format_table, summarise_results, write_json
    from ldm.evaluation.samples import Sampling
    from ldm.evaluation.sets import parse_sets
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.release.configs import release_config
    from ldm.release.load import PRECISIONS, load_release, pick_device
    from ldm.release.opening import open_release

    config_name, config = release_config(
        options.base, options.config, options.parameterization, trusted=options.trust_config
    )
    sets, device, dtype = parse_sets(options.sets), pick_device(options.device), PRECISIONS[options.precision]
    # Read both releases before the evaluation, so that a wrong name or a set of other encoders is refused at once.
    encoders = {path: encoder_digests(open_release(path, options.vae).weights) for path in (options.base, options.ckpt)}

    def load(ckpt: Path) -> LatentDiffusion:
        return load_release(ckpt, config, device, dtype, options.vae)

    sampling = Sampling(options.sample, options.seed, options.steps, options.scale, options.sampler)
    settings = Settings(options.timesteps, options.batch_size, options.limit, sampling if options.sample else None)
    rows = summarise_results(evaluate_releases(load, options.base, options.ckpt, sets, settings, encoders))
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
    write_json(rows, about, options.out / "evaluation.json")
    draw_figure(rows, f"{options.ckpt.name} compared with its base {options.base.name}", options.out / "evaluation.png")
    logger.info("\n%s\n\nwrote evaluation.json and evaluation.png to %s", Lines(format_table(rows)), options.out)


if __name__ == "__main__":
    run(main)
