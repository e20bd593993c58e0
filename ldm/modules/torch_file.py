"""Reader of the files of `torch.save` that the params of a network name; `ldm.checkpoint`, above, reads checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ldm.util import UserError

T = TypeVar("T")


def read_torch_file(path: str, build: Callable[[Any], T], fault: str) -> T:
    """Return `build` of the content of the file at `path`, which is read on the CPU without running code.

    Raises:
        UserError: the file cannot be read, or `build` fails. The message is `fault` with the reason.
    """
    try:
        return build(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"{fault} ({reason})") from error
