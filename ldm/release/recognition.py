"""Recognition of a checkpoint's family from its keys and shapes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.checkpoint.causes import other_kind
from ldm.checkpoint.keys import TEXT_ENCODERS, UNET, ZERO_SNR, has_part, with_ema_as_weights
from ldm.checkpoint.markers import check_markers, marked_parameterization
from ldm.release.families import DISTINGUISHING, FAMILIES, FIRST, PARAMETERIZATIONS, Family, Shape
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int]]
Difference = tuple[Shape | None, Shape | None]  # shape in the file, and in the family; None if the key is missing

_SHOWN = 3  # number of keys in a message


def shapes_of(weights: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape of each value that has one, by key."""
    return {key: tuple(value.shape) for key, value in weights.items() if hasattr(value, "shape")}


def recognise(
    shapes: Shapes,
    *,
    source: str = "the checkpoint",
    parameterization: str | None = None,
    size: int | None = None,
    option: str = "--config",
) -> Family:
    """Return the family of a checkpoint whose keys have these `shapes`, and log it in one line; see `find_family`.

    Args:
        source: name of the checkpoint in messages.
        option: command-line option that names a config, for messages.

    Raises:
        UserError: as `find_family`, or no family has these keys and shapes. The message names another kind of file, or
            the nearest family and the keys that differ.
    """
    family = find_family(shapes, source=source, parameterization=parameterization, size=size)
    if family is None:
        kind = other_kind(shapes)
        refuse_if(kind is not None, f"{source}: {kind}")
        differing = _differences(_by_whole_keys(shapes))
        nearest = min(FAMILIES.values(), key=lambda other: _distance(differing[other.key]))
        raise UserError(
            f"{source}: no family matches these weights; the nearest is {nearest.name}, which differs in "
            f"{_listed(differing[nearest.key])}; name a matching config with {option}"
        )
    log.info("%s: %s%s", source, family.described(), _alternative(family, shapes, parameterization))
    return family


def find_family(
    shapes: Shapes,
    *,
    source: str = "the checkpoint",
    parameterization: str | None = None,
    size: int | None = None,
    certain: bool = False,
) -> Family | None:
    """Return the family of a checkpoint whose keys have these `shapes`, or None.

    All keys may have one additional prefix. A UNet alone, EMA weights alone, and a model without text encoders are
    recognised as well.

    Families that differ only in parameterization have the same keys. `parameterization` selects among them first, then
    the marker keys of v-prediction, then the image size nearest to `size`. Without any of these, the result is the
    family with the largest images. The marker key `ztsnr` also selects zero terminal SNR.

    Args:
        source: name of the checkpoint in messages.
        parameterization: prediction of the UNet, `eps` or `v`.
        size: side in pixels of the images to sample or to train on.
        certain: return None if several families have these keys and nothing tells the prediction.

    Raises:
        UserError: `parameterization` is neither `eps` nor `v`, or a marker stands for another kind of noise schedule.
    """
    refuse_if(
        parameterization not in (None, *PARAMETERIZATIONS),
        f"parameterization {parameterization!r}: choose {' or '.join(PARAMETERIZATIONS)}",
    )
    check_markers(shapes, source)
    matching = _matching(shapes)
    if not matching:
        return None
    wanted = parameterization or marked_parameterization(shapes)
    if wanted is not None:
        chosen = next((family for family in matching if family.parameterization == wanted), matching[0])
    elif certain and len(matching) > 1:
        return None
    else:
        chosen = matching[0] if size is None else min(matching, key=lambda family: abs(family.size - size))
        wanted = chosen.parameterization
    predicts = {"parameterization": wanted, "zero_snr": wanted == "v" and ZERO_SNR in shapes}
    found = replace(chosen, **predicts)
    return chosen if found == chosen else found


def log_family(shapes: Shapes, source: str | Path, parameterization: str | None) -> Family | None:
    """Log the family of a checkpoint with these `shapes`, or nothing if it has none, and return it.

    `parameterization` is what it is known to predict; families predict `eps` or `v`.
    """
    if parameterization not in (None, *PARAMETERIZATIONS):
        return None
    family = find_family(shapes, source=str(source), parameterization=parameterization)
    if family is not None:
        log.info("%s: %s", source, family.described())
    return family


def warn_of_new_prediction(shapes: Shapes, source: str | Path, parameterization: str | None) -> None:
    """Warn if v is to be trained from a checkpoint that predicts ε in every family with these `shapes`."""
    families = _matching(shapes)
    predicts_eps = families and {family.parameterization for family in families} == {"eps"}
    if parameterization == "v" and predicts_eps and marked_parameterization(shapes) != "v":
        log.warning(
            "%s: predicts eps, but parameterization is v; the model learns another prediction first, so expect noise "
            "as samples for thousands of steps, or leave parameterization out",
            source,
        )


def check_same_family(release: Shapes, training: Shapes, source: str | Path) -> None:
    """Raise `UserError` if the shapes of `release` and `training` belong to two families.

    `source` names the release in the message.
    """
    theirs, ours = _matching(release), _matching(training)
    if theirs and ours and not {family.key for family in theirs} & {family.key for family in ours}:
        raise UserError(
            f"{source}: is {_named(theirs)}, the training is of {_named(ours)}; name the release that it started from, "
            f"or make a training checkpoint of this one with tools/hack_weights.py --base {theirs[0].finetune_config}"
        )


def _named(families: Sequence[Family]) -> str:
    return " or ".join(family.name for family in families)


def _matching(shapes: Shapes) -> list[Family]:
    differing = _differences(_by_whole_keys(shapes))
    return [family for family in FAMILIES.values() if not differing[family.key]]


def _alternative(family: Family, shapes: Shapes, parameterization: str | None) -> str:
    """Return the end of a log line that names the families with the same keys, unless the prediction is certain."""
    others = [other for other in _matching(shapes) if other.key != family.key]
    if not others or parameterization is not None or marked_parameterization(shapes) is not None:
        return ""
    names = " and ".join(other.described() for other in others)
    return f"; for {names}, which has the same keys, give --parameterization {others[0].parameterization}"


def _by_whole_keys(shapes: Shapes) -> dict[str, Sequence[int]]:
    """Return `shapes` under the keys of a whole model. EMA weights replace missing weights.

    A common outer prefix is removed. The keys of a UNet alone get the prefix `model.diffusion_model.`.
    """
    firsts = [key.removesuffix(FIRST) for key in shapes if key.endswith(FIRST)]
    outer = next((prefix.removesuffix(UNET) for prefix in firsts if prefix.endswith(UNET)), None)
    alone = next((prefix for prefix in firsts if prefix in ("", UNET.split(".", 1)[1])), None)
    if outer is not None:
        return {key.removeprefix(outer): shape for key, shape in shapes.items()}
    if alone is not None:
        return {UNET + key.removeprefix(alone): shape for key, shape in shapes.items() if key.startswith(alone)}
    return with_ema_as_weights(shapes, dict.fromkeys(key for family in FAMILIES.values() for key in family.shapes))


def _differences(shapes: Shapes) -> dict[str, dict[str, Difference]]:
    """Return, for each family, the distinguishing keys at which `shapes` differ.

    Text encoders are compared only if `shapes` has any.
    """
    has_encoders = any(has_part(shapes, part) for part in TEXT_ENCODERS)
    found = {key: tuple(shape) for key, shape in shapes.items() if DISTINGUISHING.fullmatch(key)}
    result = {}
    for family in FAMILIES.values():
        expected = {key: shape for key, shape in family.shapes.items() if has_encoders or key.startswith(UNET)}
        keys = dict.fromkeys((*expected, *found))
        pairs = {key: (found.get(key), expected.get(key)) for key in keys}
        result[family.key] = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return result


def _distance(differences: Mapping[str, Difference]) -> float:
    """Return the number of differing keys. A key of another shape counts as the share of its dimensions that differ."""
    return sum(_share(found, expected) for found, expected in differences.values())


def _share(found: Shape | None, expected: Shape | None) -> float:
    if found is None or expected is None or len(found) != len(expected):
        return 1.0
    return sum(one != other for one, other in zip(found, expected, strict=True)) / len(found)


def _listed(differences: Mapping[str, Difference]) -> str:
    """Return the first differing keys and their shapes as text."""
    shown = [
        f"{key} (found {found or 'none'}, expected {expected or 'none'})"
        for key, (found, expected) in list(differences.items())[:_SHOWN]
    ]
    more = f", … ({len(differences)} keys)" if len(differences) > _SHOWN else ""
    return ", ".join(shown) + more
