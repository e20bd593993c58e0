"""Config of a released checkpoint: given by name, or chosen by the checkpoint's family."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from ldm.checkpoint import open_checkpoint, weights_of
from ldm.checkpoint.names import in_our_names
from ldm.config.load import load_config
from ldm.release.families import Family, recognise, shapes_of


def family_of(ckpt: str | Path, parameterization: str | None = None, size: int | None = None) -> Family:
    """Return the family of the checkpoint at `ckpt`, and log it; see `recognise`.

    Raises:
        UserError: the file cannot be read, or no family matches it.
    """
    named = in_our_names(weights_of(open_checkpoint(ckpt).content, ckpt))
    shapes = shapes_of({**named.weights, **{key: named.file[key] for key in named.carried}})
    return recognise(shapes, source=str(ckpt), parameterization=parameterization, size=size)


def release_config(
    ckpt: str | Path,
    given: str | Path | None = None,
    parameterization: str | None = None,
    size: int | None = None,
    trusted: bool = False,
) -> tuple[str, DictConfig]:
    """Return the name and the content of the config `given`, or else of the release config of `ckpt`'s family.

    `parameterization` takes precedence over that of the config. `trusted` is passed to `load_config`.

    Raises:
        UserError: a file is missing or invalid, or no config is given and no family matches the checkpoint.
    """
    if given is None:
        family = family_of(ckpt, parameterization, size)
        return family.config, load_config([family.config], family.overrides)
    overrides = [] if parameterization is None else [f"model.params.parameterization={parameterization}"]
    return str(given), load_config([given], overrides, trusted)
