"""Building of modules without initialising their weights, which a file then provides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _WithoutInitialisation(TorchFunctionMode):
    """Mode in which the functions of `torch.nn.init` do nothing. With `on_meta`, `torch.empty` allocates no memory."""

    def __init__(self, on_meta: bool) -> None:
        super().__init__()
        self.on_meta = on_meta

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if self.on_meta and func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def without_initialisation(on_meta: bool = False) -> Iterator[None]:
    """Leave the weights of modules built in this context uninitialised. All of them must be loaded afterwards.

    With `on_meta`, the weights are on the meta device, and buffers have their values.
    """
    with _WithoutInitialisation(on_meta):
        yield
