"""The loader of weights says what does not fit, and loads nothing then."""

import pytest
import torch
from torch import nn

from ldm.checkpoint import ema_key, load_file_into, load_into, loading, save_state_dict
from ldm.util import UserError


class Model(nn.Module):
    def __init__(self, cond_stage=None):
        super().__init__()
        self.model = nn.Linear(2, 3)
        self.register_buffer("betas", torch.zeros(4))
        if cond_stage is not None:
            self.cond_stage_model = cond_stage


def weights(**changes):
    own = {"model.weight": torch.ones(3, 2), "model.bias": torch.ones(3), "betas": torch.ones(4)}
    return {key: value for key, value in {**own, **changes}.items() if value is not None}


def test_weights_are_copied():
    model, source = Model(), weights()
    assert load_into(model, source) == ([], [])
    assert torch.equal(model.model.weight, torch.ones(3, 2))
    assert model.model.weight.data_ptr() != source["model.weight"].data_ptr()


def test_load_into_reads_part_by_part(monkeypatch):
    monkeypatch.setattr(loading, "_PART_BYTES", 24)  # one of the weights
    read = []
    monkeypatch.setattr(loading, "in_memory", lambda tensor: read.append(set_so_far(model)) or tensor)

    def set_so_far(model):
        return {key for key, value in model.state_dict().items() if value.any()}

    model = Model()
    model.model.weight.data.zero_()
    model.model.bias.data.zero_()
    load_into(model, weights())
    assert read == [set(), {"model.weight"}]


def test_load_into_takes_a_file_of_ema_weights_alone(caplog):
    caplog.set_level("INFO")
    shadows = {ema_key(key): value * 2 for key, value in weights(betas=None).items()}
    model = Model()
    report = load_into(model, {**shadows, "model_ema.decay": torch.tensor(0.9)}, source="ema.ckpt")
    assert report.missing == ["betas"]
    assert torch.equal(model.model.weight, torch.full((3, 2), 2.0))
    assert "ema.ckpt: has only EMA weights" in caplog.text


def test_load_into_names_what_a_file_of_ema_weights_lacks():
    with pytest.raises(UserError, match=r"ema\.ckpt: lacks model\.bias"):
        load_into(Model(), {ema_key("model.weight"): torch.ones(3, 2)}, source="ema.ckpt")


def test_load_into_says_which_dtype_cannot_be_loaded():
    packed = torch.zeros(3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(UserError, match=r"model\.ckpt: .*model\.weight"):
        load_into(Model(), weights(**{"model.weight": packed}), source="model.ckpt")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_load_into_takes_weights_of_every_floating_dtype(dtype):
    model = Model()
    load_into(model, weights(**{"model.weight": torch.full((3, 2), 0.5).to(dtype)}))
    assert torch.equal(model.model.weight, torch.full((3, 2), 0.5))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_load_into_refuses_numbers_of_another_kind(dtype):
    with pytest.raises(UserError, match=r"model\.ckpt: cannot be loaded: model\.weight is torch\.\w+, the model's is"):
        load_into(Model(), weights(**{"model.weight": torch.ones(3, 2).to(dtype)}), source="model.ckpt")


def test_assign_takes_the_tensors_themselves():
    model, source = Model(), weights()
    load_into(model, source, assign=True)
    assert model.model.weight.data_ptr() == source["model.weight"].data_ptr()


def test_optional_keys_are_reported_and_logged(caplog):
    caplog.set_level("INFO")
    extra = {key: torch.ones(1) for key in ("model_ema.decay", "first_stage_model.loss.logvar", "alphas_cumprod")}
    report = load_into(Model(), weights(betas=None, **extra), source="model.ckpt")
    assert report.missing == ["betas"]
    assert report.unexpected == list(extra)
    assert "model.ckpt" in caplog.text and "betas" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.weight": torch.ones(2, 2)}, r"model\.weight has shape \(2, 2\), the model's is \(3, 2\)"),
        ({"model.weight": None}, r"lacks model\.weight"),
        ({"model.extra": torch.ones(1)}, r"unexpected model\.extra"),
        ({f"model.extra{n}": torch.ones(1) for n in range(9)}, r"\(9 keys\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(changes, message):
    model = Model()
    before = model.model.bias.clone()
    with pytest.raises(UserError, match=message) as caught:
        load_into(model, weights(**changes), source="model.ckpt")
    assert str(caught.value).startswith("model.ckpt: ")
    assert torch.equal(model.model.bias, before)


def test_the_text_encoders_of_sdxl_are_optional_where_the_model_has_none():
    text = {"conditioner.embedders.0.weight": torch.ones(2, 2)}
    assert load_into(Model(), weights(**text)).unexpected == list(text)


def test_a_text_tower_is_optional_where_the_model_has_none():
    text = {"cond_stage_model.weight": torch.ones(2, 2)}
    assert load_into(Model(), weights(**text)).unexpected == list(text)
    assert load_into(Model(nn.Identity()), weights(**text)).unexpected == list(text)
    with pytest.raises(UserError, match=r"lacks cond_stage_model\.weight"):
        load_into(Model(nn.Linear(2, 2, bias=False)), weights())


def test_the_optional_keys_can_be_chosen():
    assert load_into(Model(), {"betas": torch.ones(4)}, optional=["model.*"]).missing == ["model.weight", "model.bias"]


def test_load_file_into_takes_the_names_of_other_programs(tmp_path, caplog):
    caplog.set_level("INFO")
    other = {f"module.{key}": value * 3 for key, value in weights(betas=None).items()}
    save_state_dict({**other, "embedding_manager.x": torch.ones(1)}, tmp_path / "r.safetensors")
    model = Model()
    assert load_file_into(model, tmp_path / "r.safetensors").missing == ["betas"]
    assert torch.equal(model.model.weight, torch.full((3, 2), 3.0))
    assert "r.safetensors: 2 keys have other names" in caplog.text
    assert "r.safetensors: 1 values are not used: embedding_manager" in caplog.text


def test_load_file_into_takes_a_bare_unet_below_a_prefix(tmp_path):
    module = nn.Module()
    module.diffusion_model = nn.ModuleDict({"input_blocks": nn.Linear(2, 3)})
    own = {key: torch.ones_like(value) for key, value in module.state_dict().items()}
    save_state_dict({key.removeprefix("diffusion_model."): v for key, v in own.items()}, tmp_path / "unet.ckpt")
    load_file_into(module, tmp_path / "unet.ckpt", prefix="model.")
    assert all(value.eq(1).all() for value in module.state_dict().values())
