"""LSUN under CompVis' names. The user provides lists of file names and folders below `data/lsun`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ldm.data.listed import ListedImages, listed_images, read_list
from ldm.images.augmentations import RandomHorizontalFlip
from ldm.images.pixels import crop, filter_of, resize
from ldm.util import check_number


class LSUNBase(ListedImages):
    """Images of a list, cropped to the centre square, scaled to `size` and randomly flipped.

    An item also has `relative_file_path_`.

    Args:
        txt_file: one path per line, relative to `data_root`.
        size: side in pixels; None for no scaling.
        interpolation: name of a filter; `linear` is bilinear.
        flip_p: probability of a flip.
    """

    def __init__(
        self,
        txt_file: str | Path,
        data_root: str | Path,
        size: int | None = None,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
    ) -> None:
        check_number("size", size, least=1, unit="pixels", optional=True)
        names = read_list(txt_file, "the images of this part of LSUN")
        super().__init__(
            listed_images(data_root, names, "the images of LSUN"), self.prepare, {"relative_file_path_": names}
        )
        self.size = size
        self.filter = filter_of("bilinear" if interpolation == "linear" else interpolation)
        self.flip = RandomHorizontalFlip(flip_p)

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return the centre square of `image`, scaled and randomly flipped."""
        side = min(image.size)
        square = crop(image, (image.height - side) // 2, (image.width - side) // 2, side, side)
        if self.size is not None:
            square = resize(square, self.size, self.size, self.filter)
        return self.flip(square)


class LSUNChurchesTrain(LSUNBase):
    """Training images of outdoor churches."""

    def __init__(
        self,
        txt_file: str | Path = "data/lsun/church_outdoor_train.txt",
        data_root: str | Path = "data/lsun/churches",
        **kwargs: object,
    ) -> None:
        super().__init__(txt_file, data_root, **kwargs)


class LSUNChurchesValidation(LSUNBase):
    """Validation images of outdoor churches, without flips."""

    def __init__(
        self,
        txt_file: str | Path = "data/lsun/church_outdoor_val.txt",
        data_root: str | Path = "data/lsun/churches",
        flip_p: float = 0.0,
        **kwargs: object,
    ) -> None:
        super().__init__(txt_file, data_root, flip_p=flip_p, **kwargs)


class LSUNBedroomsTrain(LSUNBase):
    """Training images of bedrooms."""

    def __init__(
        self,
        txt_file: str | Path = "data/lsun/bedrooms_train.txt",
        data_root: str | Path = "data/lsun/bedrooms",
        **kwargs: object,
    ) -> None:
        super().__init__(txt_file, data_root, **kwargs)


class LSUNBedroomsValidation(LSUNBase):
    """Validation images of bedrooms, without flips."""

    def __init__(
        self,
        txt_file: str | Path = "data/lsun/bedrooms_val.txt",
        data_root: str | Path = "data/lsun/bedrooms",
        flip_p: float = 0.0,
        **kwargs: object,
    ) -> None:
        super().__init__(txt_file, data_root, flip_p=flip_p, **kwargs)


class LSUNCatsTrain(LSUNBase):
    """Training images of cats."""

    def __init__(
        self,
        txt_file: str | Path = "data/lsun/cat_train.txt",
        data_root: str | Path = "data/lsun/cats",
        **kwargs: object,
    ) -> None:
        super().__init__(txt_file, data_root, **kwargs)


class LSUNCatsValidation(LSUNBase):
    """Validation images of cats, without flips."""

    def __init__(
        self,
        txt_file: str | Path = "data/lsun/cat_val.txt",
        data_root: str | Path = "data/lsun/cats",
        flip_p: float = 0.0,
        **kwargs: object,
    ) -> None:
        super().__init__(txt_file, data_root, flip_p=flip_p, **kwargs)
