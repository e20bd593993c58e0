"""Optimizer steps taken during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ldm.optim.building import build_optimizer
from ldm.util import check_number, refuse_if

# Optimizers whose step needs all gradients at once, each with what it makes of them.
_NEEDS_ALL = {
    "Prodigy": "its estimate of the learning rate is a sum over all parameters",
    "LBFGS": "it takes all parameters as one vector",
}


class InBackward(Optimizer):
    """Optimizer that steps another one in buckets as gradients arrive, and frees the gradients of each bucket at once.

    `step(closure)` arms hooks on the parameters while the closure runs. A finished gradient joins the bucket, and a
    full bucket is stepped, so that only one bucket of gradients exists at a time. Lightning calls the closure by itself
    for all accumulated batches except the last. Those accumulate as usual, so accumulation is exact and keeps its
    gradients.

    One inner optimizer holds all parameters. While a bucket is stepped, its groups hold the parameters of that bucket
    alone, and a count of steps that the groups keep is the one before this step. Each update, the parameter groups, the
    state and the `state_dict` are those of the inner optimizer, and a run without this wrapper can resume from them.
    The gradients never exist all at once, so a method that scales them or needs their common norm cannot work (see
    `ldm.training.compatibility`).

    Args:
        params: parameters, or parameter groups.
        lr: learning rate of the inner optimizer, unless its `params` name one.
        optimizer: `target` and `params` of the inner optimizer.
        bucket_mb: MiB of gradients per step. Larger buckets mean fewer calls and more memory.
        clip_each: L2 norm to which each parameter's gradient is scaled down before its step; None for no clipping.

    Raises:
        UserError: a size or a norm is not positive, or the inner optimizer does not exist or needs all gradients.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        optimizer: Mapping[str, Any],
        bucket_mb: float = 32,
        clip_each: float | None = None,
    ) -> None:
        check_number("bucket_mb", bucket_mb, above=0, whole=False)
        check_number("clip_each", clip_each, above=0, whole=False, optional=True)
        self.inner = build_optimizer(optimizer, params, lr, "optimizer")
        reason = _NEEDS_ALL.get(type(self.inner).__name__)
        refuse_if(
            reason,
            f"optimizer: {optimizer['target']} cannot step during backward, because {reason}; "
            "make it the optimizer_config itself",
        )
        self.bucket_bytes = int(bucket_mb * 2**20)
        self.clip_each = clip_each
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share_inner_state()
        # By index, because loading a state dict replaces the groups' dicts.
        self._group_of = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        self._bucket: list[nn.Parameter] = []
        self._bucket_filled = 0  # bytes
        self._taken: set[nn.Parameter] = set()  # parameters of this step
        self._counts = self._counted_steps()
        # Autograd delivers the gradients of each device, and of the host, in a thread of its own.
        self._one_at_a_time = Lock()

    def _share_inner_state(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def _counted_steps(self) -> list[int | None]:
        """Return the steps so far of each group that counts them."""
        return [group.get("step") for group in self.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the inner optimizer."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict of the inner optimizer, from a run with or without this wrapper."""
        self.inner.load_state_dict(state_dict)
        self._share_inner_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient, most of them during the closure's backward pass.

        Returns the result of the closure.
        """
        self._bucket, self._bucket_filled = [], 0
        self._taken.clear()
        self._counts = self._counted_steps()
        result = None
        if closure is not None:
            trained = [parameter for parameter in self._group_of if parameter.requires_grad]
            hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in trained]
            try:
                with torch.enable_grad():
                    result = closure()
            finally:
                for hook in hooks:
                    hook.remove()
            self._step_bucket()
        for parameter in self._group_of:  # without a closure: all; else those without a gradient in the last batch
            if parameter.grad is not None:
                self._take(parameter)
        self._step_bucket()
        return result

    def _take(self, parameter: nn.Parameter) -> None:
        """Put a parameter whose gradient is complete into the bucket."""
        with self._one_at_a_time:
            if parameter in self._taken:
                raise RuntimeError("second backward pass within a step: its gradients arrive after the step")
            self._taken.add(parameter)
            self._bucket.append(parameter)
            self._bucket_filled += parameter.grad.nbytes
            if self._bucket_filled >= self.bucket_bytes:
                self._step_bucket()

    def _step_bucket(self) -> None:
        if not self._bucket:
            return
        groups = self.inner.param_groups
        members: list[list[nn.Parameter]] = [[] for _ in groups]
        for parameter in self._bucket:
            if self.clip_each is not None:
                nn.utils.clip_grad_norm_(parameter, self.clip_each)
            members[self._group_of[parameter]].append(parameter)
        everything = [group["params"] for group in groups]
        try:
            for group, some, count in zip(groups, members, self._counts, strict=True):
                group["params"] = some
                if count is None:
                    group.pop("step", None)  # counted by the previous bucket
                else:
                    group["step"] = count
            self.inner.step()
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params
        for parameter in self._bucket:
            parameter.grad = None
        self._bucket, self._bucket_filled = [], 0
