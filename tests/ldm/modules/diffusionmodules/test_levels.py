"""Tests of the layers at each level of a UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.levels import Level, plan_levels
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import UserError
from tests.golden_data import fill_seeded, seeded_tensor
from tests.ldm.modules.diffusionmodules.test_openaimodel import TINY

PLAN = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": [1, 2], "attention_resolutions": [2]}


def small(**changes: Any) -> UNetModel:
    return UNetModel(**TINY | {"channel_mult": [1, 2], "attention_resolutions": [1, 2]} | changes)


def transformers(model: UNetModel) -> dict[str, SpatialTransformer]:
    return {name: part for name, part in model.named_modules() if isinstance(part, SpatialTransformer)}


def test_plan_levels() -> None:
    assert plan_levels(**PLAN) == [Level(32, 1, 0, 1, False), Level(64, 2, 3, 1, False)]
    assert plan_levels(
        **PLAN, num_attention_blocks=[1, 1], transformer_depth=[0, 3], disable_self_attentions=[True, False]
    ) == [Level(32, 1, 0, 0, True), Level(64, 2, 1, 3, False)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_res_blocks": [1]}, r"num_res_blocks \[1\] needs one entry per level of channel_mult \[1, 2\]"),
        ({"transformer_depth": [1, 2, 10]}, "transformer_depth .* needs one entry per level"),
        ({"num_attention_blocks": [1]}, "num_attention_blocks .* needs one entry per level"),
        ({"num_attention_blocks": [2, 2]}, r"num_attention_blocks \[2, 2\] exceeds num_res_blocks"),
        ({"disable_self_attentions": [True]}, "disable_self_attentions .* needs one entry per level"),
        ({"disable_self_attentions": [1, 0]}, "disable_self_attentions .*: give true or false"),
        ({"transformer_depth": -1}, "transformer_depth -1: give whole numbers from 0"),
        ({"transformer_depth": [1, 2.5]}, "transformer_depth .*: give whole numbers from 0"),
        ({"num_res_blocks": "12"}, "num_res_blocks '12': give whole numbers"),
    ],
)
def test_plan_levels_names_what_does_not_fit(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_levels(**PLAN | change)


def test_the_depth_of_each_level_and_of_the_middle() -> None:
    def depths(**changes: Any) -> tuple[set[int], set[int], int]:
        found = {name: len(part.transformer_blocks) for name, part in transformers(small(**changes)).items()}
        sides = [name for name in found if not name.startswith("middle")]
        coarse = {found[name] for name in sides if small(**changes).get_submodule(name).norm.num_channels == 64}
        fine = {found[name] for name in sides} - coarse
        return fine, coarse, found["middle_block.1"]

    assert depths(transformer_depth=[2, 3]) == ({2}, {3}, 3)
    assert depths(transformer_depth=[2, 3], transformer_depth_middle=1) == ({2}, {3}, 1)


def test_disabled_self_attention_depends_on_the_context_twice() -> None:
    model = small(disable_self_attentions=[True, False], disable_middle_self_attn=True, context_dim=40)
    reading = {
        name for name, part in transformers(model).items() if part.transformer_blocks[0].attn1.to_k.in_features == 40
    }
    assert reading == {"input_blocks.1.1", "middle_block.1", "output_blocks.2.1", "output_blocks.3.1"}


def test_a_middle_without_a_transformer_keeps_the_numbers_of_its_layers() -> None:
    model = small(disable_middle_transformer=True)
    assert {key.split(".")[1] for key in model.state_dict() if key.startswith("middle_block")} == {"0", "2"}
    assert model(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 5, TINY["context_dim"])).shape == (1, 4, 8, 8)


def test_linear_projections_are_the_convolutions() -> None:
    """A 1 × 1 convolution over the map and a linear layer over its tokens are one function."""
    convolutions = fill_seeded(SpatialTransformer(64, 2, 32, context_dim=8))
    linear = SpatialTransformer(64, 2, 32, context_dim=8, use_linear=True)
    linear.load_state_dict(
        {key: value.flatten(1) if value.ndim == 4 else value for key, value in convolutions.state_dict().items()}
    )
    x, context = seeded_tensor("levels/x", (2, 64, 4, 6)), seeded_tensor("levels/context", (2, 5, 8))
    torch.testing.assert_close(linear(x, context), convolutions(x, context), atol=1e-5, rtol=1e-4)


def test_codebook_logits_instead_of_a_prediction() -> None:
    model = small(n_embed=10)
    assert {key for key in model.state_dict() if key.startswith("id_predictor")} == {
        f"id_predictor.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")
    }
    given = torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 5, TINY["context_dim"])
    assert model(*given).shape == (1, 10, 8, 8)


def test_a_context_width_may_be_repeated_per_block() -> None:
    width = TINY["context_dim"]
    assert small(context_dim=[width, width]).context_dim == width


def test_more_heads_than_channels_are_refused() -> None:
    with pytest.raises(UserError, match="32 channels do not divide into heads: num_heads=33"):
        small(num_heads=33)
