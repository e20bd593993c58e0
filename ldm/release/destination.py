"""Writing of releases: to a file, or to a folder in the layout of diffusers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import Pending, check_suffix, save_state_dict
from ldm.checkpoint.markers import with_markers
from ldm.locks import locked_file
from ldm.release.diffusers_writing import check_folder, write_folder
from ldm.release.model_spec import described
from ldm.release.opening import Release, check_not_replaced
from ldm.release.recognition import find_family
from ldm.util import refuse_if

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """Place to write a release to.

    Args:
        is_folder: True for a folder in the layout of diffusers.
        config: config of the release, for the folder's configs; None takes that of its family.
    """

    path: Path
    is_folder: bool = False
    config: Path | None = None

    @classmethod
    def of(cls, out: str | Path, config: Path | None = None) -> Destination:
        """Return the destination that `out` names: a folder if it is one, or ends with a slash.

        Raises:
            UserError: a `config` is given for a file.
        """
        path = Path(out)
        is_folder = path.is_dir() or str(out).endswith("/")
        refuse_if(
            config is not None and not is_folder,
            f"--config {config}: is for a folder of diffusers, and {out} is a file; leave it out",
        )
        return cls(path, is_folder, config)

    @contextmanager
    def locked(self, inputs: Iterable[Path]) -> Iterator[None]:
        """Hold the lock of the destination.

        Raises:
            UserError: the name is none of a release, or writing would replace one of the files `inputs`.
        """
        if self.is_folder:
            check_folder(self.path)
        else:
            check_suffix(self.path)
        check_not_replaced(self.path, inputs)
        with locked_file(self.path):
            yield


@dataclass(frozen=True)
class About:
    """Facts about a release to write.

    Args:
        predicts: prediction of the UNet and zero SNR, if they differ from what the release tells.
        noted: prediction of the UNet that the training notes, for a release that tells none.
        merged_from: titles of the files that were mixed.
        settings: those of the training.
        captions: metadata of `record_of`; None keeps those of the release.
    """

    predicts: tuple[str, bool] | None = None
    noted: str | None = None
    merged_from: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    captions: Mapping[str, str] | None = None


def save_release(
    release: Release, weights: Mapping[str, torch.Tensor | Pending], to: Destination, about: About | None = None
) -> None:
    """Write `weights` of the model of `release`, under this package's names, to the destination `to`, and log it.

    A file has the names, the order and the unused values of the release's file.

    Raises:
        UserError: a value cannot be computed, or the destination cannot hold the release. Nothing is written then.
    """
    about = about or About()
    predicts = about.predicts[0] if about.predicts else release.predicts or about.noted
    family = find_family(release.shapes, parameterization=predicts, certain=True)
    keys = release.weights
    told = predicts, about.merged_from, about.settings, to.is_folder, about.captions
    metadata = described(release.metadata, to.path, keys, family, *told)
    if to.is_folder:
        count = write_folder(release, weights, to.path, metadata, family, about.predicts, to.config)
        size = sum(path.stat().st_size for path in to.path.rglob("*") if path.is_file())
    else:
        content = release.named.restored(weights)
        if about.predicts is not None:
            content = _marked(content, *about.predicts)
        save_state_dict(content, to.path, metadata=metadata)
        count, size = len(content), to.path.stat().st_size
    log.info("wrote %s (%.2f GB, %d values)", to.path, size / 1e9, count)


def _marked(content: dict, predicts: str, zero_snr: bool) -> dict:
    """Return `content` with the markers of a prediction, and log the changes."""
    marked = with_markers(content, predicts, zero_snr)
    for change, those in (("added", marked.keys() - content.keys()), ("left out", content.keys() - marked.keys())):
        if those:
            log.info("marker %s %s: the training predicts %s", " and ".join(sorted(those)), change, predicts)
    return marked
