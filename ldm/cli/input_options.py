"""Command line options for inputs of sampling besides prompts: images, a mask, a depth map, sizes. Imports no torch."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.shards.sample import CROP, ORIGINAL_SIZE, TARGET_SIZE
from ldm.util import UserError, check_number, refuse_if

if TYPE_CHECKING:
    import numpy as np

    from ldm.models.diffusion.inputs import Inputs

logger = logging.getLogger(__name__)

STRENGTH = 0.75  # default of --strength
_SIZES = {"original_size": ORIGINAL_SIZE, "crop": CROP, "target_size": TARGET_SIZE}  # options, and names in a sample
_FILES = ("init_image", "image", "mask", "depth")
_SAME_PROPORTIONS = 1.05  # highest ratio of two proportions that rounding explains


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add the images, the mask, the depth map and the sizes that a model is conditioned on."""
    add = parser.add_argument
    add("--init-image", type=Path, metavar="FILE", help="start from this image instead of noise (image to image)")
    add(
        "--strength",
        type=float,
        help=f"with --init-image, share of the steps that run: near 0 keeps the image; default: {STRENGTH}",
    )
    add("--image", type=Path, metavar="FILE", help="image to repaint where --mask is white, or to edit as prompts say")
    add("--mask", type=Path, metavar="FILE", help="image of the size of --image, white where it is repainted")
    add("--depth", type=Path, metavar="FILE", help="depth map for a depth model, .npy or an image, lighter for nearer")
    add("--image-scale", type=float, help="guidance towards --image for a model that edits images; default: 1.5")
    pair = {"type": int, "nargs": 2}
    add("--original-size", **pair, metavar=("H", "W"), help="SDXL: size before the crop; default: the image's size")
    add("--crop", **pair, metavar=("TOP", "LEFT"), help="SDXL: corner at which the image is cropped; default: 0 0")
    add("--target-size", **pair, metavar=("H", "W"), help="SDXL: size after the crop; default: the image's size")


def check_input_options(options: argparse.Namespace) -> None:
    """Raise `UserError` for the first option of `add_input_options` that is out of range or lacks another."""
    strength = options.strength
    refuse_if(strength is not None and not 0 < strength <= 1, f"--strength {strength}: give a number above 0, up to 1")
    check_number("--image-scale", options.image_scale, whole=False, optional=True)
    for option in _SIZES:
        for value in getattr(options, option) or ():
            check_number(f"--{option.replace('_', '-')}", value, least=0 if option == "crop" else 1)
    refuse_if(
        strength is not None and options.init_image is None,
        f"--strength {strength}: give --init-image too, the image to start from",
    )
    refuse_if(
        options.mask is not None and options.image is None,
        f"--mask {options.mask}: give --image too, the image to repaint",
    )


@dataclass(frozen=True)
class InputFiles:
    """Decoded files by option, images uint8 (H, W, 3) and maps float32 (H, W), and the settings beside them.

    Args:
        sizes: sizes that condition SDXL, by their names in a sample.
    """

    arrays: Mapping[str, np.ndarray]
    paths: Mapping[str, Path]
    strength: float
    sizes: Mapping[str, Sequence[int]]

    def settings(self) -> dict[str, Any]:
        """Return the options as an image's metadata records them."""
        files = {name: str(path) for name, path in self.paths.items()}
        return files | ({"strength": self.strength} if "init_image" in files else {})

    def fitted(self, height: int, width: int) -> Inputs:
        """Return the inputs of a sample of `height` and `width` in pixels: the centre crop of each file, scaled.

        Raises:
            UserError: nothing is left of the mask at that size.
        """
        import torch

        from ldm.images.maps import fit_map
        from ldm.images.transforms import fit, to_range
        from ldm.models.diffusion.inputs import Inputs

        fitted = {}
        for name, array in self.arrays.items():
            if array.shape[:2] != (height, width):
                sizes = *reversed(array.shape[:2]), width, height
                logger.info("%s: %dx%d pixels, cropped and scaled to %dx%d", self.paths[name], *sizes)
            is_image = array.ndim == 3
            fitted[name] = (
                to_range(fit(torch.from_numpy(array), height, width)) if is_image else fit_map(array, height, width)
            )
        if "mask" in fitted and fitted["mask"].max() < 0.5:
            raise UserError(
                f"--mask {self.paths['mask']}: nothing of it is left at {width}x{height} pixels; paint a larger part"
            )
        init = fitted.pop("init_image", None)
        return Inputs(init=init, strength=1.0 if init is None else self.strength, sizes=self.sizes, **fitted)


def read_inputs(options: argparse.Namespace) -> InputFiles:
    """Read the files of `add_input_options`.

    Raises:
        UserError: a file cannot be decoded, or does not fit the image that it belongs to.
    """
    from ldm.files import MOST_IN_MEMBER, read_at_most
    from ldm.images.decode import decode_image
    from ldm.images.maps import read_depth, read_mask

    def read_image(path: Path) -> np.ndarray:
        return decode_image(read_at_most(path, MOST_IN_MEMBER), str(path))

    readers = dict(zip(_FILES, (read_image, read_image, read_mask, read_depth), strict=True))
    paths = {name: getattr(options, name) for name in _FILES if getattr(options, name) is not None}
    arrays = {name: readers[name](path) for name, path in paths.items()}
    _check_sizes(arrays, paths)
    sizes = {name: getattr(options, option) for option, name in _SIZES.items() if getattr(options, option) is not None}
    return InputFiles(arrays, paths, STRENGTH if options.strength is None else options.strength, sizes)


def _check_sizes(arrays: Mapping[str, np.ndarray], paths: Mapping[str, Path]) -> None:
    image = arrays.get("image", arrays.get("init_image"))
    if "mask" in arrays and arrays["mask"].shape != image.shape[:2]:
        raise UserError(
            f"--mask {paths['mask']}: has {_size(arrays['mask'])} pixels, --image {paths['image']} has "
            f"{_size(image)}; give a mask of the image's size"
        )
    if "depth" in arrays and image is not None:
        height, width = arrays["depth"].shape
        ratio = height * image.shape[1] / (width * image.shape[0])
        if max(ratio, 1 / ratio) > _SAME_PROPORTIONS:
            raise UserError(
                f"--depth {paths['depth']}: has {_size(arrays['depth'])} values, and its image {_size(image)} pixels; "
                "give a depth map of the image's proportions"
            )


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
