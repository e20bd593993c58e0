"""Files of the size of a release that take no room on the disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_sparse(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write a .safetensors file with float16 zeros of these `shapes`, as a hole in the file."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(file.tell() + end)
