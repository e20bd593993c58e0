"""A logger of a service that cannot be reached."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.loggers import Logger


class BrokenLogger(Logger):
    """Logger each of whose methods raises; with `at_once`, its construction does."""

    name, version = "broken", 0

    def __init__(self, save_dir: str, at_once: bool = False) -> None:
        super().__init__()
        if at_once:
            raise ConnectionError("api_key not configured\nrun login")

    def _raise(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("the service is down\nsee its status page")

    experiment = property(_raise)
    log_metrics = log_hyperparams = log_graph = log_image = save = finalize = after_save_checkpoint = _raise
