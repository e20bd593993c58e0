"""Config of a released checkpoint: given by name, or chosen by the checkpoint's family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.checkpoint import open_checkpoint, weights_of
from ldm.checkpoint.causes import is_lora, other_kind
from ldm.checkpoint.keys import EMA, MODEL, ZERO_SNR, has_part
from ldm.checkpoint.markers import marked_parameterization
from ldm.checkpoint.names import in_our_names
from ldm.checkpoint.other_models import other_architecture
from ldm.config.load import load_config
from ldm.config.merge import merge_configs
from ldm.release.families import Family
from ldm.release.recognition import Shapes, log_family, recognise, shapes_of
from ldm.util import UserError, refuse_if

_PARAMETERIZATION, _ZERO_SNR = "parameterization", "rescale_betas_zero_snr"  # in model.params


@dataclass(frozen=True)
class Chosen:
    """A config, the files that it was read from, and the values that a checkpoint or a person changed in it."""

    names: list[str]
    overrides: list[str]
    config: DictConfig

    @property
    def prediction(self) -> str:
        """Prediction of the UNet, in the terms of the config."""
        return _params(self.config).get(_PARAMETERIZATION, "eps")

    def as_typed(self) -> str:
        """Return the files and the values as arguments of `--base`."""
        return " ".join([*self.names, *self.overrides])


def family_of(
    ckpt: str | Path, parameterization: str | None = None, size: int | None = None, option: str = "--config"
) -> Family:
    """Return the family of the checkpoint at `ckpt`, and log it; see `recognise`.

    Raises:
        UserError: the file cannot be read, or no family matches it.
    """
    shapes, predicts = _read(ckpt)
    asked = {"parameterization": parameterization or predicts, "size": size}
    return recognise(shapes, source=str(ckpt), option=option, **asked)


def release_config(
    ckpt: str | Path,
    given: str | Path | None = None,
    parameterization: str | None = None,
    size: int | None = None,
    trusted: bool = False,
    option: str = "--config",
) -> tuple[str, DictConfig]:
    """Return the name and the content of the config `given`, or else of the release config of `ckpt`'s family.

    `parameterization` takes precedence over that of the config. If both lack a prediction type, the marker keys of the
    checkpoint determine it. `trusted` is passed to `load_config`, `option` to `recognise`.

    Raises:
        UserError: a file is missing or invalid, or no config is given and no family matches the checkpoint.
    """
    if given is not None:
        config = load_config([given], trusted=trusted)
        return str(given), _marked(Chosen([str(given)], [], config), ckpt, *_read(ckpt), parameterization).config
    family = family_of(ckpt, parameterization, size, option)
    return family.config, load_config([family.config], family.overrides)


def training_config(
    ckpt: str | Path,
    given: Sequence[str | Path] = (),
    parameterization: str | None = None,
    trusted: bool = False,
    size: int | None = None,
) -> Chosen:
    """Return the configs `given`, merged left to right, or else the finetune config of `ckpt`'s family.

    The arguments are those of `release_config`.

    Raises:
        UserError: as `release_config`, or the config and the checkpoint's markers tell different predictions.
    """
    if given:
        chosen = Chosen([str(name) for name in given], [], load_config(given, trusted=trusted))
        shapes, predicts = _read(ckpt)
        chosen = _marked(chosen, ckpt, shapes, predicts, parameterization)
        check_prediction(chosen.prediction, parameterization or predicts, ckpt)
        return chosen
    shapes, predicts = _read(ckpt)
    asked = {"parameterization": parameterization or predicts, "size": size}
    family = recognise(shapes, source=str(ckpt), option="--base", **asked)
    config = load_config([family.finetune_config], family.overrides)
    return Chosen([family.finetune_config], family.overrides, config)


def check_prediction(trained: str | None, released: str | None, release: str | Path) -> None:
    """Raise `UserError` if a training does not predict what the file `release` does, as far as both are known."""
    refuse_if(
        None not in (trained, released) and trained != released,
        f"{release}: predicts {released}, but the training's parameterization is {trained}; train with "
        f"model.params.parameterization={released}, or give --parameterization {trained} to train it so nonetheless",
    )


def _marked(
    given: Chosen, ckpt: str | Path, shapes: Shapes, predicts: str | None, parameterization: str | None
) -> Chosen:
    """Return the config `given` with the prediction that `release_config` describes, and log the family of `ckpt`."""
    params, wanted, overrides = _params(given.config), parameterization, []
    if wanted is None and _PARAMETERIZATION not in params:
        wanted = predicts
    if wanted is not None:
        overrides.append(f"model.params.{_PARAMETERIZATION}={wanted}")
    if wanted == "v" and ZERO_SNR in shapes and _ZERO_SNR not in params:
        overrides.append(f"model.params.{_ZERO_SNR}=true")
    config = merge_configs(given.config, load_config([], overrides), trusted=True) if overrides else given.config
    chosen = Chosen(given.names, overrides, config)
    log_family(shapes, ckpt, chosen.prediction)
    return chosen


def _params(config: DictConfig) -> Mapping[str, Any]:
    return (config.get("model") or {}).get("params") or {}


def _read(ckpt: str | Path) -> tuple[Shapes, str | None]:
    """Return the shapes of the values in `ckpt`, and what its UNet predicts as far as it tells."""
    opened = open_checkpoint(ckpt)
    named = in_our_names(weights_of(opened.content, ckpt))
    shapes = shapes_of(named.with_carried())
    has_unet = any(has_part(named.weights, part) for part in (MODEL, EMA)) and not is_lora(named.file)
    found = other_architecture(named.file) or (None if has_unet else other_kind(named.file))
    if found:  # no config would help
        raise UserError(f"{ckpt}: {found}")
    return shapes, marked_parameterization(shapes, opened.metadata)
