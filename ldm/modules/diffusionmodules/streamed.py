"""UNet for a device whose memory is smaller than the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import TimestepEmbedSequential, conditioning_of
from ldm.modules.diffusionmodules.layers import StaysOnHost
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.streaming import WeightStream
from ldm.util import check_choice, refuse_if

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class StreamedUNetModel(StaysOnHost, UNetModel):
    """`UNetModel` whose weights stay in host memory, and visit the input's device part by part.

    A part is a layer of a block: a residual block, a transformer, a resampling layer. A transformer with several
    transformer blocks in a row, as in SDXL, is divided further: into each of these, and the layers before and after
    them. The weights have the type of the trainer's precision: bfloat16 with `bf16-true`, float32 otherwise.

    Args:
        stream_dtype: type of the copies on the device and of the computation, `bf16` or `fp32`.
        kwargs: see `UNetModel`. `use_checkpoint` must be false, since each part is checkpointed. `compile_mode` must be
            left out, since the weights are temporary copies.

    Raises:
        UserError: `stream_dtype` is unknown, or an argument is not supported.
    """

    def __init__(self, stream_dtype: str = "bf16", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("stream_dtype", stream_dtype, tuple(_DTYPES))
        refuse_if(
            kwargs.get("use_checkpoint"),
            "use_checkpoint: set it to false; StreamedUNetModel checkpoints whole layers (put minimal.yaml or "
            "smallest.yaml last among several tiers)",
        )
        refuse_if(
            kwargs.get("compile_mode"), "compile_mode: leave it out; the layers of StreamedUNetModel are not compiled"
        )
        self._ends: dict[nn.Module, tuple[_Part, _Part]] = {}  # layers before and after the transformer blocks
        embedding = [self.time_embed, *([self.label_emb] if self.num_classes is not None else [])]
        blocks = [*self.input_blocks, self.middle_block, *self.output_blocks]
        parts = [part for block in blocks for part in self._parts_of(block)]
        self._stream = WeightStream([*embedding, *parts, self.last], _DTYPES[stream_dtype])

    @property
    def dtype(self) -> torch.dtype:
        return self._stream.dtype

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory that a training on CUDA takes."""
        return self._stream.pinned_bytes

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if not isinstance(block, TimestepEmbedSequential):
            return self._stream.run(block, *inputs)
        x, emb, context = inputs
        for layer in block:
            if _is_deep(layer):
                x = self._run_transformer(layer, x, context)
            else:
                x = self._stream.run(layer, x, *conditioning_of(layer, emb, context))
        return x

    def _run_transformer(self, transformer: SpatialTransformer, x: Tensor, context: Tensor | None) -> Tensor:
        first, last = self._ends[transformer]
        h = self._stream.run(first, x)
        for block in transformer.transformer_blocks:
            h = self._stream.run(block, h, context)
        return self._stream.run(last, h, x)

    def _parts_of(self, block: nn.Module) -> Iterator[nn.Module]:
        """Return the parts of a block in the order in which they run."""
        for layer in block:
            if _is_deep(layer):
                first = _Part(layer.to_tokens, norm=layer.norm, proj_in=layer.proj_in)
                last = _Part(layer.from_tokens, proj_out=layer.proj_out)
                self._ends[layer] = first, last
                yield from (first, *layer.transformer_blocks, last)
            else:
                yield layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._stream.settle()
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._stream.settle()


def _is_deep(layer: nn.Module) -> bool:
    return isinstance(layer, SpatialTransformer) and len(layer.transformer_blocks) > 1


class _Part(nn.Module):
    """Method of a layer as a separate module that contains the submodules that the method uses."""

    def __init__(self, method: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._method = method
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._method(*inputs)
