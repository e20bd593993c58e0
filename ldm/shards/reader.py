"""Reader of pre-encoded samples in local tar shards, with random access by offset.

The headers of each shard are read once. This has three effects: an epoch is a permutation of all samples for any number
of workers, a set may have fewer samples than workers, and wrong samples are found before training starts.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from ldm.files import open_file, read_span
from ldm.identity import Identity, check_identity, identity_of_path, with_retries
from ldm.shards import npy
from ldm.shards.sample import (
    CAPTION,
    CONTEXT,
    LATENT,
    MAPS,
    NUMBERED,
    ORIGIN,
    POOLED,
    SIZE_ENTRIES,
    TEACHER_KEYS,
    TEXT_KEYS,
    caption_count,
    is_array,
    member_extension,
    number_types,
    numbered,
    plain,
    with_caption,
)
from ldm.shards.tar import TarSample, index_tar
from ldm.util import UserError, nearest, refuse_if

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ABSENT = {CAPTION: "", ORIGIN: None}  # values of missing members
_MOST = 1 << 24  # side in pixels; float32 is exact for integers up to this one
_OF_FAMILIES = (POOLED, *MAPS, *SIZE_ENTRIES)  # members for certain model families
_ENCODE_AGAIN = "encode the images again with the release that training starts from"


def find_member(key: str, members: Mapping[str, T], optional: Container[str], sample: str, where: str) -> T | None:
    """Return the member of `key` from `members`, which are by extension. A missing member of `optional` is None.

    Raises:
        UserError: the `sample` of the shard `where` lacks a required member.
    """
    extension = member_extension(key)
    if extension not in members and key not in optional:
        hint = nearest(extension, list(members))
        if key in TEACHER_KEYS:
            hint = "; write the teacher's predictions with tools/make_prior.py --teacher, or set prior_target: data"
        if plain(key) in _OF_FAMILIES:
            hint = f", which this model family needs; {_ENCODE_AGAIN}"
        raise UserError(f"{where}: sample {sample!r} has no member {extension!r}{hint}")
    return members.get(extension)


def numbered_keys(keys: Iterable[str], members: Mapping[str, Any]) -> list[str]:
    """Return `keys` and the further numbered members that `members` has, by extension, of keys in `NUMBERED`."""
    found: list[str] = []
    for key in keys:
        found.append(key)
        number = 1
        while key in NUMBERED and member_extension(further := numbered(key, number)) in members:
            found.append(further)
            number += 1
    return found


def decode_member(key: str, data: bytearray, name: str) -> Any:
    """Return the value of one member: an array, a string (`txt`), parsed JSON (`json`), or a size in it, float32 (2,).

    Raises:
        UserError: the member cannot be decoded, or an array is not finite. The message names `name`.
    """
    if not is_array(key):
        try:
            text = data.decode("utf-8")
            content = text if key == CAPTION else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: {error}") from error
        return content if key in TEXT_KEYS else _size(content, SIZE_ENTRIES[key], name)
    array = npy.decode(data, name, number_types(key))
    if not np.isfinite(array).all():
        raise UserError(f"{name}: has NaN or infinite values; encode it again")
    return array


def _size(content: Any, entry: str, name: str) -> np.ndarray:
    """Return the `entry` of a sample's parsed `json`, float32 (2,)."""
    value = content.get(entry) if isinstance(content, dict) else None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 <= n <= _MOST for n in value):
        found = "no" if value is None else f"{value!r:.80} as its"
        raise UserError(f"{name}: has {found} {entry}, which must be two whole numbers of pixels; {_ENCODE_AGAIN}")
    return np.array(value, np.float32)


def check_map(key: str, shape: tuple[int, ...], latent: tuple[int, ...], name: str) -> None:
    """Raise `UserError` unless `key` has the height and width of its sample's latent."""
    if plain(key) in MAPS and shape[1:] != latent[1:]:
        raise UserError(f"{name}: shape {shape}, but the latent has {latent}; height and width must be equal")


def one_caption(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` without the dimension for several captions, if it has one."""
    return shape if caption_count(key, shape) is None else shape[1:]


def check_shape(key: str, shape: tuple[int, ...], first: tuple[int, ...], image: bool, name: str) -> None:
    """Raise `UserError` unless `shape` can share a set with the shape of the `first` sample.

    Images, (channels, height, width), may differ in height and width. All other arrays must have equal shapes, except
    for the number of captions, which `shape` lacks.
    """
    refuse_if(
        (image and len(shape) != 3, f"{name}: shape {shape} is not (channels, height, width)"),
        (
            (shape[0] != first[0]) if image else (shape != first),
            f"{name}: shape {shape}, but {key} of the first sample has shape {first}",
        ),
    )


class ShardDataset(Dataset):
    """Data set of local shards. A sample is a dict with the `keys`, `"txt"` (the caption) and `"__key__"`.

    Arrays are numpy arrays, float16 or float32 as stored: `first_stage_key` (channels, h, w), and `cond_stage_key`,
    such as (77, 768), unless it is None. Of several captions, a sample has the first, or all if `keeps_captions` is
    set. `extra` names further members, such as `TEACHER_KEYS`, `MAPS`, `SIZE_ENTRIES`, or `"json"`, which is None for a
    sample without it. Of the `NUMBERED` members, those of the first sample are read.

    Raises:
        UserError: a shard is damaged, a sample lacks a key, or the shapes of samples differ.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        first_stage_key: str = LATENT,
        cond_stage_key: str | None = CONTEXT,
        extra: Sequence[str] = (),
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.keeps_captions = False
        self.first_stage_key = first_stage_key
        keys = [first_stage_key, cond_stage_key, CAPTION, *extra]
        self.keys = [key for key in dict.fromkeys(keys) if key is not None]
        self.has_several_captions = False  # `open_shards` sets it for a set of which only the texts are read
        self.reads_encodings = cond_stage_key is not None and cond_stage_key not in TEXT_KEYS  # of captions
        self.optional = _ABSENT.keys() - {first_stage_key, cond_stage_key}
        self.sample_keys: list[str] = []
        self.shapes: dict[str, dict[tuple[int, ...], str]] = {
            key: {} for key in self.keys
        }  # shape → dtype, in the order of the samples
        self._identities: list[Identity] = []  # by the number of the path
        shards, spans, groups = [], [], []
        for number, path in enumerate(self.paths):
            self._identities.append(identity_of_path(path))
            samples = index_tar(path)
            if not samples:
                logger.warning("%s holds no samples", path)
                continue
            with open_file(path) as file:
                check_identity(file.fileno(), path, self._identities[number])
                if not self.sample_keys:
                    self.keys = numbered_keys(self.keys, samples[0].spans)
                    self.shapes = {key: {} for key in self.keys}
                for sample in samples:
                    self.sample_keys.append(sample.key)
                    shards.append(number)
                    found = [find_member(key, sample.spans, self.optional, sample.key, str(path)) for key in self.keys]
                    spans.append([span or (-1, -1) for span in found])
                    groups.append(self._check(sample, path, file.fileno()))
        if not self.sample_keys:
            count = "1 shard," if len(self.paths) == 1 else f"{len(self.paths)} shards, such as"
            raise UserError(f"no samples in {count} {self.paths[0]}")
        # Arrays, not lists: reference counting would copy a list into each forked worker.
        self._shards = np.asarray(shards, dtype=np.int32)
        self._spans = np.asarray(spans, dtype=np.int64)  # (samples, keys, 2): offset and size, -1 if missing
        self._groups = np.asarray(groups, dtype=np.int32)

    def _check(self, sample: TarSample, path: Path, descriptor: int) -> int:
        """Check a sample's sizes and the headers of its arrays; return the number of its latent's shape among all."""
        latent, group = (), 0
        for key in self.keys:
            if key in TEXT_KEYS:
                continue
            offset, size = sample.spans[member_extension(key)]
            name = f"{path}: {sample.key}.{member_extension(key)}"
            if not is_array(key):
                decode_member(key, read_span(descriptor, offset, size, name), name)
                continue
            start = read_span(descriptor, offset, min(size, npy.HEADER_BYTES), name)
            header = npy.read_header(start, size, name, number_types(key))
            known, shape = self.shapes[key], one_caption(key, header.shape)
            self.has_several_captions |= shape != header.shape
            if shape not in known:
                image = key == self.first_stage_key or plain(key) in MAPS
                check_shape(key, shape, next(iter(known), shape), image, name)
                known[shape] = header.dtype.name
            if key == self.first_stage_key:
                latent, group = header.shape, list(known).index(header.shape)
            check_map(key, header.shape, latent, name)
        return group

    def __len__(self) -> int:
        return len(self.sample_keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self._shards[index])
        return with_retries(lambda: self._read(index, self.paths[number], self._identities[number]), self.paths[number])

    def _read(self, index: int, path: Path, identity: Identity) -> dict[str, Any]:
        sample: dict[str, Any] = {"__key__": self.sample_keys[index]}
        # Opened for each sample, because a set may have more shards than a process may open. Opening takes 10 µs.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            check_identity(descriptor, path, identity)
            for key, (offset, size) in zip(self.keys, self._spans[index].tolist(), strict=True):
                name = f"{path}: {sample['__key__']}.{member_extension(key)}"
                if size < 0:
                    sample[key] = _ABSENT[key]
                else:
                    sample[key] = decode_member(key, read_span(descriptor, offset, size, name), name)
        finally:
            os.close(descriptor)
        if self.keeps_captions or not self.has_several_captions:
            return sample
        return with_caption(sample, lambda count: 0, f"{path}: {sample['__key__']}")

    @property
    def shard_numbers(self) -> np.ndarray:
        """Numbers of the shards among `paths`, one per sample."""
        return self._shards

    def groups(self) -> list[np.ndarray]:
        """Return the sample numbers, one array per image shape. The samples of an array may share a batch."""
        return [np.flatnonzero(self._groups == group) for group in range(len(self.shapes[self.first_stage_key]))]
