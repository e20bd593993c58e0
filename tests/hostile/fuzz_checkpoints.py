"""Checkpoints for the fuzzer, our readers of them, and those of torch and safetensors."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ldm.checkpoint import open_checkpoint
from ldm.release.initial_checkpoint import loops_at_start
from ldm.training.resume import read_training_checkpoint
from tests.hostile.fuzz_values import strike, write_file
from tests.ldm.checkpoint.legacy_files import random_legacy

PICKLE_TOKENS = (b".", b"}", b")", b"t", b"R", b"\x81", b"(", b"K\xff", b"q\x01", b"h\x01", b"X\x01\0\0\0w", b"N")
_STRANGE = (None, True, -1, 1 << 70, float("nan"), "text", b"\xff", [], {}, (), [{}], {"a": 1}, torch.tensor(1.0))
_LOOPS = loops_at_start()


def _weights(rng: random.Random) -> dict[str, torch.Tensor]:
    base = torch.arange(24.0)
    choices = {
        "float": base[2:8].view(2, 3).t(),
        "half": base[:4].half(),
        "view": base[5:],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "bool": torch.tensor([True, False]),
        "float8": base[:4].to(torch.float8_e4m3fn),
        "complex": base[:2].to(torch.complex64),
        "uint16": base[:3].to(torch.uint16),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    return {key: choices[key] for key in rng.sample(list(choices), rng.randint(1, 4))}


def _content(rng: random.Random) -> dict[Any, Any]:
    plain_data = {"epoch": 3, "x": [1.5, None, True, (2, "é")], "bytes": b"\xff\0", "set": {1, 2}, 5: 2**70}
    kept = dict(rng.sample(list(plain_data.items()), rng.randint(0, 3)))
    return {"state_dict": _weights(rng), **kept}


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def make_zip(rng: random.Random) -> bytes:
    return _saved(_content(rng))


def make_legacy(rng: random.Random) -> bytes:
    plain_data = _content(rng)
    del plain_data["state_dict"]
    return random_legacy(rng, plain_data)


def read_checkpoint(folder: Path, data: bytes) -> Any:
    return open_checkpoint(write_file(folder, "model.ckpt", data)).content


def torch_load(data: bytes) -> Any:
    return _without_names(torch.load(io.BytesIO(data), weights_only=True))


def _without_names(value: Any) -> Any:
    """Return `value` without classes and functions, which ours leaves out: dropped from dicts, None elsewhere."""
    if isinstance(value, dict):
        pairs = [pair for pair in value.items() if not any(map(callable, pair))]
        return {key: _without_names(part) for key, part in pairs}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_without_names, value))
    return None if callable(value) else value


def make_sealed(rng: random.Random) -> bytes:
    """Return the pickle alone. It is damaged before it is put into an archive, so that the checksums are right."""
    with zipfile.ZipFile(io.BytesIO(_saved(_sealed_content()))) as archive:
        return archive.read("archive/data.pkl")


def _sealed_content() -> dict[str, Any]:
    return {**_content(random.Random("sealed")), "state_dict": {**_weights(random.Random(3)), "w": torch.arange(6.0)}}


def _seal(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(_sealed_content()))) as whole, zipfile.ZipFile(file, "w") as archive:
        for record in whole.infolist():
            is_pickle = record.filename == "archive/data.pkl"
            archive.writestr(record.filename, pickled if is_pickle else whole.read(record))
    return file.getvalue()


def read_sealed(folder: Path, data: bytes) -> Any:
    return read_checkpoint(folder, _seal(data))


def load_sealed(data: bytes) -> Any:
    return torch_load(_seal(data))


# Training checkpoints: their structure is mutated, and the file itself is whole.


def _training() -> dict[str, Any]:
    weights = {"model.w": torch.ones(2, 2), "model.b": torch.ones(2)}
    moments = {n: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)} for n in range(2)}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1]}]
    return {
        "epoch": 1,
        "global_step": 0,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": weights,
        "loops": _LOOPS,
        "callbacks": {"StepSeeds": {"seed": 23}, "ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": moments, "param_groups": groups}],
        "lr_schedulers": [{"last_epoch": 3, "base_lrs": [1e-4], "_last_lr": [1e-4], "lr_lambdas": [None]}],
    }


def make_training(rng: random.Random) -> bytes:
    content = _training()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        content = strike(rng, content, _STRANGE) if isinstance(content, dict) else content
    return _saved(content)


def read_training(folder: Path, data: bytes) -> Any:
    return _of_loops(read_training_checkpoint(write_file(folder, "last.ckpt", data)).content, torch_load(data))


def load_training(data: bytes) -> Any:
    return _of_loops(torch_load(data), torch_load(data))


def _of_loops(content: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """Return `content`, or its weights alone if `written` has no loops: counters and optimizers start anew."""
    return content if "loops" in written else {"state_dict": content["state_dict"]}


# Safetensors.


def make_safetensors(rng: random.Random) -> bytes:
    weights = {key: value.contiguous().resolve_conj() for key, value in _weights(rng).items()}
    return safetensors.torch.save(weights, rng.choice((None, {"format": "pt"}, {"title": "é\n"})))


def load_safetensors(data: bytes) -> Any:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {"state_dict": safetensors.torch.load(data), "metadata": header.get("__metadata__") or {}}
