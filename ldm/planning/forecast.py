"""Forecasts of `peak_of_step`, made in a separate process while data and weights load, and cached on disk.

A forecast takes several CPU seconds. The name of a cached file is a digest of the config, the library versions and the
sources of `ldm`, so a change of any of these leads to a new forecast. The cache folder is `latent-finetune/forecasts`
below `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.load import plain
from ldm.files import atomic_write, read_at_most

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("torch", "pytorch-lightning", "torchao", "transformers")
_MOST_BYTES = 1 << 20  # maximum size of a cached file


def forecast(config: DictConfig, images: int | None = None) -> dict[str, int]:
    """Return `peak_of_step(config, images)`, from the cache if possible.

    Raises:
        UserError: see `Simulation.memory`.
    """
    path = _folder() / f"{_digest(config, images)}.json"
    found = _read(path)
    if found is None:
        from ldm.planning.step import peak_of_step

        found = peak_of_step(config, images)
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(found))
        except OSError as error:  # a full or read-only disk
            log.debug("The forecast is not cached: %s", error)
    return found


def start_forecast(config: DictConfig) -> subprocess.Popen | None:
    """Start a process that writes the forecast of `config` to the cache; return None if it is cached already.

    The process writes only its file in the cache. It may outlive a run that ends early.
    """
    if _read(_folder() / f"{_digest(config, None)}.json") is not None:
        return None
    process = subprocess.Popen(
        [sys.executable, "-c", "from ldm.planning.forecast import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])},
        text=True,
    )
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(json.dumps(plain(config)))
    return process


def main() -> None:
    """Make the forecast of the config on standard input, which the parent process has checked and written as JSON."""
    forecast(OmegaConf.create(json.load(sys.stdin)))


def _folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latent-finetune" / "forecasts"
    except RuntimeError:  # a user without a home folder: nothing can be cached
        return Path(os.devnull)


def _read(path: Path) -> dict[str, int] | None:
    """Return the forecast at `path`; None if the file is missing or not a forecast."""
    try:
        found = json.loads(read_at_most(path, _MOST_BYTES))
    except (OSError, ValueError):  # `UserError` is a ValueError
        return None
    is_forecast = isinstance(found, dict) and all(isinstance(size, int) for size in found.values())
    return found if is_forecast and found else None


def _digest(config: DictConfig, images: int | None) -> str:
    """Return the SHA-256, in hex, of everything that determines a forecast."""
    sections = plain(config)
    used = {name: sections.get(name) for name in ("model", "data", "lightning")}
    content = json.dumps([used, images, list(_versions()), _sources()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _versions() -> Iterator[tuple[str, Any]]:
    """Yield each library with its version, None if it is not installed."""
    for name in _LIBRARIES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, None


@cache
def _sources() -> str:
    """Return the SHA-256 of the package's sources, which change during development without a new version."""
    hashed = hashlib.sha256()
    for path in sorted((_ROOT / "ldm").rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()
