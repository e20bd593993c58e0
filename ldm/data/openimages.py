"""Open Images under the names of CompVis' configs: every image below a folder of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.data.listed import ListedImages, folder_images, scaled_and_cropped
from ldm.data.superresolution import PairedImages

_WHAT = "the images of Open Images"
_TRAIN, _VALIDATION = "data/openimages/train", "data/openimages/validation"


class FullOpenImagesTrain(ListedImages):
    """The images to train on: the smaller side scaled to `size`, and a random square of `crop_size`."""

    def __init__(self, size: int | None = None, crop_size: int | None = None, data_root: str | Path = _TRAIN) -> None:
        super().__init__(folder_images(data_root, _WHAT), scaled_and_cropped(size, crop_size, random_crop=True))


class FullOpenImagesValidation(ListedImages):
    """The images to validate on: the smaller side scaled to `size`, and the middle square of `crop_size`."""

    def __init__(
        self, size: int | None = None, crop_size: int | None = None, data_root: str | Path = _VALIDATION
    ) -> None:
        super().__init__(folder_images(data_root, _WHAT), scaled_and_cropped(size, crop_size))


class SuperresOpenImagesAdvancedTrain(PairedImages):
    """The images to train super-resolution on; see `PairedImages`."""

    def __init__(self, data_root: str | Path = _TRAIN, **kwargs: Any) -> None:
        super().__init__(ListedImages(folder_images(data_root, _WHAT), scaled_and_cropped(None)), **kwargs)


class SuperresOpenImagesAdvancedValidation(PairedImages):
    """The images to validate super-resolution on; see `PairedImages`."""

    def __init__(self, data_root: str | Path = _VALIDATION, **kwargs: Any) -> None:
        super().__init__(ListedImages(folder_images(data_root, _WHAT), scaled_and_cropped(None)), **kwargs)
