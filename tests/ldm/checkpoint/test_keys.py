"""Names of keys have one owner, and agree with the modules that make the keys."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoint import keys
from ldm.checkpoint.keys import OPTIONAL_KEYS, SCHEDULE_KEYS, ema_key, has_part, is_optional, with_ema_as_weights
from ldm.modules.diffusionmodules.schedule import diffusion_buffers
from ldm.modules.ema import LitEma

ROOT = Path(__file__).parents[3]
OWNED = ("model.diffusion_model", "first_stage_model.", "cond_stage_model.", "conditioner.", "model_ema")
SOURCES = [*ROOT.glob("ldm/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "main.py"]


def test_ema_key_is_the_name_that_LitEma_gives():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
            self.model_ema = LitEma(self.model)

    own = Model().state_dict()
    weights = [key for key in own if key.startswith(keys.MODEL)]
    assert len(weights) == 4
    assert {ema_key(key) for key in weights} | set(keys.EMA_COUNTERS) == {
        key for key in own if key.startswith(keys.EMA)
    }


def test_SCHEDULE_KEYS_name_every_buffer_of_a_schedule():
    assert diffusion_buffers(np.linspace(0.001, 0.01, 4)).keys() <= set(SCHEDULE_KEYS)


def test_is_optional_fits_the_keys_that_releases_have_or_lack():
    released = json.loads((ROOT / "tests/golden/sd_v1_keys.json").read_text())["keys"]
    required = [key for key in released if not is_optional(key)]
    assert len(required) > 1000
    assert all(key.startswith((keys.UNET, keys.FIRST_STAGE, keys.COND_STAGE)) for key in required)
    for key in ("betas", "model_ema.decay", "first_stage_model.loss.x", "cond_stage_model.t.position_ids", "logvar"):
        assert is_optional(key), key
    assert not is_optional("betas", [pattern for pattern in OPTIONAL_KEYS if pattern != "betas"])


def test_with_ema_as_weights_fills_in_only_where_there_are_no_weights():
    shadow = {ema_key("model.a.w"): torch.ones(2)}
    assert with_ema_as_weights(shadow, ["model.a.w", "x"])["model.a.w"] is shadow[ema_key("model.a.w")]
    both = {**shadow, "model.b": torch.zeros(1)}
    assert with_ema_as_weights(both, ["model.a.w"]) == both
    assert has_part(both, keys.EMA) and not has_part(both, keys.CONDITIONER)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_knows_the_prefixes(path):
    if path.name == "keys.py" and path.parent.name == "checkpoint":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    known = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    assert not [text for text in known if text.startswith(OWNED)]
