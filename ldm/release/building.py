"""Building modules whose weights come from a file, without spending time or memory on random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _WithoutInitialisation(TorchFunctionMode):
    """Makes the functions of `torch.nn.init` do nothing, and with `on_meta` gives `torch.empty` no memory."""

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
    """Modules built within have arbitrary weights: for modules whose every weight is loaded next.

    With `on_meta` the weights, which layers make with `torch.empty`, are on the meta device; buffers have their values.
    """
    with _WithoutInitialisation(on_meta):
        yield
