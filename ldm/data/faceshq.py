"""CelebA-HQ and FFHQ under the names of public configs: lists and images are the user's, below `data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.data.listed import ListedImages, listed_images, read_list, scaled_and_cropped


class FacesBase(ListedImages):
    """Faces that a list names: the centre square of `size`. An item also has `class`, as the subclass says.

    Args:
        size: pixels of a side; None leaves images as they are.
        keys: labels to keep, of `file_path_` and `class`; None keeps all.
        txt_file: one path per line, relative to `data_root`.
        data_root: the folder of the images, or of `.npy` arrays (1, 3, H, W) as CelebA-HQ comes in.
    """

    NUMBER = 0  # which data set it is, where two are mixed

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
    """CelebA-HQ to train on."""

    def __init__(
        self,
        size: int | None = None,
        keys: Sequence[str] | None = None,
        txt_file: str | Path = "data/celebahqtrain.txt",
        data_root: str | Path = "data/celebahq",
    ) -> None:
        super().__init__(size, keys, txt_file, data_root)


class CelebAHQValidation(FacesBase):
    """CelebA-HQ to validate on."""

    def __init__(
        self,
        size: int | None = None,
        keys: Sequence[str] | None = None,
        txt_file: str | Path = "data/celebahqvalidation.txt",
        data_root: str | Path = "data/celebahq",
    ) -> None:
        super().__init__(size, keys, txt_file, data_root)


class FFHQTrain(FacesBase):
    """FFHQ to train on."""

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
    """FFHQ to validate on."""

    NUMBER = 1

    def __init__(
        self,
        size: int | None = None,
        keys: Sequence[str] | None = None,
        txt_file: str | Path = "data/ffhqvalidation.txt",
        data_root: str | Path = "data/ffhq",
    ) -> None:
        super().__init__(size, keys, txt_file, data_root)
