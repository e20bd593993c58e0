"""Evaluation of an extracted LoRA: the base with it, beside the release that it was extracted from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ldm.checkpoint import encoder_digests
from ldm.evaluation.releases import Settings, evaluate_releases
from ldm.evaluation.report import aligned, format_interval, summarise_results
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.release.configs import release_config
from ldm.release.load import load_release
from ldm.release.lora_merging import Lora
from ldm.release.opening import open_release


def compare_with_tuned(
    base: Path,
    tuned: Path,
    lora: Path,
    shards: str,
    config: Path | None = None,
    parameterization: str | None = None,
    device: str = "cpu",
    trusted: bool = False,
) -> str:
    """Return a table of the denoising loss and the drift from `base` on `shards`, of `tuned` and of `base` with `lora`.

    The arguments from `config` on are those of `release_config` and `load_release`.

    Raises:
        UserError: a file or the set cannot be used.
    """
    _, chosen = release_config(base, config, parameterization, trusted=trusted)
    encoders = {path: encoder_digests(open_release(path).weights) for path in (base, tuned)}
    load = partial(load_release, config=chosen, device=device)

    def load_with_lora(path: Path) -> LatentDiffusion:
        return load(base, loras=[Lora(lora)] if path == lora else [])

    lines = [["", "loss", "loss / base", "drift"]]
    for name, path, loader in (("tuned", tuned, load), ("LoRA", lora, load_with_lora)):
        (row,) = summarise_results(evaluate_releases(loader, base, path, {"check": shards}, Settings(), encoders))
        overall = row.overall
        if len(lines) == 1:
            lines.append(["base", f"{overall.loss_base.value:.5f}", "1", "0"])
        shares = format_interval(overall.loss_ratio), format_interval(overall.drift)
        lines.append([name, f"{overall.loss_tuned.value:.5f}", *shares])
    return aligned(lines)
