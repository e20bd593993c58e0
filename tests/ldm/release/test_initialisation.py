"""Modules to load weights into are built without random ones."""

import torch
from torch import nn

from ldm.release.initialisation import without_initialisation


class Layers(nn.Module):
    """Layers that fill their weights at random, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.convolution, self.norm = nn.Linear(3, 4), nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)
        self.register_buffer("steps", torch.arange(3))


def test_nothing_is_drawn_at_random():
    for on_meta in (False, True):
        before = torch.get_rng_state()
        with without_initialisation(on_meta):
            module = Layers()
        assert torch.equal(torch.get_rng_state(), before)
        assert all(weight.is_meta == on_meta for weight in module.parameters())
        assert module.steps.tolist() == [0, 1, 2]
    assert not Layers().linear.weight.is_meta
