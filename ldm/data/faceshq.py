"""CelebA-HQ and FFHQ under the names of public configs. The user provides lists and images below `data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.data.listed import ListedImages, listed_images, read_list, scaled_and_cropped


class FacesBase(ListedImages):
    """Faces of a list, cropped to the centre square and scaled to `size`. An item also has the `class` of the subclass.

    Args:
        size: side in pixels; None for no scaling.
        keys: labels to keep, among `file_path_` and `class`; None for all.
        txt_file: one path per line, relative to `data_root`.
        data_root: folder of the images, or of `.npy` arrays (1, 3, H, W) as in CelebA-HQ.
    """

    NUMBER = 0  # number of the data set, for mixtures

    def __init__(
        self,
        size: int | None,
        keys: Sequence[str] | None,
        txt_file: str | Path,
        data_root: str | Path,
    ) -> None:
        names = read_list(txt_file, "the faces")
        items = listed_images(data_root, names, "the faces")
        super().__init__(items, scaled_and_cropped(size), {"class": [self.NUMBER] * len(items)})
        self.keys = keys

    def labels_of(self, index: int) -> dict[str, object]:
        labels = super().labels_of(index)
        return labels if self.keys is None else {key: labels[key] for key in self.keys if key in labels}


class CelebAHQTrain(FacesBase):
    """Training images of CelebA-HQ."""

    def __init__(
        self,
        size: int | None = None,
        keys: Sequence[str] | None = None,
        txt_file: str | Path = "data/celebahqtrain.txt",
        data_root: str | Path = "data/celebahq",
    ) -> None:
        super().__init__(size, keys, txt_file, data_root)


class CelebAHQValidation(FacesBase):
    """Validation images of CelebA-HQ."""

    def __init__(
        self,
        size: int | None = None,
        keys: Sequence[str] | None = None,
        txt_file: str | Path = "data/celebahqvalidation.txt",
        data_root: str | Path = "data/celebahq",
    ) -> None:
        super().__init__(size, keys, txt_file, data_root)


class FFHQTrain(FacesBase):
    """Training images of FFHQ."""

    NUMBER = 1

    def __init__(
        self,
        size: int | None = None,
        keys: Sequence[str] | None = None,
        txt_file: str | Path = "data/ffhqtrain.txt",
        data_root: str | Path = "data/ffhq",
    ) -> None:
        super().__init__(size, keys, txt_file, data_root)


class FFHQValidation(FacesBase):
    """Validation images of FFHQ."""

    NUMBER = 1

    def __init__(
        self,
        size: int | None = None,
        keys: Sequence[str] | None = None,
        txt_file: str | Path = "data/ffhqvalidation.txt",
        data_root: str | Path = "data/ffhq",
    ) -> None:
        super().__init__(size, keys, txt_file, data_root)
