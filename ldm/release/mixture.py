"""Mixtures of releases, weight by weight: weighted sums, sums with a difference, and spherical interpolation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import (
    SCHEDULE_KEYS,
    Pending,
    converted,
    ema_key,
    in_memory,
    is_finite,
    is_optional,
    same_values,
)
from ldm.checkpoint.formats import precise_dtype
from ldm.checkpoint.keys import EMA, EMA_COUNTERS, MODEL, PREDICTION_MARKERS, UNET, has_part
from ldm.release.destination import About, Destination, save_release
from ldm.release.model_spec import title_of
from ldm.release.opening import Release, open_release
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)

_PARALLEL = 1e-6  # sine of an angle below which the spherical formula loses its precision


def weighted_sum(values: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    """Return (1 − Σ αᵢ) A + Σ αᵢ Xᵢ of the `values` A, X₁, X₂, … It is exact where one factor is 1."""
    first, *others = values
    result = (1 - sum(alphas)) * first
    for other, alpha in zip(others, alphas, strict=True):
        result = result + alpha * other
    return result


def added_difference(values: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    """Return A + α (B − C) of the `values` A, B, C."""
    first, second, third = values
    return first + alphas[0] * (second - third)


def slerp(values: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    """Return (sin((1 − α) θ) A + sin(α θ) B) / sin θ of the `values` A, B with the angle θ (Shoemake 1985, §3.3).

    Parallel, opposite and zero tensors have no such path. They give the weighted sum.
    """
    first, second = values
    unit, other = (value.double() / value.double().norm() for value in values)
    theta = torch.acos((unit * other).sum().clamp(-1, 1))
    sine = theta.sin()
    if not sine > _PARALLEL:
        return weighted_sum(values, alphas)
    near, far = (torch.sin(share * theta) / sine for share in (1 - alphas[0], alphas[0]))
    return near.to(first.dtype) * first + far.to(second.dtype) * second


@dataclass(frozen=True)
class Method:
    """Formula of a mixture, with the numbers of files that it takes. `mix` takes the values and one α or more."""

    mix: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    least: int
    most: int | None = None  # files; None for any number

    def alphas(self, files: int) -> int:
        """Return the number of α for this number of files."""
        return files - 1 if self.most is None else 1


METHODS = {
    "sum": Method(weighted_sum, least=2),
    "add-difference": Method(added_difference, least=3, most=3),
    "slerp": Method(slerp, least=2, most=2),
}


@dataclass(frozen=True)
class Recipe:
    """Method of a mixture, its α, and other α for the keys that begin with a name in `blocks`."""

    method: str
    alphas: Sequence[float]
    blocks: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def block_of(self, key: str) -> str | None:
        """Return the longest name in `blocks` that begins `key`. Names below the UNet may lack its prefix."""
        return max((name for name in self.blocks if _begins(key, name)), key=len, default=None)

    def alphas_of(self, key: str) -> Sequence[float]:
        block = self.block_of(key)
        return self.alphas if block is None else self.blocks[block]


def mix_files(paths: Sequence[Path], out: str | Path | Destination, recipe: Recipe) -> None:
    """Write the mixture of the releases `paths` to `out`, a file or a folder, with the names and dtypes of the first.

    Weights that the files share are kept bit for bit, as are the noise schedule and the values that no model uses.

    Raises:
        UserError: a file cannot be read, the files are not of one model, or a block matches no weight. Nothing is
            written in this case.
    """
    to = out if isinstance(out, Destination) else Destination.of(out)
    with to.locked(paths):
        releases = [open_release(path) for path in paths]
        first = releases[0]
        for other in releases[1:]:
            check_same_model(first, other)
        mixed = tuple(title_of(release.metadata, release.path) for release in releases)
        noted = next((release.predicts for release in releases if release.predicts is not None), None)
        save_release(first, mix(releases, recipe), to, About(noted=noted, merged_from=mixed))


def mix(releases: Sequence[Release], recipe: Recipe) -> dict[str, Tensor | Pending]:
    """Return the mixture of `releases`, which are of one model, under the keys of the first.

    EMA weights are left out unless all of the releases have them.
    """
    first = releases[0].weights
    shadows = {ema_key(key): key for key in first if key.startswith(MODEL)}
    _check_blocks(recipe, [key for key in first if not key.startswith(EMA)])
    without = [release.path for release in releases if not has_part(release.weights, EMA)]
    if has_part(first, EMA) and without:
        log.info("EMA weights of %s left out: %s has none", releases[0].path, without[0])
    result: dict[str, Tensor | Pending] = {}
    mixed = 0
    for key, value in first.items():
        if key.startswith(EMA) and without:
            continue
        kept = key in SCHEDULE_KEYS or key in EMA_COUNTERS or not value.is_floating_point()
        values = [release.weights[key] for release in releases if key in release.weights]
        if kept or len(values) < len(releases):
            result[key] = value
            continue
        result[key] = _mixed(key, values, recipe.method, recipe.alphas_of(shadows.get(key, key)))
        mixed += 1
    log.info("%s of %d files: %d weights, %d values kept", recipe.method, len(releases), mixed, len(result) - mixed)
    return result


def check_same_model(first: Release, other: Release) -> None:
    """Raise `UserError` unless both have floating-point weights of the same keys and shapes, and the same markers."""
    cause = "are they releases of one model?"
    for one, two in ((first, other), (other, first)):
        for key, value in one.weights.items():
            refuse_if(
                not (value.is_floating_point() or is_optional(key)),
                f"{one.path}: {key} is {value.dtype}; dequantise it and save it as floating-point numbers",
            )
            if key not in two.weights:
                refuse_if(not is_optional(key), f"{two.path}: lacks {key}, which {one.path} has; {cause}")
            elif value.shape != two.weights[key].shape and key not in SCHEDULE_KEYS:
                shapes = f"{tuple(two.weights[key].shape)}, but {tuple(value.shape)} in {one.path}"
                raise UserError(f"{two.path}: {key} has shape {shapes}; {cause}")
        refuse_if(
            None not in (one.predicts, two.predicts) and one.predicts != two.predicts,
            f"{two.path}: predicts {two.predicts}, and {one.path} {one.predicts}; take releases with the same "
            "prediction",
        )
        for marker in PREDICTION_MARKERS:
            refuse_if(
                marker in one.named.file and marker not in two.named.file,
                f"{two.path}: lacks the marker {marker}, which {one.path} has: one predicts v or has zero terminal "
                "SNR, the other does not; take releases with the same prediction",
            )


def _mixed(key: str, values: Sequence[Tensor], method: str, alphas: Sequence[float]) -> Pending:
    """Return the mixture of `values`, computed when it is written, in the dtype of the first."""
    first = values[0]

    def compute() -> Tensor:
        unchanged = in_memory(first)
        precise = precise_dtype(first.dtype)
        read = [converted(in_memory(value), precise) for value in values]
        differing = read[1:] if method == "add-difference" else read
        if not any(alphas) or all(same_values(value, differing[0]) for value in differing[1:]):
            return unchanged
        result = converted(METHODS[method].mix(read, alphas), first.dtype)
        refuse_if(
            not is_finite(result),
            f"{key}: the mixture is not finite in {first.dtype}; use smaller weights, or other files",
        )
        return result

    return Pending(tuple(first.shape), first.dtype, compute)


def _begins(key: str, name: str) -> bool:
    return any(f"{key}.".startswith(f"{prefix}{name}.") for prefix in ("", UNET))


def _check_blocks(recipe: Recipe, keys: Sequence[str]) -> None:
    for name in recipe.blocks:
        refuse_if(
            not any(_begins(key, name) for key in keys),
            f"--block {name}: no weight begins with it; name a part such as input_blocks.4, middle_block or "
            "first_stage_model",
        )
