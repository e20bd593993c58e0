"""Small sets of pre-encoded samples and small images, written to files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.shards import npy


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Write a plain tar of (name, data) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(number: int, f8_shape=(8, 4, 4), t5_shape=(7, 6)) -> list[tuple[str, bytes]]:
    """Return the members of one sample, whose first values are its number."""
    f8, t5 = np.full(f8_shape, number, np.float16), np.full(t5_shape, number + 0.5, np.float16)
    key = f"{number:06d}"
    return [
        (f"{key}.f8.npy", npy.encode(f8)),
        (f"{key}.t5.npy", npy.encode(t5)),
        (f"{key}.txt", f"caption {number}".encode()),
        (f"{key}.json", json.dumps({"source": key}).encode()),
    ]


def write_set(folder: Path, count: int, shards: int = 2, **shapes) -> str:
    """`count` samples over `shards` tars and the empty caption's encoding; returns the brace pattern."""
    for shard in range(shards):
        numbers = range(shard * count // shards, (shard + 1) * count // shards)
        members = [member for number in numbers for member in sample_members(number, **shapes)]
        write_tar(folder / f"set-{shard:03d}.tar", members)
    (folder / "null.t5.npy").write_bytes(npy.encode(np.full(shapes.get("t5_shape", (7, 6)), -1, np.float16)))
    return str(folder / f"set-{{000..{shards - 1:03d}}}.tar")


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    """`array` as PNG bytes."""
    file = io.BytesIO()
    Image.fromarray(array).convert(mode or Image.fromarray(array).mode).save(file, "PNG")
    return file.getvalue()


def write_masked_set(folder: Path, variants: int = 3, white: bool = False, crops: int | None = None) -> str:
    """Write six samples with different variants. The mask of variant k is k / 8 in its right half, or white."""
    random, members = np.random.default_rng(1), []
    for number in range(6):
        latents = random.standard_normal((variants, 8, 4, 4)).astype(np.float16)
        mask = np.ones((variants, 1, 4, 4), np.float16)
        if not white:
            mask[:, :, :, 2:] = np.arange(variants)[:, None, None, None] / 8
        arrays = {"f8": latents, "t5": np.full((77, 8), number, np.float16), "loss_mask": mask}
        sizes = {"original_size": [8, 8], "crop_top_left": [0, 0], "target_size": [4, 4]}
        views = [{"crop_top_left": [place, 0]} for place in range(1, variants if crops is None else crops)]
        for key, array in arrays.items():
            members.append((f"{number:03}.{key}.npy", npy.encode(array if variants > 1 or key == "t5" else array[0])))
        members.append((f"{number:03}.json", json.dumps({**sizes, "variants": views}).encode()))
    write_tar(folder / "s.tar", members)
    np.save(folder / "null.t5.npy", np.ones((77, 8), np.float16))
    return str(folder / "s.tar")
