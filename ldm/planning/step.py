"""Memory of a training step on a CUDA device, counted with fake tensors, without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.config.load import build_model, plain
from ldm.models.diffusion.ddpm import DDPM
from ldm.modules.cpu import as_on_cuda
from ldm.modules.diffusionmodules.layers import KeepsTypes, StaysOnHost
from ldm.optim import InBackward, build_optimizer
from ldm.planning.fake_batch import has_image_data, make_batch
from ldm.planning.ledger import HOST, TEMPORARIES, Ledger, Timeline
from ldm.release.initialisation import without_initialisation
from ldm.util import UserError, nearest, refuse_if

# Lightning's `precision` → dtype of the weights, dtype of autocast.
_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "16-true": (torch.float16, None),
    "bf16-true": (torch.bfloat16, None),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}
_SHORT_PRECISIONS = {"None": "32-true", "64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step: what it allocates and frees, and bytes of `pinned` host memory besides."""

    timeline: Timeline
    pinned: int

    def peak(self) -> dict[str, int]:
        """Return the bytes per category of `ledger.CATEGORIES` at the peak, and under `ledger.HOST` the host's peak."""
        return {**self.timeline.peak(), HOST: self.timeline.host_peak() + self.pinned}

    def extended(self, other: StepMemory, times: int) -> StepMemory | None:
        """Return an estimate for a larger batch; see `Timeline.extended`."""
        timeline = self.timeline.extended(other.timeline, times)
        return None if timeline is None else replace(self, timeline=timeline)


def peak_of_step(config: DictConfig, images: int | None = None, size: int | None = None) -> dict[str, int]:
    """Return the peak of one `Simulation.memory`."""
    return Simulation(config, size).memory(images).peak()


class Simulation:
    """Training steps of a config on one device, counted with fake tensors. All batch sizes share the model if they can.

    Host memory has weights, gradients, optimizer state and first stage that stay there, and pinned memory. A step is
    the second one, because the first allocates the optimizer's state. Only tensors are counted. The CUDA context,
    library workspaces, temporaries inside a kernel and fragmentation are not; nor, on the host, are Python, the
    libraries and the data loader.

    Args:
        size: side of an image in pixels; the model's own by default.
    """

    def __init__(self, config: DictConfig, size: int | None = None) -> None:
        self._config, self._size = config, size
        trainer = plain((config.get("lightning") or {}).get("trainer") or {})
        self._weights, self._autocast = _precision(trainer.get("precision"))
        self._accumulate = trainer.get("accumulate_grad_batches") or 1
        self._mode = FakeTensorMode()
        self._training: _Training | None = None

    def memory(self, images: int | None = None) -> StepMemory:
        """Return the memory of a step with `images` images, by default `data.params.batch_size`.

        Raises:
            UserError: the config describes no diffusion model, or one of its values or the size is not valid.
        """
        if self._training is None:
            _fill_caches(self._config)
        with self._mode, _on_the_cpu():
            training = self._training or self._begun()
            batch = make_batch(training.model, self._config, images, self._size)
            timeline = training.step(batch, self._autocast, self._accumulate)
            del batch
            # A step that leaves something behind, such as buffers of streamed weights, is not one that others follow.
            self._training = training if training.rewind() else None
            return StepMemory(timeline, getattr(training.model.model.diffusion_model, "pinned_bytes", 0))

    def _begun(self) -> _Training:
        model = _build(self._config, self._weights)
        return _Training(model, first_stage_on_host=not has_image_data(model, self._config))


def on_device(peak: Mapping[str, int]) -> int:
    """Return the bytes of a `peak_of_step` on the device."""
    return sum(size for category, size in peak.items() if category != HOST)


def _precision(given: Any) -> tuple[torch.dtype, torch.dtype | None]:
    name = _SHORT_PRECISIONS.get(str(given), str(given))
    if name not in _PRECISIONS:
        raise UserError(f"lightning.trainer.precision {given!r} cannot be predicted{nearest(name, set(_PRECISIONS))}")
    return _PRECISIONS[name]


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Run CUDA code paths on the CPU, without compilation and without warnings about fake tensors."""
    compiled, torch.compile = torch.compile, _uncompiled
    try:
        with as_on_cuda(), _CudaAutocast(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compiled


def _uncompiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """Replace `torch.compile` during a forecast.

    A compiled optimizer step runs without gradients, in place and inside one kernel. It allocates nothing, so it is
    replaced by an empty function.
    """
    return function if torch.is_grad_enabled() else lambda *_args, **_kwargs: None


class _CudaAutocast(TorchFunctionMode):
    """Mode in which autocast on the CPU keeps normalisation in float32, as it does on CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.group_norm, torch.layer_norm) and torch.is_autocast_enabled("cpu"):
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


class _NoValues(TorchDispatchMode):
    """Mode in which the value of a fake tensor is 0, for networks that compute their settings with tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return 0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _fill_caches(config: DictConfig) -> None:
    """Let the optimizer's library build its cached tables from real tensors; fake ones would break later training."""
    described = plain(config.get("model") or {}).get("params", {}).get("optimizer_config")
    if described:
        parameter = nn.Parameter(torch.zeros(64, 64))
        parameter.grad = torch.zeros_like(parameter)
        with torch.random.fork_rng(devices=[]):
            build_optimizer(described, [parameter], 0.0, "optimizer_config").step()


def _build(config: DictConfig, dtype: torch.dtype) -> DDPM:
    """Build the model without loading weights, with parameters of `dtype`."""
    with without_initialisation(), _NoValues():
        model = build_model(config, with_files=False)
    refuse_if(
        not isinstance(model, DDPM),
        f"{config.model.target}: the memory of a step can be predicted for diffusion models only",
    )
    # Module.to() fails: fake tensors cannot be swapped in place.
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(module, KeepsTypes):
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    return model


def _on_host(model: nn.Module) -> set[int]:
    """Return the `id` of each parameter that stays on the host."""
    parts = (part for part in model.modules() if isinstance(part, StaysOnHost) and part.stays_on_host)
    return {id(parameter) for part in parts for parameter in part.parameters()}


def _name_weights(ledger: Ledger, model: DDPM, first_stage_on_host: bool) -> None:
    ledger.name([*model.parameters(), *model.buffers()], "weights")
    elsewhere = [part for part in model.modules() if isinstance(part, StaysOnHost) and part.stays_on_host]
    if first_stage_on_host:
        elsewhere.append(model.first_stage_model)
    for part in elsewhere:
        ledger.name([*part.parameters(), *part.buffers()], HOST)


class _Training:
    """Model and optimizer with the state of a first step, and the ledger that counts them."""

    def __init__(self, model: DDPM, first_stage_on_host: bool) -> None:
        self.model, self._ledger = model, Ledger()
        with self._ledger:
            _name_weights(self._ledger, model, first_stage_on_host)
            self._prepare()
        self._begun = self._ledger.mark()

    def _prepare(self) -> None:
        ledger, host = self._ledger, _on_host(self.model)
        trained = [parameter for parameter in self.model.trained_parameters() if parameter.requires_grad]
        self._optimizer = optimizer = _optimizer(self.model)
        self._step_category = HOST if all(id(parameter) in host for parameter in trained) else TEMPORARIES
        if isinstance(optimizer, InBackward):  # which steps in the middle of a batch
            optimizer.inner.step = _named(ledger, optimizer.inner.step, self._step_category)
        _make_state(ledger, optimizer, trained, host)
        for parameter in trained:
            gradients = HOST if id(parameter) in host else "gradients"
            parameter.register_post_accumulate_grad_hook(lambda p, of=gradients: ledger.name([p.grad], of))

    def step(self, batch: dict[str, Any], autocast: torch.dtype | None, accumulate: int) -> Timeline:
        """Run a step in Lightning's order of calls, and return the timeline that ends with it."""
        ledger, optimizer = self._ledger, self._optimizer

        def micro_batch(first: bool) -> Tensor:
            began = ledger.now
            with ledger.naming(TEMPORARIES):
                with torch.autocast("cpu", autocast, cache_enabled=False) if autocast else nullcontext():
                    loss, _ = self.model.shared_step(batch)
                if first:
                    optimizer.zero_grad()
                ledger.name_survivors(began, "activations")
                loss.backward()
            return loss

        began = ledger.now
        with ledger:
            if accumulate > 1:  # one extra batch is enough: gradients exist when the last one begins
                micro_batch(first=True)
            with ledger.naming(self._step_category):
                self.model.optimizer_step(0, 0, optimizer, lambda: micro_batch(first=accumulate == 1))
        return ledger.timeline(began)

    def rewind(self) -> bool:
        """Forget the last `step`. Return False if other storages exist than before it: further steps would differ."""
        self._optimizer.zero_grad()
        self.model.sample_losses = None  # of the step's batch
        return self._ledger.rewind(self._begun)


def _make_state(ledger: Ledger, optimizer: Optimizer, trained: Iterable[nn.Parameter], host: Container[int]) -> None:
    """Let `optimizer` allocate its state, as a first step does. `host` has the `id` of each parameter on the host."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for parameter, state in optimizer.state.items():
        ledger.name(tree_leaves(state), HOST if id(parameter) in host else "optimizer")


def _named(ledger: Ledger, function: Callable[[], Any], category: str) -> Callable[[], Any]:
    """Return `function`, whose allocations have `category`."""

    def call() -> Any:
        with ledger.naming(category):
            return function()

    return call


def _optimizer(model: DDPM) -> Optimizer:
    model.learning_rate = 1.0  # the value does not matter: nothing is computed
    configured = model.configure_optimizers()
    optimizer = configured if isinstance(configured, Optimizer) else configured[0][0]
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and group.get("fused") is None:
            group["foreach"] = True  # torch's choice on CUDA
    return optimizer
