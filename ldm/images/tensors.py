"""Conversion between PIL images and tensors, and normalisation, with torchvision's names and arguments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.util import UserError, refuse_if


class PILToTensor:
    """Conversion of a PIL image to a tensor (C, H, W) without scaling."""

    def __call__(self, image: Image.Image) -> Tensor:
        values = np.array(image.convert("L") if image.mode == "1" else image)
        return torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1).contiguous()


class ToTensor:
    """Conversion of a PIL image or array (H, W[, C]) to a tensor (C, H, W). uint8 becomes float32 in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        if isinstance(image, np.ndarray):
            channels = image if image.ndim == 3 else image[..., None]
            tensor = torch.from_numpy(np.ascontiguousarray(channels.transpose(2, 0, 1)))
        else:
            tensor = PILToTensor()(image)
        return tensor.float().div(255) if tensor.dtype == torch.uint8 else tensor


class ToPILImage:
    """Conversion of a tensor (C, H, W) or array (H, W, C) to a PIL image. Floats in [0, 1] are scaled and clamped."""

    def __init__(self, mode: str | None = None) -> None:
        self.mode = mode

    def __call__(self, image: Tensor | np.ndarray) -> Image.Image:
        values = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image
        if np.issubdtype(values.dtype, np.floating):
            values = (values * 255).clip(0, 255).astype(np.uint8)
        made = Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)
        return made if self.mode is None else made.convert(self.mode)


class ConvertImageDtype:
    """Conversion of the dtype with scaling between uint8 in [0, 255] and floating point in [0, 1]."""

    def __init__(self, dtype: torch.dtype | str = torch.float32) -> None:
        named = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
        refuse_if(
            named not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64),
            f"dtype {dtype!r}: give uint8 or a floating-point type such as float32",
        )
        self.dtype = named

    def __call__(self, image: Tensor) -> Tensor:
        if image.is_floating_point() == self.dtype.is_floating_point:
            return image.to(self.dtype)
        if self.dtype.is_floating_point:
            return image.to(self.dtype) / 255
        return image.mul(255 + 1 - 1e-3).clamp(0, 255).to(self.dtype)


class Normalize:
    """Normalisation (x − mean) / std of a tensor (..., C, H, W), per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        if not all(std):
            raise UserError(f"std {list(std)}: must not be 0")
        if len(mean) != len(std):
            raise UserError(f"mean {list(mean)} and std {list(std)}: give one number per channel in both")
        self.mean, self.std, self.inplace = torch.tensor(mean), torch.tensor(std), inplace

    def __call__(self, image: Tensor) -> Tensor:
        refuse_if(
            not isinstance(image, Tensor) or not image.is_floating_point(),
            "Normalize takes a floating-point tensor: put ToTensor before it",
        )
        mean, std = (value.to(image.dtype)[:, None, None] for value in (self.mean, self.std))
        return (image if self.inplace else image.clone()).sub_(mean).div_(std)
