"""Fake device `gpu:0`: tensors with shapes, dtypes and devices as on a GPU, without values.

Tensors on it are fake ones of a backend that torch lets Python register, and backward passes work. What a GPU would
refuse is refused: tensors of two devices in one operation, numpy on the device's, a generator of another device. And
what would make the host wait for the GPU is noted. A process that has it cannot lose it: for processes of their own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.backend_registration as registration
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cpu")  # until `install` has run
_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
_COPIES = ("aten::_to_copy", "aten::copy_")


class _Backend(registration._DummyBackendModule):
    """Further functions of a backend, which checkpointing and autocast call."""

    class device:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.empty(16, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None: ...


class _Generator(torch.Generator):
    """Generator with a device, which samples nothing."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device


def install() -> None:
    """Register the device, and patch the functions of torch that do not know it."""
    global GPU
    registration._setup_privateuseone_for_python_backend("gpu", backend_module=_Backend())
    GPU = torch.device("gpu", 0)
    torch.Generator, torch.tensor, torch.from_numpy = _Generator, _tensor, _from_numpy
    torch.compile = lambda function, **_: function
    nn.Module._apply = _apply


_real_tensor = torch.tensor


def _tensor(data: Any, **kwargs: Any) -> Tensor:
    device = torch.device(kwargs.pop("device", None) or "cpu")
    if device.type == "cpu":
        return _real_tensor(data, **kwargs)
    dtype = kwargs.get("dtype") or torch.as_tensor(np.asarray(data)).dtype
    return torch.empty(np.shape(data), dtype=dtype).to(device)  # the host's copy crosses over, and is waited for


def _from_numpy(array: np.ndarray) -> Tensor:
    return torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)))


def _apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """Replace `Module._apply`, because torch's own cannot exchange fake tensors."""
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                applied = function(_fake(parameter))
            self._parameters[name] = nn.Parameter(applied, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(_fake(buffer))
    return self


def _fake(tensor: Tensor) -> Tensor:
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return tensor if mode is None or isinstance(tensor, FakeTensor) else mode.from_tensor(tensor.detach())


def place(module: nn.Module) -> None:
    """Move `module` to the fake GPU; tensors that stay on the host become fake there."""
    module.to(GPU)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                part._parameters[name] = nn.Parameter(_fake(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _fake(buffer)


class _Values(TorchFunctionMode):
    """Mode that gives host tensors values if they are read, and checks generators."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.numpy:
            assert args[0].device.type == "cpu", "numpy of a tensor on the device"
            return np.linspace(0.9, 0.1, args[0].numel()).reshape(args[0].shape).astype(str(args[0].dtype)[6:])
        if func in (Tensor.__bool__, Tensor.item) and args[0].device.type == "cpu":
            return True if func is Tensor.__bool__ else 1.0
        generator = kwargs.pop("generator", None)
        if generator is not None:
            where = torch.device(kwargs.get("device") or "cpu")
            assert generator.device.type == where.type, f"a generator on {generator.device} for numbers on {where}"
        return func(*args, **kwargs)


class Waits(TorchDispatchMode):
    """Mode that records where the host waits for the device: blocking copies and reads of values."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        before = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if name in _READS and before == {"gpu"}:
            self._note(name)
            if name == "aten::_local_scalar_dense":
                return 1
        result = func(*args, **kwargs)
        after = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        blocks = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
        if name in _COPIES and len(before | after) > 1 and blocks:
            self._note(name)
        return result

    def _note(self, name: str) -> None:
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT / "ldm"))]
        place = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "elsewhere"
        self.places.append(f"{place} ({name})")


@contextmanager
def pretending() -> Iterator[Waits]:
    """Run with fake tensors, and with backward passes in the calling thread, which fake tensors require."""
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with FakeTensorMode(allow_non_fake_inputs=True), _Values(), Waits() as waits, one_thread:
        yield waits
