"""Loss masks of images: `name.mask.png` beside `name.jpg`, a member of a tar, or the alpha channel. White trains."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from ldm.images.captions import same_name
from ldm.images.decode import decode_alpha, decode_grey, has_transparency, is_image
from ldm.images.decode_lock import DecodeLock
from ldm.images.find import MASK_ENDING, ImageItem, is_mask, kind_error
from ldm.images.transforms import Crop
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

_FIRST = 100  # images whose pixels are looked at before the names of all
_PROPORTIONS = 0.02  # tolerance for the aspect ratios of an image and its mask


def with_masks(items: Sequence[ImageItem]) -> list[ImageItem]:
    """Return the images among `items`, each with the mask beside it, if there is one.

    Raises:
        UserError: no image has a mask file or transparent pixels.
    """
    folders: dict[Path, dict[str, Path]] = {}
    found: list[ImageItem] = []
    for item in items:
        if item.span is None and is_mask(item.path):
            continue
        folder = item.path.parent
        if item.span is None and folder not in folders:
            folders[folder] = masks_in(folder)
        found.append(with_mask(item, folders[folder]) if item.span is None else item)
    used = {item.mask.path for item in found if item.mask}
    alone = [item.name for item in items if item.span is None and is_mask(item.path) and item.path not in used]
    warn_of_alone(len(alone), *alone[:1])
    if not has_masks(found):
        raise no_masks()
    return found


def with_mask(item: ImageItem, masks: Mapping[str, Path]) -> ImageItem:
    """Return `item` with that of the `masks` in its folder that it has, if any."""
    path = masks.get(same_name(item.path.stem))
    if path is None:
        return item
    name = PurePosixPath(item.name).with_name(path.name)
    return replace(item, mask=ImageItem(str(name), path, error=kind_error(path)))


def warn_of_alone(count: int, example: str = "") -> None:
    """Log a warning of `count` masks without an image, such as `example`, if there are any."""
    if count:
        logger.warning("%d masks skipped, because no image is beside them, such as %s", count, example)


def has_masks(images: Iterable[ImageItem]) -> bool:
    """Return True if one of `images`, which are read up to three times, has a mask or transparent pixels."""
    if any(item.mask or is_transparent(item) for item in islice(images, _FIRST)):
        return True
    return any(item.mask for item in images) or any(map(is_transparent, images))


def no_masks() -> UserError:
    """Return the error of images without masks."""
    return UserError(
        "--loss-masks: no image has a mask; give name.mask.png beside name.jpg, white where the image is trained, "
        "or images with transparent pixels"
    )


def warn_of_masks(items: Sequence[ImageItem]) -> None:
    """Log a warning if `items` have images named like masks."""
    names = [item.name for item in items if item.span is None and is_mask(item.path)]
    warn_of_mask_names(len(names), *names[:1])


def warn_of_mask_names(count: int, example: str = "") -> None:
    """Log a warning of `count` images with names like those of masks, such as `example`, if there are any."""
    if count:
        logger.warning(
            "%d images are named like loss masks, such as %s, but are encoded as images; give --loss-masks",
            count, example,
        )  # fmt: skip


def read_loss_masks(
    item: ImageItem, crops: Sequence[Crop], size: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray | None:
    """Return the mask of an image of `size` in each of `crops`, float16 (K, 1, h, w) of the latent's `shape` (h, w).

    A value is the mean over the area of its cell. Return None for an image without a mask.

    Raises:
        UserError: the mask cannot be decoded, has transparent pixels, or has other proportions than the image.
    """

    def fitted(mask: np.ndarray | None) -> np.ndarray | None:
        if mask is None:
            return None
        height, width = mask.shape
        if abs(height * size[1] / (width * size[0]) - 1) > _PROPORTIONS:
            raise UserError(
                f"{(item.mask or item).name}: the mask has {width}x{height} pixels, but the image {size[1]}x{size[0]}; "
                "the aspect ratios must be equal"
            )
        scale = height / size[0], width / size[1]
        return np.stack([_cells(mask, crop, scale, shape) for crop in crops])[:, None].astype(np.float16)

    return item.mask.read(fitted, _decode_mask) if item.mask else item.read(fitted, _decode_alpha)


def _cells(mask: np.ndarray, crop: Crop, scale: tuple[float, float], shape: tuple[int, int]) -> np.ndarray:
    """Return the means (h, w) of the cells of a crop of `mask` (H, W). `scale` leads from the crop to the mask."""
    top, left, rows, columns = crop
    down = _shares(top * scale[0], rows * scale[0], shape[0], mask.shape[0])
    across = _shares(left * scale[1], columns * scale[1], shape[1], mask.shape[1])
    return (down @ mask @ across.T).clip(0, 1)


def _shares(start: float, length: float, cells: int, pixels: int) -> np.ndarray:
    """Return the share of each of `pixels` in each of `cells` equal parts of a line, float32 (cells, pixels)."""
    edges = start + length * np.arange(cells + 1) / cells
    places = np.arange(pixels)
    covered = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    return (covered.clip(0, None) * cells / length).astype(np.float32)


def masks_in(folder: Path) -> dict[str, Path]:
    """Return the masks in `folder` by the name of their image without its extension."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:  # the images there cannot be read either
        return {}
    masks = [path for path in paths if is_mask(path) and is_image(path)]
    return {same_name(path.stem[: -len(MASK_ENDING)]): path for path in reversed(masks)}


def _decode_mask(data: bytes, name: str, lock: DecodeLock) -> np.ndarray:
    mask = decode_grey(data, name, lock)
    refuse_if(
        has_transparency(data, name, lock),
        f"{name}: a mask with transparent pixels; save it in black, grey and white alone",
    )
    return mask


def _decode_alpha(data: bytes, name: str, lock: DecodeLock) -> np.ndarray | None:
    return decode_alpha(data, name, lock) if has_transparency(data, name, lock) else None


def is_transparent(item: ImageItem) -> bool:
    """Return True if the image can be read and has transparent pixels."""
    try:
        return item.read(decode=has_transparency)
    except Exception:  # a damaged image, reported when it is encoded
        return False
