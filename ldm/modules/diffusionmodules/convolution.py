"""Two-dimensional convolution that is also fast on a CPU for many weights or few pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.cpu import is_on_cpu

# From this number of weights per kernel position and output pixel, a matrix product trains faster on a CPU than torch's
# convolution, which converts weights and gradients to its own layout and back (benchmarks/cpu_convolution.py).
_MANY_WEIGHTS = 5000
# Up to this number of pixels, a 1 × 1 convolution of one image trains faster as a product, which needs no copy then.
_FEW_PIXELS = 4096


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that uses a matrix product of patches (im2col) for many weights or few pixels on a CPU.

    Input (B, C_in, H, W), output (B, C_out, H', W'). The two methods differ only by rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._as_product(x) if self._is_faster_as_product(x) else super().forward(x)

    def _is_faster_as_product(self, x: Tensor) -> bool:
        is_plain = self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not is_plain or not is_on_cpu(x) or x.ndim != 4:
            return False
        pixels = x.shape[0] * x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        is_small = self._is_pointwise() and len(x) == 1 and pixels <= _FEW_PIXELS
        return is_small or self.in_channels * self.out_channels >= _MANY_WEIGHTS * pixels

    def _is_pointwise(self) -> bool:
        return (self.kernel_size, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))

    def _as_product(self, x: Tensor) -> Tensor:
        # B (C_in kh kw) pixels
        if self._is_pointwise():
            columns = x.flatten(2)
        else:
            columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        # As a matrix, since torch's choice of kernel for more dimensions depends on the weight's requires_grad.
        out = F.linear(columns.transpose(1, 2).flatten(0, 1), self.weight.flatten(1), self.bias)  # (B pixels) C_out
        size = [
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, padding, dilation, kernel, stride in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]
        out = out.unflatten(0, (len(x), *size)).permute(0, 3, 1, 2)  # B C_out H' W', channels last
        return out.contiguous() if x.is_contiguous() else out
