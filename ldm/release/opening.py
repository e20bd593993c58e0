"""Opening of releases of any program, with weights under this package's names, and with another file's autoencoder."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import SCHEDULE_KEYS, OpenCheckpoint, is_optional, open_checkpoint, weights_of
from ldm.checkpoint.autoencoders import autoencoder_of, is_autoencoder
from ldm.checkpoint.causes import NO_UNET, is_lora, other_kind
from ldm.checkpoint.diffusers_folder import INDEX, DiffusersFolder
from ldm.checkpoint.keys import EMA, FIRST_STAGE, MODEL, RELEASE, has_part, is_factor, without_factors
from ldm.checkpoint.markers import marked_parameterization
from ldm.checkpoint.names import Renamed, in_our_names
from ldm.checkpoint.other_models import other_architecture
from ldm.files import is_within
from ldm.printable import escaped
from ldm.release.recognition import Shapes, shapes_of
from ldm.shards.verify import file_sha256, files_sha256
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """Weights of a release under this package's names, their names in the file, and the file's metadata."""

    path: Path
    named: Renamed
    metadata: Mapping[str, str]
    folder: DiffusersFolder | None = None

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.named.weights

    @property
    def shapes(self) -> Shapes:
        """Shapes of all values of the file: the weights, and the values that no model uses."""
        return shapes_of(self.named.with_carried())

    @property
    def predicts(self) -> str | None:
        """Prediction of the UNet, `eps` or `v`; None if the file does not tell it."""
        return marked_parameterization(self.named.carried, self.metadata)


def open_release(path: str | Path, vae: str | Path | None = None) -> Release:
    """Open the release or training checkpoint at `path`, as `release_of` does."""
    return release_of(open_checkpoint(path), path, vae)


def release_of(
    opened: OpenCheckpoint, path: str | Path, vae: str | Path | None = None, own: Collection[str] = ()
) -> Release:
    """Return the release in the checkpoint `opened` from `path`. The file `vae`, if given, replaces its autoencoder.

    `own` are the keys of the model that will take the weights; see `in_our_names`. The renamed and the unused keys are
    logged.

    Raises:
        UserError: the file holds no UNet, or is a LoRA training, or `vae` holds no matching autoencoder.
    """
    named = in_our_names(weights_of(opened.content, path), own)
    refuse_if((found := other_architecture(named.file)), f"{path}: {found}")
    refuse_if(
        any(map(is_factor, named.file)),
        f"{path}: holds a LoRA in training beside the weights; tools/merge_release.py --train-ckpt makes a release "
        "of it, and tools/extract_lora.py --train-ckpt a LoRA file",
    )
    if is_lora(named.file) or not (has_part(named.weights, MODEL) or has_part(named.weights, EMA)):
        raise UserError(f"{path}: {other_kind(named.file) or NO_UNET}")
    _log_names(named, Path(path))
    named = named if vae is None else _with_autoencoder(named, vae)
    return Release(Path(path), named, opened.metadata, opened.folder)


def check_not_replaced(out: Path, inputs: Iterable[Path]) -> None:
    """Raise `UserError` if writing `out` would replace one of the `inputs`, or a file of one that is a folder.

    A file beside the parts of a folder of diffusers is none of its files.
    """
    for path in inputs:
        if not (out.exists() and path.exists()):
            continue
        is_beside = (path / INDEX).is_file() and path.samefile(out.parent)
        refuse_if(
            out.samefile(path) or _holds(out, path) or (_holds(path, out) and not is_beside),
            f"{out}: would replace one of the files that are read; choose another --out",
        )


def _holds(folder: Path, path: Path) -> bool:
    """Return True if `path`, or the file that it links to, lies in `folder`."""
    return folder.is_dir() and (is_within(folder, path.parent) or is_within(folder, path))


def written_dtype(key: str, dtype: torch.dtype, half: bool) -> torch.dtype:
    """Return the dtype in which a release has the value `key`: float16 with `half`, except for the noise schedule."""
    return torch.float16 if half and dtype.is_floating_point and key not in SCHEDULE_KEYS else dtype


def training_weights(content: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a training checkpoint under this package's names, followed by its unused values.

    The factors of a LoRA are left out; see `trained_loras`. An autoencoder alone is below `first_stage_model.`.
    """
    weights = without_factors(weights_of(content, path))
    if is_autoencoder(weights):
        weights = {FIRST_STAGE + key: value for key, value in weights.items()}
    named = in_our_names(weights)
    _log_names(named, path)
    return named.with_carried()


def read_autoencoder(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the autoencoder in the file at `path`, with keys below `first_stage_model.`.

    It may be a release, an autoencoder alone, or either as a folder of diffusers.

    Raises:
        UserError: the file holds no autoencoder.
    """
    weights = weights_of(open_checkpoint(path).content, path)
    try:
        weights = autoencoder_of(weights, path)
    except UserError as error:
        raise UserError(f"--vae {error}") from error
    named = in_our_names({FIRST_STAGE + key: value for key, value in weights.items()}).weights
    found = {key: value for key, value in named.items() if not is_optional(key)}
    refuse_if(
        not is_autoencoder([key.removeprefix(FIRST_STAGE) for key in found]),
        f"--vae {path}: holds no autoencoder; name a .safetensors or .ckpt file with one",
    )
    return found


def _with_autoencoder(named: Renamed, vae: str | Path) -> Renamed:
    given = read_autoencoder(vae)
    replaced = [key for key in named.weights if key.startswith(FIRST_STAGE) and not is_optional(key)]
    for key in replaced:
        refuse_if(
            key not in given, f"--vae {vae}: lacks {key}, which the release has; is it another kind of autoencoder?"
        )
        if given[key].shape != named.weights[key].shape:
            shapes = f"{tuple(given[key].shape)}, but {tuple(named.weights[key].shape)} in the release"
            raise UserError(f"--vae {vae}: {key} has shape {shapes}; is it another kind of autoencoder?")
    log.info("%s: autoencoder taken from this file, %d weights", vae, len(given))
    return replace(named, weights={**named.weights, **given})


def _log_names(named: Renamed, path: Path) -> None:
    for line in named.summary():
        log.info("%s: %s", path, line)


def digest_of(release: Release, path: Path) -> str:
    """Return the SHA-256, in hex, of the file or the folder at `path`, which holds `release`."""
    return file_sha256(path) if release.folder is None else files_sha256(release.folder.files, path)


def warn_of_other_release(training: Mapping[str, Any], release: Release, path: Path) -> None:
    """Warn if the checkpoint `training` notes that it started from another file than `release` at `path`.

    Copies of one model in other formats or dtypes also differ as files, so that this is no error.
    """
    note = training.get(RELEASE)
    name, digest = (note.get(key) for key in ("name", "sha256")) if isinstance(note, dict) else (None, None)
    if isinstance(name, str) and isinstance(digest, str) and digest != digest_of(release, path):
        log.warning(
            "%s: differs from %.200s, which the training started from; if it is another model, not a copy in another "
            "format, the result mixes both: give --release",
            path,
            escaped(name),
        )
