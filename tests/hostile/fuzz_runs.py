"""Files of run folders and LoRA files for the fuzzer, our readers of them, and readers of their plain formats."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ldm.checkpoint import open_checkpoint
from ldm.events import EVENTS, read_events
from ldm.models.diffusion.stored_prompts import StoredPrompts
from ldm.release.lora_from_training import trained_loras
from ldm.release.lora_reading import read_lora
from ldm.reporting.evaluations import NAME, read_evaluations
from ldm.reporting.metrics import read_metrics
from ldm.util import UserError
from tests.hostile.fuzz_values import strike, write_file

CSV_TOKENS = (b",", b"\n", b"\r", b'"', b"step", b"nan", b"inf", b"1e308", b"1e999", b"-1", b"9" * 400, b"\0", b"x")
_STRANGE = (None, True, -1, 1.5, math.nan, math.inf, 10**400, "", "text", "\ud800", [], {}, [1], {"a": 1})
_OVERALL = ("loss_base", "loss_tuned", "loss_ratio", "drift")
_STRANGE_TENSORS = (
    *(torch.zeros(0), torch.tensor(1.0), torch.tensor(1j), torch.tensor(math.nan), torch.ones(2)),
    *(torch.ones(3, 2), torch.ones(2, 3, 3, 3), torch.ones(2, 3, dtype=torch.uint64), torch.ones(2, 2, 2)),
)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError(problems[0])


def make_events(rng: random.Random) -> bytes:
    events = [
        {"time": "2026-01-02T03:04:05", "kind": "start", "step": None, "command": ["main.py", "-t"], "seed": 23},
        {"time": "2026-01-02T03:05:05", "kind": "warning", "step": 4, "text": "é"},
        {"time": "2026-01-02T03:06:05", "kind": "end", "step": 9},
    ]
    return b"".join(json.dumps(strike(rng, e, _STRANGE) if rng.random() < 0.2 else e).encode() + b"\n" for e in events)


def read_run_events(folder: Path, data: bytes) -> Any:
    write_file(folder, EVENTS, data)
    events, damaged = read_events(folder)
    _refuse([f"{damaged} damaged lines"] if damaged else [])
    return events


def load_events(data: bytes) -> Any:
    return [json.loads(line) for line in data.decode(errors="replace").split("\n") if line.strip()]


def make_metrics(rng: random.Random) -> bytes:
    rows = [(step, rng.random(), rng.choice(("", "0.5", "nan", "1e-3"))) for step in range(rng.randrange(1, 6))]
    return "".join(["epoch,step,train/loss,val/loss\n", *(f"0,{a},{b},{c}\n" for a, b, c in rows)]).encode()


def read_run_metrics(folder: Path, data: bytes) -> Any:
    write_file(folder, "csv/version_0/metrics.csv", data)
    problems: list[str] = []
    found = read_metrics(folder, problems)
    _refuse(problems)
    return {name: dict(zip(*series, strict=True)) for name, series in found.series.items()}


def load_metrics(data: bytes) -> Any:
    text = data.decode(errors="replace").replace("\0", "\ufffd")
    found: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(io.StringIO(text, newline="")):
        for name, cell in row.items():
            if name not in ("step", "epoch") and cell:
                found.setdefault(name, {})[int(row["step"])] = float(cell)
    finite = {name: {s: v for s, v in sorted(found[name].items()) if abs(v) < 1e100} for name in sorted(found)}
    return {name: values for name, values in finite.items() if values}


def make_evaluation(rng: random.Random) -> bytes:
    summary = {key: {"value": rng.random(), "low": None, "high": None} for key in _OVERALL}
    steps = [{"t": t, **{key: {"value": rng.random()} for key in ("drift", "loss_ratio")}} for t in (62, 187)]
    content = {
        "base": "a.ckpt",
        "tuned": "b.ckpt",
        "sets": {"é": {"images": 7, "overall": summary, "timesteps": steps}},
    }
    return json.dumps(strike(rng, content, _STRANGE) if rng.random() < 0.6 else content).encode()


def read_run_evaluation(folder: Path, data: bytes) -> Any:
    write_file(folder, NAME, data)
    problems: list[str] = []
    found = read_evaluations(folder, problems)
    _refuse(problems)
    return [[(part.name, part.images, part.loss_base, part.drift_at) for part in each.sets] for each in found]


def load_evaluation(data: bytes) -> Any:
    sets = json.loads(data)["sets"]
    return [
        [
            (
                name,
                int(part["images"]),
                float(part["overall"]["loss_base"]["value"]),
                [float(step["drift"]["value"]) for step in part["timesteps"]],
            )
            for name, part in sets.items()
        ]
    ]


def make_lora(rng: random.Random) -> bytes:
    weights = {
        "lora_unet_x.lora_down.weight": torch.arange(6.0).reshape(2, 3),
        "lora_unet_x.lora_up.weight": torch.arange(8.0).reshape(4, 2),
        "lora_unet_x.alpha": torch.tensor(rng.choice((1.0, 2.0, 8.0))),
    }
    if rng.random() < 0.6:
        key = rng.choice((*weights, "lora_unet_x.dora_scale", "lora_unet_x.lora_mid.weight", "x.lora_A.weight"))
        weights[key] = rng.choice(_STRANGE_TENSORS)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": rng.choice(_STRANGE)})}
    return safetensors.torch.save(weights, rng.choice((None, None, metadata)))


def read_lora_file(folder: Path, data: bytes) -> Any:
    path = write_file(folder, "lora.safetensors", data)
    return [factors.change(torch.float32, torch.device("cpu")) for factors in read_lora(path).values()]


def load_lora(data: bytes) -> Any:
    weights = safetensors.torch.load(data)
    down, up, alpha = (weights.pop(f"lora_unet_x.{name}") for name in ("lora_down.weight", "lora_up.weight", "alpha"))
    if weights or down.ndim != 2 or up.ndim != 2 or alpha.numel() != 1:
        raise ValueError("not one plain layer")
    return [float(alpha) / len(down) * (up.float() @ down.float())]


def make_prompts(rng: random.Random) -> bytes:
    weights = {f"{number}.t5": torch.arange(6.0).reshape(2, 3) + number for number in range(2)}
    about = {"texts": ["a cat", "é"], "release": "a.ckpt", "digests": {"text": "ab", "other": None}}
    if rng.random() < 0.4:
        weights[rng.choice((*weights, "0.pooled", "2.t5", "-1.t5", "x.t5", "t5"))] = rng.choice(_STRANGE_TENSORS)
    if rng.random() < 0.4:
        about = strike(rng, about, _STRANGE)
    return safetensors.torch.save(weights, {"prompts": json.dumps(about)})


def read_prompts(folder: Path, data: bytes) -> Any:
    stored = StoredPrompts.load(write_file(folder, "prompts.safetensors", data))
    return [stored.encodings, stored.release, stored.digests]


def load_prompts(data: bytes) -> Any:
    size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["prompts"])
    encodings: dict[str, dict[str, torch.Tensor]] = {text: {} for text in about["texts"]}
    for key, part in safetensors.torch.load(data).items():
        number, member = key.split(".")
        encodings[about["texts"][int(number)]][member] = part
    return [encodings, about["release"], about["digests"]]


_TRAINED = "model.diffusion_model.x"


def make_trained_lora(rng: random.Random) -> bytes:
    weights = {
        f"{_TRAINED}.weight": torch.zeros(4, 3),
        f"{_TRAINED}.lora.down": torch.arange(6.0).reshape(2, 3),
        f"{_TRAINED}.lora.up": torch.arange(8.0).reshape(4, 2),
        f"{_TRAINED}.lora.alpha": torch.tensor(rng.choice((1.0, 2.0, 8.0))),
    }
    if rng.random() < 0.6:
        weights[rng.choice((*weights, "model_ema.diffusion_modelxloradown"))] = rng.choice(_STRANGE_TENSORS)
    return safetensors.torch.save(weights)


def read_trained_lora(folder: Path, data: bytes) -> Any:
    path = write_file(folder, "last.safetensors", data)
    loras = trained_loras(open_checkpoint(path).content, path, None)
    if not loras:
        raise UserError("no factors")
    [lora] = loras
    return [factors.change(torch.float32, torch.device("cpu")) for factors in lora.factors.values()]


def load_trained_lora(data: bytes) -> Any:
    weights = safetensors.torch.load(data)
    down, up, alpha = (weights[f"{_TRAINED}.lora.{name}"] for name in ("down", "up", "alpha"))
    if len(weights) > 4 or down.ndim != 2 or up.ndim != 2 or alpha.numel() != 1:
        raise ValueError("not one plain layer")
    return [float(alpha) / len(down) * (up.float() @ down.float())]
