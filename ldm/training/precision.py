"""What `precision: bf16-true` means here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.plugins.precision import HalfPrecision


class Bfloat16Weights(HalfPrecision):
    """Lightning's `bf16-true`, of which only the weights become bfloat16.

    Lightning also casts batches, which costs a stored float16 latent three of its bits, and makes bfloat16 the default
    type during a step, in which timesteps and losses are computed. The network casts its inputs to the type of its
    weights itself, and the rest is float32.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    def convert_input(self, data: Any) -> Any:
        return data

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield
