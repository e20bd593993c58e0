"""Degradation of images to low resolution: scaling, and the random degradations of BSRGAN (arXiv:2103.14006).

Images are uint8 (H, W, 3). Random numbers come from torch's global generator, which the loader seeds per sample.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.images.pixels import filter_of, random_below, random_between
from ldm.images.sensor import sensor_noise
from ldm.util import UserError, nearest

_PIL = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CV = ("nearest", "bilinear", "bicubic", "area", "lanczos")  # filters of OpenCV, which are not widened when shrinking
_LANCZOS_LOBES = 4


@dataclass(frozen=True)
class Strength:
    """Parameters of the steps of BSRGAN, by section 3 of the paper or milder."""

    kernel_sizes: tuple[int, ...]  # odd numbers of pixels
    isotropic: tuple[float, float]  # standard deviation of the isotropic blur in pixels
    anisotropic: tuple[float, float]  # standard deviations of the anisotropic blur along its axes
    noise: tuple[float, float]  # standard deviation in levels of 255
    quality: tuple[int, int]  # JPEG quality
    sensor: float  # probability of camera sensor noise


_FULL = Strength(tuple(range(7, 22, 2)), (0.1, 2.8), (0.5, 8.0), (1.0, 25.0), (30, 95), 0.25)
_LIGHT = Strength(tuple(range(7, 22, 2)), (0.1, 0.7), (0.1, 2.0), (0.2, 2.0), (80, 95), 0.0)
_JPEG_PROBABILITY, _HALVE_FIRST = 0.75, 0.25
_STRENGTHS = {"bsrgan": _FULL, "bsrgan_light": _LIGHT}
NAMES = (*_STRENGTHS, *(f"pil_{name}" for name in _PIL), *(f"cv_{name}" for name in _CV))


def degradation(name: str, factor: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the degradation `name`, which makes a uint8 image (H, W, 3) `factor` times smaller.

    Raises:
        UserError: `name` is not in `NAMES`.
    """
    if name in _STRENGTHS:
        return partial(bsrgan, factor=factor, strength=_STRENGTHS[name])
    if name not in NAMES:
        raise UserError(f"degradation {name!r} is unknown{nearest(str(name), list(NAMES))}")
    library, _, filter_name = name.partition("_")
    scale = scale_like_pillow if library == "pil" else scale_like_opencv
    return lambda image: scale(image, image.shape[0] // factor, image.shape[1] // factor, filter_name)


def scale_like_pillow(image: np.ndarray, height: int, width: int, filter_name: str) -> np.ndarray:
    """Return `image` scaled by Pillow, which widens its filters when shrinking."""
    resampling = Image.Resampling[filter_of(filter_name).upper()]
    return np.array(Image.fromarray(image).resize((width, height), resampling))


def scale_like_opencv(image: np.ndarray, height: int, width: int, filter_name: str) -> np.ndarray:
    """Return `image` scaled like OpenCV, with filters of fixed width, except for `area`, which averages."""
    pixels = _to_tensor(image)
    if filter_name == "lanczos":
        rows, columns = (_lanczos(*sizes) for sizes in ((image.shape[0], height), (image.shape[1], width)))
        return _to_image(rows @ pixels @ columns.T)
    smooth = {"align_corners": False} if filter_name in ("bilinear", "bicubic") else {}
    return _to_image(F.interpolate(pixels[None], (height, width), mode=filter_name, **smooth)[0])


def _lanczos(size: int, new_size: int) -> Tensor:
    """Return weights (new_size, size) of sinc(x) sinc(x/4) over the 8 pixels around each new pixel. Rows sum to 1."""
    centres = (torch.arange(new_size, dtype=torch.float64) + 0.5) * size / new_size - 0.5
    taps = centres.floor()[:, None] + torch.arange(1 - _LANCZOS_LOBES, _LANCZOS_LOBES + 1)  # (new_size, 8)
    distance = taps - centres[:, None]
    values = torch.sinc(distance) * torch.sinc(distance / _LANCZOS_LOBES)
    weights = torch.zeros(new_size, size, dtype=torch.float64)
    weights.scatter_add_(1, taps.long().clamp(0, size - 1), values / values.sum(1, keepdim=True))
    return weights.float()


def bsrgan(image: np.ndarray, factor: int, strength: Strength = _FULL) -> np.ndarray:
    """Return `image` after two blurs, scaling and several kinds of noise in random order, with JPEG last (fig. 2)."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    pixels = _to_tensor(image) / 255  # 3 H W, in [0, 1]
    if factor >= 4 and _happens(_HALVE_FIRST):  # D² of the paper, before the other steps
        halved = (image.shape[0] // 2, image.shape[1] // 2)
        pixels = _scale(pixels, *halved, ("bilinear", "bicubic")[random_below(2)])
    steps: list[Callable[[Tensor], Tensor]] = [
        partial(_blur, kernel=lambda: isotropic_kernel(strength)),
        partial(_blur, kernel=lambda: anisotropic_kernel(strength)),
        partial(_downscale, height=height, width=width),
        partial(_gaussian_noise, strength=strength),
    ]
    if _happens(_JPEG_PROBABILITY):
        steps.append(partial(_jpeg, strength=strength))
    if _happens(strength.sensor):
        steps.append(sensor_noise)
    for index in torch.randperm(len(steps)).tolist():
        pixels = steps[index](pixels).clamp(0, 1)
    return _to_image(_jpeg(pixels, strength) * 255)


def _happens(probability: float) -> bool:
    return bool(torch.rand(1) < probability)


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # 3 H W


def _to_image(pixels: Tensor) -> np.ndarray:
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _kernel(size: int, covariance: Tensor) -> Tensor:
    """Return a Gaussian kernel (size, size) for the inverse of a 2x2 covariance. It sums to 1."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)  # size size 2
    exponent = torch.einsum("yxi,ij,yxj->yx", points, torch.linalg.inv(covariance), points)
    kernel = torch.exp(-exponent / 2)
    return (kernel / kernel.sum()).float()


def isotropic_kernel(strength: Strength) -> Tensor:
    """Return an isotropic Gaussian kernel of random width (section 3.1)."""
    size = strength.kernel_sizes[random_below(len(strength.kernel_sizes))]
    return _kernel(size, torch.eye(2, dtype=torch.float64) * random_between(*strength.isotropic) ** 2)


def anisotropic_kernel(strength: Strength) -> Tensor:
    """Return an anisotropic Gaussian kernel of random widths and direction (section 3.1)."""
    size = strength.kernel_sizes[random_below(len(strength.kernel_sizes))]
    angle = random_between(0, math.pi)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    widths = torch.tensor([random_between(*strength.anisotropic) ** 2 for _ in range(2)], dtype=torch.float64)
    return _kernel(size, turn @ torch.diag(widths) @ turn.T)


def _blur(pixels: Tensor, kernel: Callable[[], Tensor]) -> Tensor:
    made = kernel()
    edge = made.shape[0] // 2
    padded = F.pad(pixels[None], (edge,) * 4, mode="replicate")
    return F.conv2d(padded, made.expand(3, 1, -1, -1), groups=3)[0]


def _scale(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    smooth = {"align_corners": False, "antialias": mode != "nearest"} if mode in ("bilinear", "bicubic") else {}
    return F.interpolate(pixels[None], (max(height, 1), max(width, 1)), mode=mode, **smooth)[0]


def _downscale(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale to (height, width) by nearest, bilinear, bicubic, or down and up again (section 3.2).

    Nearest samples at the pixel centres, which removes the shift that the paper describes.
    """
    modes = ("bilinear", "bicubic")
    way = random_below(4)
    if way < 2:
        return _scale(pixels, height, width, modes[way])
    if way == 2:
        return _scale(pixels, height, width, "nearest-exact")
    factor = pixels.shape[1] / height
    first = random_between(0.5, max(factor, 0.5))  # down by `first`, then to the final size
    pixels = _scale(pixels, int(pixels.shape[1] / first), int(pixels.shape[2] / first), modes[random_below(2)])
    return _scale(pixels, height, width, modes[random_below(2)])


def _gaussian_noise(pixels: Tensor, strength: Strength) -> Tensor:
    """Add noise with a general, diagonal or fully correlated covariance of the channels (section 3.3)."""
    level = random_between(*strength.noise) / 255
    chance = float(torch.rand(1))
    if chance < 0.2:
        basis, _ = torch.linalg.qr(torch.randn(3, 3))
        covariance = basis @ torch.diag(torch.rand(3)) @ basis.T  # positive definite, at most 1
        mixed = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(3))
        noise = torch.einsum("ij,jhw->ihw", mixed, torch.randn_like(pixels))
    elif chance < 0.6:
        noise = torch.randn_like(pixels)
    else:
        noise = torch.randn_like(pixels[:1])
    return pixels + level * noise


def _jpeg(pixels: Tensor, strength: Strength) -> Tensor:
    low, high = strength.quality
    stream = io.BytesIO()
    Image.fromarray(_to_image(pixels * 255)).save(stream, format="JPEG", quality=low + random_below(high - low + 1))
    with Image.open(stream, formats=("JPEG",)) as compressed:
        return _to_tensor(np.asarray(compressed.convert("RGB"))) / 255
