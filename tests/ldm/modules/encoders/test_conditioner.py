"""SDXL's conditioner: golden conditionings, released keys, and what it does with bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.modules.encoders.conditioner import ConcatTimestepEmbedderND, GeneralConditioner, _some_replaced
from ldm.util import UserError
from tests.golden_data import case, reference, relative_error, released_keys, seeded_weight

NAME = "sdxl_conditioner"
CASE = case(NAME)
DUMMY = "ldm.modules.encoders.modules.DummyEncoder"
ENCODERS = "ldm.modules.encoders.modules."


def golden() -> GeneralConditioner:
    model = GeneralConditioner(OmegaConf.create(CASE["emb_models"])).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim:
                parameter.copy_(seeded_weight(f"conditioner.{key}", tuple(parameter.shape)))
    return model


def golden_batch() -> dict[str, Any]:
    return {key: value if key == "txt" else torch.tensor(value) for key, value in CASE["batch"].items()}


def test_golden_conditioner() -> None:
    model = golden()
    assert {f"conditioner.{key}": list(value.shape) for key, value in model.state_dict().items()} == CASE["keys"]
    with torch.no_grad():
        given = model.encode(golden_batch())
        cond, uncond = model.get_unconditional_conditioning(
            golden_batch(), force_uc_zero_embeddings=CASE["force_uc_zero_embeddings"]
        )
    assert set(given) == {"vector", "crossattn"}
    for key, value in given.items():
        assert relative_error(value, reference(NAME, key)) < 1e-5
        assert torch.equal(cond[key], value)
        torch.testing.assert_close(uncond[key], reference(NAME, f"uc_{key}"), atol=1e-5, rtol=1e-5)


def test_encode_captions_and_sizes_make_the_golden_conditioning() -> None:
    model, batch = golden(), golden_batch()
    texts = batch.pop("txt")
    assert model.other_keys == list(batch)
    rows = [row for row, text in enumerate(texts) if text]
    with torch.no_grad():
        given = model(batch, captions=model.encode_captions(texts))
    for key, value in given.items():
        assert relative_error(value[rows], reference(NAME, key)[rows]) < 1e-5 and rows


@torch.no_grad()
def test_encode_captions_gives_what_dropping_gives_for_an_empty_caption() -> None:
    model, texts = golden(), ["", "a cat"]
    zeros = model.encode_captions(texts)
    assert model.empties_to_zeros
    assert all(part[1].any() and not part[0].any() for part in zeros.values())
    model._ucg_values[0] = "nothing"
    mixed, nothing = model.encode_captions(texts), model.embedders[0](["nothing"])
    width = nothing.shape[-1]
    torch.testing.assert_close(mixed["crossattn"][:1, :, :width], nothing)
    assert not model.empties_to_zeros and not mixed["crossattn"][0, :, width:].any() and not mixed["vector"][0].any()


def test_encode_captions_needs_the_captions_first() -> None:
    model = GeneralConditioner(list(reversed(CASE["emb_models"])))
    with pytest.raises(UserError, match="embedders of captions must come before the others"):
        model.encode_captions(["a cat"])


@pytest.mark.parametrize("number", range(len(CASE["sizes"])))
def test_golden_concat_timestep_embedder(number: int) -> None:
    outdim, values = CASE["sizes"][number]
    given = ConcatTimestepEmbedderND(outdim)(torch.tensor(values))
    assert relative_error(given, reference(NAME, f"sizes_{number}")) < 1e-5


def test_released_conditioner_keys() -> None:
    sizes = ["original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"]
    with torch.device("meta"):
        model = GeneralConditioner(
            [
                embedder("FrozenCLIPEmbedder", "txt", layer="hidden", layer_idx=11),
                embedder(
                    "FrozenOpenCLIPEmbedder2",
                    "txt",
                    arch="ViT-bigG-14",
                    version="laion2b_s39b_b160k",
                    freeze=True,
                    layer="penultimate",
                    always_return_pooled=True,
                    legacy=False,
                ),
                *(embedder("ConcatTimestepEmbedderND", key, outdim=256) for key in sizes),
            ]
        )
    released = released_keys("conditioner.", "sdxl_base_keys")
    released.pop("embedders.0.transformer.text_model.embeddings.position_ids")
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == released
    assert model.input_keys == ["txt", *sizes]


def embedder(target: str, entry: str, **params: Any) -> dict[str, Any]:
    return {"target": ENCODERS + target, "input_key": entry, "params": params}


def stored(**changes: Any) -> GeneralConditioner:
    """As training on pre-encoded samples has it: stored states, a stored pooled vector, and sizes."""
    return GeneralConditioner(
        [
            embedder("DummyEncoder", "t5", key="t5") | changes,
            embedder("DummyEncoder", "pooled", key="pooled"),
            embedder("ConcatTimestepEmbedderND", "target_size", outdim=4),
        ]
    )


BATCH = {"t5": torch.ones(3, 5, 8), "pooled": torch.ones(3, 6), "target_size": torch.tensor([[64, 32]] * 3)}


def test_stored_embeddings_are_joined_by_their_dimensions() -> None:
    given = stored()(BATCH)
    assert {key: tuple(value.shape) for key, value in given.items()} == {"crossattn": (3, 5, 8), "vector": (3, 14)}
    assert given["vector"][0, :6].tolist() == [1] * 6


def test_an_embedding_is_dropped_in_training_alone() -> None:
    model = stored(ucg_rate=0.5)
    torch.manual_seed(0)
    batch = BATCH | {"t5": torch.ones(2000, 5, 8), "pooled": torch.ones(2000, 6), "target_size": torch.ones(2000, 2)}
    kept = model(batch)["crossattn"][:, 0, 0]
    assert 0.45 < float(kept.mean()) < 0.55 and set(kept.tolist()) == {0.0, 1.0}
    assert model(batch)["vector"][:, 0].all()
    cond, uncond = model.get_unconditional_conditioning(batch)
    assert cond["crossattn"].all() and uncond["crossattn"].all()
    assert model.training
    assert model.eval()(batch)["crossattn"].all()


def test_a_value_may_stand_for_what_is_dropped() -> None:
    classes = embedder("ClassEmbedder", "label", embed_dim=4, n_classes=3)
    model = GeneralConditioner([classes | {"ucg_rate": 0.5, "legacy_ucg_value": torch.tensor(2)}])
    torch.manual_seed(0)
    given = model({"label": torch.zeros(2000, dtype=torch.long)})["crossattn"][:, 0]
    table = model.embedders[0].embedding.weight
    dropped = (given == table[2]).all(dim=1)
    assert 0.45 < float(dropped.float().mean()) < 0.55
    assert (given[~dropped] == table[0]).all()
    texts = _some_replaced(["a cat"] * 2000, "", 0.5)
    assert set(texts) == {"", "a cat"} and 900 < texts.count("") < 1100


def test_only_trainable_embedders_train() -> None:
    classes = embedder("ClassEmbedder", "label", embed_dim=4, n_classes=3)
    model = GeneralConditioner([classes | {"is_trainable": True}, classes | {"input_key": "other"}])
    trained, frozen = model.embedders
    assert trained.training and not frozen.training
    batch = {"label": torch.tensor([0, 1]), "other": torch.tensor([0, 1])}
    model(batch)["crossattn"].sum().backward()
    assert trained.embedding.weight.grad is not None and frozen.embedding.weight.grad is None
    assert not any(parameter.requires_grad for parameter in model.requires_grad_(False).parameters())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target": DUMMY, "params": {"key": "t5"}}, "embedder 0 needs either input_key"),
        ({"target": DUMMY, "input_key": "t5", "input_keys": ["t5"]}, "embedder 0 needs either input_key"),
        (
            {"target": DUMMY, "input_key": "t5", "trainable": True},
            "unknown key 'trainable' in embedder 0 of emb_models; did you mean 'is_trainable'",
        ),
        ({"target": DUMMY, "input_key": "t5", "params": {"ky": "t5"}}, "unknown key 'ky' in params"),
    ],
)
def test_conditioner_refuses(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GeneralConditioner([config])


def test_conditioner_names_what_a_batch_lacks() -> None:
    with pytest.raises(UserError, match="embedder 1: input_key 'pooled' is not in the batch, which has t5"):
        stored()({"t5": BATCH["t5"]})
    with pytest.raises(UserError, match="embedder 0 returns 1 dimensions; valid: 2 to 5"):
        stored()(BATCH | {"t5": torch.ones(3)})
    with pytest.raises(UserError, match="outdim 1: give a whole number of at least 2"):
        ConcatTimestepEmbedderND(1)
