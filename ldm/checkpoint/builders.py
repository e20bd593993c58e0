"""Builders for the names in a pickle: tensors and plain containers. Other names are not resolved.

A builder checks types first, because printing, hashing or comparing a hostile value may not terminate.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_MOST_EXPANDED = 1 << 20  # limit of elements for a tensor that is larger than its storage


class UnreadTensor(ValueError):
    """Error for an unsupported kind of tensor. The message names the kind and a replacement."""


@dataclass(frozen=True)
class Global:
    """Name of a class or function in a pickle, such as `torch._utils._rebuild_tensor_v2`. It is never imported."""

    name: str

    def __call__(self, *args: Any) -> Any:
        """Return the result of this name's builder for `args`, or a `LeftOut` if there is no builder."""
        builder = BUILDERS.get(self.name)
        return LeftOut(self.name) if builder is None else builder(*args)


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Placeholder for an object of the class `name`, which is neither a tensor nor plain data."""

    name: str

    def __call__(self, *args: Any) -> LeftOut:
        return LeftOut(self.name)


def _strided(storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    if not all(type(number) is int for number in (offset, *_plain(size), *_plain(stride))):
        raise ValueError("a tensor whose shape is not made of integers")
    if min((offset, *size, *stride), default=0) < 0 or len(size) != len(stride):
        raise ValueError(f"a tensor of shape {tuple(size)} and strides {tuple(stride)} at {offset}")
    if math.prod(size) > max(storage.numel(), _MOST_EXPANDED):  # strides of 0 could expand a few bytes to terabytes
        raise ValueError(f"a tensor of shape {tuple(size)} in a storage of {storage.numel()}")
    end = offset + 1 + sum((side - 1) * step for side, step in zip(size, stride, strict=True)) if 0 not in size else 0
    if end > storage.numel():
        raise ValueError(f"a tensor that ends at element {end} of a storage of {storage.numel()}")
    return torch.as_strided(storage, size, stride, storage.storage_offset() + (offset if 0 not in size else 0))


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> torch.Tensor:
    tensor = _strided(storage, offset, size, stride)
    if metadata is None:
        return tensor
    if not isinstance(metadata, dict) or any(key not in ("conj", "neg") for key in keys(list(metadata))):
        raise ValueError("a tensor with unknown metadata")
    if not all(flag is True for flag in metadata.values()):
        raise ValueError("an invalid conjugate or negative view")
    if "conj" in metadata:
        tensor = tensor.conj().resolve_conj()
    if "neg" in metadata:
        tensor = -tensor
    return tensor


def _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> torch.Tensor:
    return _tensor(storage.view(dtype), offset, size, stride, metadata=metadata)


def _unread(what: str, instead: str) -> Callable[..., Any]:
    """Return a builder that refuses a kind of tensor, because dropping it would lose a weight unnoticed."""

    def refuse(*args: Any) -> Any:
        raise UnreadTensor(f"has {what}, which is not supported; save {instead} instead")

    return refuse


def _parameter(data: torch.Tensor, requires_grad: bool = True, hooks: Any = None, state: Any = None) -> torch.Tensor:
    return data


def _tensor_with_attributes(function: Global, kind: Any, args: tuple, state: Any) -> Any:
    if kind not in (Global("torch.Tensor"), Global("torch.nn.parameter.Parameter")):
        return LeftOut(getattr(kind, "name", "a tensor subclass"))
    return BUILDERS[function.name](*args)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes with an encoding other than latin1")
    return text.encode("latin1")


def _plain(items: Any = ()) -> Any:
    """Return `items` if it is a list or a tuple, else raise `ValueError`."""
    if not isinstance(items, list | tuple):
        raise ValueError(f"expected a list, found {type(items).__name__}")
    return items


def keys(items: list[Any]) -> list[Any]:
    """Return `items` if all are valid keys of a dict, else raise `ValueError`."""
    for item in items:
        for part in item if isinstance(item, tuple) else (item,):
            if not isinstance(part, _KEYS):
                raise ValueError(f"a key of type {type(part).__name__}")
    return items


def _ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    pairs = [_plain(pair) for pair in _plain(items)]
    return OrderedDict(zip(keys([key for key, _ in pairs]), [value for _, value in pairs], strict=True))


_KEYS = (str, bytes, int, float, type(None), torch.dtype, Global, LeftOut)
_COLLECTIONS: dict[str, Callable[..., Any]] = {
    "set": lambda items=(): set(keys(_plain(items))),
    "frozenset": lambda items=(): frozenset(keys(_plain(items))),
    "complex": lambda real, imaginary=0.0: complex(float(real), float(imaginary)),
}
BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _strided,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch._utils._rebuild_qtensor": _unread("a quantised tensor", "its dequantize()"),
    "torch._utils._rebuild_sparse_tensor": _unread("a sparse tensor", "its to_dense()"),
    "torch._utils._rebuild_sparse_csr_tensor": _unread("a sparse tensor", "its to_dense()"),
    "torch._utils._rebuild_nested_tensor": _unread("a nested tensor", "its to_padded_tensor(0.0)"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unread("a tensor without values (device meta)", "its values"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unread("a tensor of another device", "its cpu()"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _unread("a tensor of another device", "its cpu()"),
    "torch.Size": lambda items=(): tuple(_plain(items)),
    "torch.device": lambda kind, index=None: torch.device(kind, index) if index is not None else torch.device(kind),
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *args: {},  # items follow; the factory is dropped
    "_codecs.encode": _bytes,
    **{f"{module}.{name}": kind for module in ("builtins", "__builtin__") for name, kind in _COLLECTIONS.items()},
}
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
