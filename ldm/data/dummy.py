"""Random images and captions, for tests of a model without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ldm.util import check_number

_LETTERS = "abcdefghijklmnopqrstuvwxyz "


class DummyData(Dataset):
    """Dataset of noise. An item is `{"jpg": float32 of `size`, "txt": 20 random letters}`.

    Args:
        length: number of items.
        size: shape of an image, such as [256, 256, 3].
    """

    def __init__(self, length: int, size: Sequence[int]) -> None:
        check_number("length", length, least=1)
        self.length = length
        self.size = tuple(size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        letters = torch.randint(0, len(_LETTERS), (20,)).tolist()
        return {"jpg": torch.randn(self.size), "txt": "".join(_LETTERS[letter] for letter in letters)}
