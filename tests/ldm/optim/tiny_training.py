"""A tiny UNet to train, and its losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.util import instantiate_from_config
from tests.golden_data import fill_seeded, seeded_tensor
from tests.training_runs import CONFIG


def tiny_unet() -> nn.Module:
    """Return a UNet of 200,000 parameters with seeded weights, which recomputes its activations in backward."""
    config = CONFIG["model"]["params"]["unet_config"]
    params = {**config["params"], "use_checkpoint": True}
    return fill_seeded(instantiate_from_config({"target": config["target"], "params": params}))


def tiny_loss(unet: nn.Module, number: int) -> Tensor:
    """Return the loss of the seeded batch `number`."""
    x, noise = (seeded_tensor(f"optim/{number}/{name}", (2, 4, 4, 4)) for name in ("x", "noise"))
    context = seeded_tensor(f"optim/{number}/context", (2, 5, 8))
    return (unet(x, torch.tensor([3, 30]), context).float() - noise).square().mean()


def train(
    unet: nn.Module, optimizer: torch.optim.Optimizer, steps: range, accumulate: int = 1, schedule: object = None
) -> None:
    """Train as Lightning does: closures by themselves, and within `step` for the last batch of each step."""
    for step in steps:
        for part in range(accumulate):

            def closure(step: int = step, part: int = part) -> Tensor:
                if part == 0:
                    optimizer.zero_grad()
                loss = tiny_loss(unet, step * accumulate + part) / accumulate
                loss.backward()
                return loss

            if part < accumulate - 1:
                closure()
            else:
                optimizer.step(closure)
        if schedule is not None:
            schedule.step()
