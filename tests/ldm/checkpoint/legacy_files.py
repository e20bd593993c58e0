"""Writer of files as PyTorch wrote them before 1.6, whose tensors may lie in views of storages.

Today's `torch.save` writes no such views, but files of 2018 to 2020 hold them.
"""

import io
import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass

import torch

from ldm.checkpoint.formats import STORAGE_NAMES, as_bytes


@dataclass(frozen=True)
class Storage:
    """A storage with the values of `data`, or the `view` (key, offset, size) of one."""

    key: str
    data: torch.Tensor
    view: tuple | None = None
    numel: int | None = None  # what the file claims, if that is not the truth


@dataclass(frozen=True)
class Layout:
    """A tensor as a file describes it."""

    storage: Storage
    offset: int
    size: tuple
    stride: tuple

    def __reduce__(self):
        args = (self.storage, self.offset, self.size, self.stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, args


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        kind = getattr(torch, STORAGE_NAMES[value.data.dtype])
        numel = value.data.numel() if value.numel is None else value.numel
        return "storage", kind, value.key, "cpu", numel, value.view


def legacy_file(content, storages):
    """Return the bytes of a file that holds `content`, whose `Layout`s lie in `storages`."""
    file = io.BytesIO()
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    for part in (0x1950A86A20F9469CFC6C, 1001, sizes):
        pickle.dump(part, file, protocol=2)
    _Pickler(file, protocol=2).dump(content)
    pickle.dump(sorted(storage.key for storage in storages), file, protocol=2)
    for storage in sorted(storages, key=lambda storage: storage.key):
        file.write(struct.pack("<q", storage.data.numel()) + as_bytes(storage.data).numpy().tobytes())
    return file.getvalue()


def random_legacy(rng, beside=None):
    """Return the bytes of a legacy file of a few tensors in storages and in views of them, chosen by `rng`.

    `beside` is what else the file holds.
    """
    dtypes = [dtype for dtype in STORAGE_NAMES if not dtype.is_complex]
    storages, content = [], {}
    for number in range(rng.randint(1, 3)):
        data = torch.tensor([rng.randint(0, 100) for _ in range(rng.randint(1, 40))]).to(rng.choice(dtypes))
        root = Storage(str(number), data)
        storages.append(root)
        places = [(root, data.numel())]
        for view in range(rng.randint(0, 3)):
            offset = rng.randint(0, data.numel())
            size = rng.randint(0, data.numel() - offset)
            places.append((Storage(root.key, data, (f"{number}/{view}", offset, size)), size))
        for place, room in places:
            for _ in range(rng.randint(1, 2)):
                content[f"w{len(content)}"] = _random_layout(rng, place, room)
    return legacy_file({"state_dict": content, **(beside or {})}, storages)


def _random_layout(rng, storage, room):
    offset = rng.randint(0, room)
    shape, stride, left = [], [], room - offset
    for _ in range(rng.randint(0, 3)):
        step = rng.randint(0, 3)
        side = rng.randint(0 if rng.random() < 0.1 else 1, 4)
        while side > 1 and (side - 1) * step > max(left - 1, 0):
            side -= 1
        left -= max(side - 1, 0) * step
        shape.append(side)
        stride.append(step)
    if room == offset and 0 not in shape:
        shape, stride = [*shape, 0], [*stride, 1]
    return Layout(storage, offset, tuple(shape), tuple(stride))
