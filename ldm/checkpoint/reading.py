"""Opening of checkpoints of either format, which is recognised by the content."""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ldm.checkpoint.archive import ZipArchive, load_legacy
from ldm.checkpoint.builders import UnreadTensor
from ldm.checkpoint.diffusers_folder import DiffusersFolder, is_diffusers_folder, read_folder
from ldm.checkpoint.formats import SAFETENSORS_NAMES
from ldm.checkpoint.keys import CONDITIONER, has_part
from ldm.checkpoint.mapped import MappedFile
from ldm.checkpoint.markers import PREDICTION_TYPE, STATED, with_markers
from ldm.checkpoint.other_models import other_model
from ldm.checkpoint.pickled import without_left_out
from ldm.files import open_file
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)

_FORMAT = "format"  # metadata of the framework that wrote a file
_SAFETENSORS_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}

_MOST_NESTED = 3  # levels of dicts above the weights
# Entries of embeddings and hypernetworks.
_OF_BESIDE = {"string_to_param", "string_to_token", "layer_structure"}

# Other files that users name as a checkpoint: first bytes, and message.
_MISTAKEN = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull`, or download it"),
    (b"<", "looks like a web page: the download failed (a login or a licence page?); download it again"),
    (b"PK\x05\x06", "an empty zip archive; download or copy it again"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7-zip archive; unpack it first"),
    (b"GGUF", "a GGUF file; this program reads .ckpt and .safetensors"),
)


@dataclass(frozen=True)
class OpenCheckpoint:
    """Content of a checkpoint file or folder, with memory-mapped tensors, and its metadata.

    `metadata` is from the header of a `.safetensors`, or from the texts under `"metadata"` in a `.ckpt`. `folder` tells
    of a folder in the layout of diffusers.
    """

    content: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    folder: DiffusersFolder | None = None


def open_checkpoint(path: str | Path, mmap: bool = True) -> OpenCheckpoint:
    """Open the checkpoint at `path`; see `load_checkpoint`."""
    path = Path(path)
    if path.is_dir() and is_diffusers_folder(path):
        return _open_folder(path, mmap)
    head = _head(path)
    try:
        file = MappedFile(path, mapped=mmap)
        if _is_safetensors(head):
            content = _load_safetensors(path, file)
            file.check_unchanged()
            return OpenCheckpoint(content, content["metadata"])
        if head.startswith(b"PK\x03\x04"):
            content = ZipArchive(path, file).load()
        elif head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            content = load_legacy(file)
        else:
            raise UserError(f"{path}: not a checkpoint (neither .ckpt nor .safetensors content); name another file")
        content, left_out = without_left_out(content)
        file.check_unchanged()
    except (UserError, MemoryError):
        raise
    except UnreadTensor as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # damaged or hostile files raise various exceptions
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path}: damaged, or not a PyTorch checkpoint ({reason}); download or copy it again"
        ) from error
    if left_out:
        log.info("%s: objects dropped that are neither tensors nor plain data: %s", path, ", ".join(left_out[:20]))
    if not isinstance(content, dict):
        held = f"an object of {left_out[0]}" if left_out else type(content).__name__
        raise UserError(f"{path}: has {held}, not a dict of weights; save the model's state_dict() instead")
    metadata = content.get("metadata")
    is_text = isinstance(metadata, dict) and all(isinstance(text, str) for pair in metadata.items() for text in pair)
    return OpenCheckpoint(content, metadata if is_text else {})


def _open_folder(path: Path, mmap: bool) -> OpenCheckpoint:
    """Open a folder in the layout of diffusers. Its markers and metadata tell what its scheduler predicts."""
    metadata: dict[str, str] = {}
    files: list[Path] = []

    def open_weights(file: Path) -> dict[str, torch.Tensor]:
        opened = open_checkpoint(file, mmap)
        files.append(file)
        for key, text in opened.metadata.items():  # those of the UNet, which is the first part, take precedence
            metadata.update({} if key == _FORMAT or key in metadata else {key: text})
        return weights_of(opened.content, file)

    folder, weights, (predicts, zero_snr) = read_folder(path, open_weights)
    if predicts is not None:
        metadata[PREDICTION_TYPE] = STATED[predicts]
        if predicts == "v" and (zero_snr or has_part(weights, CONDITIONER)):
            weights = with_markers(weights, predicts, zero_snr)
    return OpenCheckpoint({"state_dict": weights, "metadata": metadata}, metadata, replace(folder, files=files))


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """Return the content of a `.ckpt`, or `{"state_dict": ..., "metadata": ...}` of a `.safetensors` or a folder.

    No code of the file is run. Objects that are neither tensors nor plain data are dropped and logged. Tensors are on
    the CPU, without gradients, and memory-mapped, or in memory with `mmap=False`. Checksums in the file are verified.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint.
    """
    return open_checkpoint(path, mmap).content


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights of a file or a diffusers folder by key, also if they are nested under `"state_dict"`.

    Raises:
        UserError: the file is missing, damaged, or has no weights.
    """
    return weights_of(load_checkpoint(path), path)


def weights_of(content: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a loaded checkpoint by key. `path` is for messages.

    The tensors are in `state_dict`, at the top level, or in the only dict of tensors of the file, which may lie in the
    only dict of a level above it.
    """
    if _OF_BESIDE.intersection(content):  # of any program, whatever it names the rest
        raise UserError(f"{path}: {other_model([key for key in content if isinstance(key, str)])}")
    refuse_if(
        "param_groups" in content and "state_dict" not in content,
        f"{path}: the state of an optimizer, without weights; name the file of the model beside it",
    )
    nested = content.get("state_dict", content)
    for _ in range(_MOST_NESTED):
        if not isinstance(nested, dict) or any(isinstance(value, torch.Tensor) for value in nested.values()):
            break
        inner = {name: value for name, value in nested.items() if _is_weights(value)}
        if len(inner) > 1:
            names = ", ".join(f"{name!s:.40}" for name in inner)
            raise UserError(f"{path}: has several dicts of weights ({names}); save one of them as state_dict")
        inner = inner or {name: value for name, value in nested.items() if isinstance(value, dict)}
        nested = next(iter(inner.values())) if len(inner) == 1 else nested
    refuse_if(not isinstance(nested, dict), f"{path}: its state_dict is {type(nested).__name__}, not a dict of tensors")
    weights = {key: value for key, value in nested.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not weights:
        keys = ", ".join(f"{key!r:.40}" for key in list(nested)[:5])
        raise UserError(f"{path}: has no weights (keys: {keys or 'none'}); name a file with a state_dict")
    for key in weights:
        if not key.isprintable():  # messages have one line
            raise UserError(f"{path}: {key!r:.80} is not the name of a weight; the file is damaged, download it again")
    return weights


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(part, torch.Tensor) for part in value.values())


def _head(path: Path) -> bytes:
    """Return the first bytes of the file.

    Raises:
        UserError: the file is missing or empty, or its first bytes are those of another kind of file.
    """
    refuse_if(path.is_dir(), f"{path}: a folder, and none of diffusers; name the .ckpt or .safetensors file in it")
    try:
        with open_file(path) as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file") from error
    refuse_if(not head, f"{path}: empty file; download or copy it again")
    for beginning, meaning in _MISTAKEN:
        refuse_if(head.lstrip().startswith(beginning) and not _is_safetensors(head), f"{path}: {meaning}")
    return head


def _is_safetensors(head: bytes) -> bool:
    """Return True if a file begins with a binary 64-bit length and a JSON object."""
    return head[8:9] == b"{" and not all(32 <= byte < 127 for byte in head[:8])


def _load_safetensors(path: Path, file: MappedFile) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt"):  # checks sizes, overlaps and gaps in the header
            pass
    except SafetensorError as error:
        if os.strerror(errno.ENOMEM) in str(error):
            raise MemoryError(str(error)) from error
        raise UserError(f"{path}: damaged or truncated safetensors file ({error}); download it again") from error
    length = int.from_bytes(file.read(0, 8), "little")
    header = json.loads(file.read(8, length))
    metadata = header.pop("__metadata__", {})
    weights = {}
    for key, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise UserError(f"{path}: tensor {key!r} has dtype {entry['dtype']}, which is not supported")
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
        weights[key] = file.shaped(dtype, 8 + length + entry["data_offsets"][0], shape)
    return {"state_dict": weights, "metadata": metadata}
