"""Tiny model on a fake device, and its training step. `CHECKS` names the checks that use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.device import pretended
from tests.device.pretended import Waits, pretending
from tests.training_runs import CONFIG

CHECKS: dict[str, Callable[[], None]] = {}
UNET, OPTIMIZER = "model.params.unet_config", "model.params.optimizer_config"
FUSED = "{target: torch.optim.AdamW, params: {fused: true}}"


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def build(*overrides: str, cond_stage: dict[str, Any] | None = None) -> Any:
    """Build a tiny model in training mode; with a `cond_stage`, it reads captions."""
    from ldm.config.load import build_model

    changed = OmegaConf.from_dotlist(["model.params.use_ema=false", *overrides])
    config = OmegaConf.merge(OmegaConf.create(CONFIG), changed)
    if cond_stage is not None:
        config.model.params.cond_stage_config = cond_stage
        config.model.params.cond_stage_key = "txt"
    model = build_model(config)
    model.learning_rate = 1e-3
    model.train()
    return model


def sent(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return a tensor on the device, sent from pinned memory as Lightning does."""
    return torch.empty(shape, dtype=dtype).to(pretended.GPU, non_blocking=True)


def batch(**entries: Any) -> dict[str, Any]:
    names = ["a", "b", "c"]
    return {"f8": sent(3, 8, 4, 4), "t5": sent(3, 77, 8), "txt": names, "stream": names, "__key__": names, **entries}


def prior_batch() -> dict[str, Any]:
    latents = {key: sent(3, 4, 4, 4) for key in ("noise", "prediction")}
    return batch(is_prior=sent(3, dtype=torch.bool), t=sent(3, dtype=torch.long), **latents)


def step(model: Any, optimizer: Any, entries: dict[str, Any]) -> None:
    """Run the calls of Lightning at a training step."""

    def closure() -> Tensor:
        loss, _ = model.shared_step(entries)
        optimizer.zero_grad()
        loss.backward()
        return loss

    model.on_train_batch_start(entries, 1)
    optimizer.step(closure)
    optimizer.zero_grad()
    if model.use_ema:
        model.model_ema(model.model)


def train(model: Any, entries: Callable[[], dict[str, Any]] = batch, waits_at: tuple[str, ...] = ()) -> None:
    """Run a step, and assert that it waits for the device only in the given files."""
    with pretending() as waits:
        pretended.place(model)
        optimizer, given = model.configure_optimizers(), entries()
        model.on_train_batch_start(given, 0)  # the first stage leaves the device once
        waits.places.clear()
        step(model, optimizer, given)
        must_not_wait(waits, waits_at)


def must_wait_once(waits: Waits, file: str) -> None:
    """Assert that there was one wait for the device, in `file`."""
    assert [place.partition(":")[0] for place in waits.places] == [file], f"waits at {waits.places}"


def must_not_wait(waits: Waits, but_at: tuple[str, ...] = ()) -> None:
    found = {place for place in waits.places if not place.startswith(but_at or ("nowhere",))}
    assert not found, f"waits for the device at {sorted(found)}"
