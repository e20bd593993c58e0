"""Masks and depth maps from files, at the size of the image that they belong to."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.files import MOST_IN_MEMBER, read_at_most
from ldm.images.decode import decode_grey, has_transparency
from ldm.images.pixels import resize
from ldm.images.transforms import centre_crop
from ldm.util import UserError, refuse_if

_NEAR = 0.05


def read_mask(path: str | Path) -> np.ndarray:
    """Return the mask in the image at `path`, float32 (H, W): 1 where it is white, 0 where it is black.

    Near white and near black, as in a JPEG, count as white and black.

    Raises:
        UserError: the image cannot be decoded, no pixel is lighter than the middle grey, or all are white only because
            some are transparent.
    """
    data = read_at_most(path, MOST_IN_MEMBER)
    mask = decode_grey(data, str(path))
    refuse_if(mask.max() < 0.5, f"{path}: no pixel of the mask is white; paint white what is to be repainted")
    mask[mask < _NEAR] = 0
    mask[mask > 1 - _NEAR] = 1
    refuse_if(
        mask.min() == 1 and has_transparency(data, str(path)),
        f"{path}: transparent pixels count as white, so that all is repainted; paint black what is kept",
    )
    return mask


def read_depth(path: str | Path) -> np.ndarray:
    """Return the depth map at `path`, an image or a `.npy` of numbers (H, W), as float32. Nearer is larger.

    Raises:
        UserError: the file cannot be decoded, has another shape, or its values are all equal or not finite.
    """
    data = read_at_most(path, MOST_IN_MEMBER)
    depth = _array(data, path) if data.startswith(b"\x93NUMPY") else decode_grey(data, str(path))
    refuse_if(
        not np.isfinite(depth).all(), f"{path}: the depth map has NaN or infinities; replace them with a far distance"
    )
    if depth.min() == depth.max():
        raise UserError(f"{path}: all values of the depth map are {depth.min():g}; give one that varies")
    return depth


def _array(data: bytes, path: str | Path) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        numbers = array.astype(np.float32) if array.dtype.kind in "fiu" else None
    except Exception as error:  # numpy raises ValueError, EOFError, MemoryError and others
        raise UserError(f"{path}: not an array that can be read ({' '.join(str(error).split())})") from error
    refuse_if(
        numbers is None
        or numbers.ndim < 2
        or numbers.size != numbers.shape[-1] * numbers.shape[-2]
        or not numbers.size,
        f"{path}: has {array.dtype} of shape {array.shape}; a depth map is numbers of shape (H, W)",
    )
    return numbers.reshape(numbers.shape[-2:])


def fit_map(values: np.ndarray, height: int, width: int) -> Tensor:
    """Return the centre crop of a map (H, W), scaled to (1, height, width), with the crop of `transforms.fit`."""
    top, left, rows, columns = centre_crop(*values.shape, height, width)
    cropped = values[top : top + rows, left : left + columns]
    return resize(torch.from_numpy(np.ascontiguousarray(cropped))[None], height, width)
