"""Transforms between PIL images and tensors, and of tensors' values, with torchvision's names and arguments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.util import UserError


class PILToTensor:
    """A PIL image as a tensor (C, H, W) of its own values."""

    def __call__(self, image: Image.Image) -> Tensor:
        values = np.array(image.convert("L") if image.mode == "1" else image)
        return torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1).contiguous()


class ToTensor:
    """A PIL image, or an array (H, W) or (H, W, C), as a tensor (C, H, W); uint8 becomes float32 in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        if isinstance(image, np.ndarray):
            channels = image if image.ndim == 3 else image[..., None]
            tensor = torch.from_numpy(np.ascontiguousarray(channels.transpose(2, 0, 1)))
        else:
            tensor = PILToTensor()(image)
        return tensor.float().div(255) if tensor.dtype == torch.uint8 else tensor


class ToPILImage:
    """A tensor (C, H, W), or an array (H, W, C), as a PIL image; floating point in [0, 1] is scaled and cut."""

    def __init__(self, mode: str | None = None) -> None:
        self.mode = mode

    def __call__(self, image: Tensor | np.ndarray) -> Image.Image:
        values = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image
        if np.issubdtype(values.dtype, np.floating):
            values = (values * 255).clip(0, 255).astype(np.uint8)
        made = Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)
        return made if self.mode is None else made.convert(self.mode)


class ConvertImageDtype:
    """A tensor in another type, scaled: uint8 in [0, 255] to floating point in [0, 1], and back."""

    def __init__(self, dtype: torch.dtype | str = torch.float32) -> None:
        named = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
        if named not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise UserError(f"dtype {dtype!r}: give uint8 or a floating-point type such as float32")
        self.dtype = named

    def __call__(self, image: Tensor) -> Tensor:
        if image.is_floating_point() == self.dtype.is_floating_point:
            return image.to(self.dtype)
        if self.dtype.is_floating_point:
            return image.to(self.dtype) / 255
        return image.mul(255 + 1 - 1e-3).clamp(0, 255).to(self.dtype)


class Normalize:
    """A tensor (..., C, H, W) less `mean`, over `std`, both per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        if not all(std):
            raise UserError(f"std {list(std)}: 0 cannot be divided by")
        self.mean, self.std, self.inplace = torch.tensor(mean), torch.tensor(std), inplace

    def __call__(self, image: Tensor) -> Tensor:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise UserError("Normalize takes a floating-point tensor: put ToTensor before it")
        mean, std = (value.to(image.dtype)[:, None, None] for value in (self.mean, self.std))
        return (image if self.inplace else image.clone()).sub_(mean).div_(std)
