"""Tiny models and sets for the tests of evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.evaluation.sets import EvaluationSet, open_set
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.shards import npy
from ldm.util import instantiate_from_config
from tests.golden_data import fill_seeded, seeded_tensor
from tests.ldm.shard_files import write_tar
from tests.training_runs import CONFIG, TEXT_TOWER

KEYS = ["a", "b", "c", "d", "e"]


def members(key: str, f8_shape: tuple[int, ...] = (8, 4, 4), caption: str | None = None) -> list[tuple[str, bytes]]:
    """Return the members of one sample, whose values follow from its key."""
    f8 = seeded_tensor(f"{key}.f8", f8_shape).half().numpy()
    t5 = seeded_tensor(f"{key}.t5", (77, 8)).half().numpy()
    text = f"an image of {key}" if caption is None else caption
    return [(f"{key}.f8.npy", npy.encode(f8)), (f"{key}.t5.npy", npy.encode(t5)), (f"{key}.txt", text.encode())]


def build(**changes: Any) -> LatentDiffusion:
    """Build the tiny model of the training tests with seeded weights and `changes` to its params."""
    config = copy.deepcopy(CONFIG["model"])
    config["params"] |= changes
    return fill_seeded(instantiate_from_config(config)).eval()


@pytest.fixture
def make_model() -> Callable[..., LatentDiffusion]:
    return build


@pytest.fixture
def model() -> LatentDiffusion:
    """Return a model that takes stored caption embeddings and has no averaged weights."""
    return build(use_ema=False)


@pytest.fixture
def reader() -> LatentDiffusion:
    """Return a model with a text encoder."""
    return build(use_ema=False, cond_stage_key="txt", cond_stage_config=TEXT_TOWER)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Write a shard of five samples."""
    return write_tar(tmp_path / "five.tar", [member for key in KEYS for member in members(key)])


@pytest.fixture
def five(shard: Path, model: LatentDiffusion) -> EvaluationSet:
    return open_set("five", str(shard), model)


def constant(model: LatentDiffusion, value: float) -> LatentDiffusion:
    """Return `model`, patched to predict `value` everywhere."""
    model.apply_model = lambda x, t, cond: torch.full_like(x, value)
    return model
