"""Open Images under the names of CompVis' configs, from a folder of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.data.listed import ListedImages, folder_images, scaled_and_cropped
from ldm.data.superresolution import PairedImages

_WHAT = "the images of Open Images"
_TRAIN, _VALIDATION = "data/openimages/train", "data/openimages/validation"


class FullOpenImagesTrain(ListedImages):
    """Training images: the smaller side scaled to `size`, and a random square crop of `crop_size`."""

    def __init__(self, size: int | None = None, crop_size: int | None = None, data_root: str | Path = _TRAIN) -> None:
        super().__init__(folder_images(data_root, _WHAT), scaled_and_cropped(size, crop_size, random_crop=True))


class FullOpenImagesValidation(ListedImages):
    """Validation images: the smaller side scaled to `size`, and a square centre crop of `crop_size`."""

    def __init__(
        self, size: int | None = None, crop_size: int | None = None, data_root: str | Path = _VALIDATION
    ) -> None:
        super().__init__(folder_images(data_root, _WHAT), scaled_and_cropped(size, crop_size))


class SuperresOpenImagesAdvancedTrain(PairedImages):
    """Training images for super-resolution; see `PairedImages`."""

    def __init__(self, data_root: str | Path = _TRAIN, **kwargs: Any) -> None:
        super().__init__(ListedImages(folder_images(data_root, _WHAT), scaled_and_cropped(None)), **kwargs)


class SuperresOpenImagesAdvancedValidation(PairedImages):
    """Validation images for super-resolution; see `PairedImages`."""

    def __init__(self, data_root: str | Path = _VALIDATION, **kwargs: Any) -> None:
        super().__init__(ListedImages(folder_images(data_root, _WHAT), scaled_and_cropped(None)), **kwargs)
