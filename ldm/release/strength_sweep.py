"""Sweep of the strength α of a fine-tuning: loss and drift of θ = θ₀ + α (θ_tuned − θ₀) on sets of shards.

Interpolation of the weights often keeps most of what was learnt and forgets less (WiSE-FT, arXiv:2109.01903).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ldm.checkpoint import SCHEDULE_KEYS, computed, encoder_digests
from ldm.checkpoint.keys import EMA, has_part
from ldm.evaluation.front import AtStrength
from ldm.evaluation.releases import Settings, evaluate_base, evaluate_tuned
from ldm.evaluation.report import summarise_results
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.release.mixture import Recipe, check_same_model, mix
from ldm.release.opening import Release, open_release


def sweep_strengths(
    base: Path,
    tuned: Path,
    load: Callable[[Path], LatentDiffusion],
    strengths: Sequence[float],
    sets: Mapping[str, str],
    settings: Settings,
    block: str | None = None,
    vae: Path | None = None,
) -> Iterator[AtStrength]:
    """Yield the results on `sets` at each of `strengths`. One model is in memory; the releases are memory-mapped.

    Args:
        load: function that loads a release for inference.
        block: beginning of the names of the weights whose strength is swept; the others keep strength 1.
            None sweeps all weights.
        vae: file that `load` takes the autoencoder from.

    Raises:
        UserError: a file or a set cannot be used, the releases are not of one model, or `block` begins no name.
    """
    releases = [open_release(path, vae) for path in (base, tuned)]
    check_same_model(*releases)
    digests = {release.path: encoder_digests(release.weights) for release in releases}
    model = load(base)
    results = evaluate_base(model, base, sets, settings, digests)
    for strength in strengths:
        set_strength(model, releases, strength, block)
        yield AtStrength(strength, summarise_results(evaluate_tuned(model, tuned, results, settings)))


@torch.no_grad()
def set_strength(model: LatentDiffusion, releases: Sequence[Release], strength: float, block: str | None) -> None:
    """Replace the weights of `model` by those between the two `releases`, `strength` of the way from the first."""
    recipe = Recipe("sum", [strength]) if block is None else Recipe("sum", [1.0], {block: [strength]})
    mixed = mix(releases, recipe)
    for key, own in model.state_dict().items():
        if key in mixed and key not in SCHEDULE_KEYS:
            own.copy_(computed(mixed[key]))
    if model.use_ema and not has_part(mixed, EMA):
        model.restart_ema()
