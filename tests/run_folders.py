"""Run folders written by hand, with a few known numbers, for tests of their report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

STARTED = "2026-01-02T03-04-05"
METRICS = {0: (0.75, 0.9), 1: (0.5, None), 2: (0.4321, 0.8125)}  # step: loss of training and of held-out images


def write_run(folder: Path, **lightning: Any) -> Path:
    """Write a run of three steps with `lightning` in its config, and return its folder."""
    config = {
        "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "base_learning_rate": 1.25e-5},
        "data": {"target": "main.WebDataNpyModuleFromConfig", "params": {"batch_size": 3}},
    }
    configs = folder / "configs"
    configs.mkdir(parents=True)
    (configs / f"{STARTED}-project.yaml").write_text(yaml.safe_dump(config))
    (configs / f"{STARTED}-lightning.yaml").write_text(yaml.safe_dump({"lightning": {"scale_lr": True, **lightning}}))
    write_metrics(folder, 0, METRICS)
    for step in METRICS:
        write_image(folder / "images/train" / f"samples_gs-{step:06}_e-000000_b-000000.png", step)
    return folder


def write_metrics(folder: Path, version: int, metrics: dict[int, tuple[float | None, float | None]]) -> Path:
    path = folder / f"csv/version_{version}/metrics.csv"
    path.parent.mkdir(parents=True)
    rows = [f"0,{step},{'' if a is None else a},{'' if b is None else b}\n" for step, (a, b) in metrics.items()]
    path.write_text("epoch,step,train/loss_simple,val/loss_simple\n" + "".join(rows))
    return path


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (50 * number, 0, 0)).save(path)


def write_evaluation(path: Path, name: str = "cats") -> None:
    """Write an `evaluation.json` with one set."""
    summary = {
        key: {"value": value, "low": None, "high": None}
        for key, value in {"loss_base": 0.25, "loss_tuned": 0.125, "loss_ratio": 0.5, "drift": 0.0625}.items()
    }
    entry = {"images": 7, "overall": summary, "timesteps": [{"t": 62, **summary}, {"t": 187, **summary}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"base": "base.ckpt", "tuned": "tuned.ckpt", "sets": {name: entry}}))
