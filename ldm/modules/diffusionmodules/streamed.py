"""The UNet for a device that is smaller than its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import StaysOnHost
from ldm.modules.streaming import WeightStream
from ldm.util import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class StreamedUNetModel(StaysOnHost, UNetModel):
    """`UNetModel` whose weights stay in host memory, in float32, and visit the input's device block by block.

    Args:
        stream_dtype: the type of the visiting copies and of the computation, `bf16` or `fp32`.
        kwargs: see `UNetModel`; `use_checkpoint` must be false, since whole blocks are checkpointed, and `compile_mode`
            left out, since weights come and go.

    Raises:
        UserError: an argument has another value.
    """

    def __init__(self, stream_dtype: str = "bf16", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if stream_dtype not in _DTYPES:
            raise UserError(f"stream_dtype {stream_dtype!r} is unknown; valid: {', '.join(_DTYPES)}")
        if kwargs.get("use_checkpoint"):
            raise UserError(
                "use_checkpoint: set it to false; StreamedUNetModel checkpoints whole blocks (of several tiers, "
                "minimal.yaml comes last)"
            )
        if kwargs.get("compile_mode"):
            raise UserError("compile_mode: leave it out; StreamedUNetModel's blocks are not compiled")
        embedding = [self.time_embed, *([self.label_emb] if self.num_classes is not None else [])]
        blocks = [*embedding, *self.input_blocks, self.middle_block, *self.output_blocks, self.out]
        self._stream = WeightStream(blocks, _DTYPES[stream_dtype])

    @property
    def dtype(self) -> torch.dtype:
        return self._stream.dtype

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        return self._stream.run(block, *inputs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._stream.settle()
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._stream.settle()
