"""Tests of the predicted peaks of a step, of a part of the SD v1 UNet and of tiny models."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.load import build_model, load_config
from ldm.planning.ledger import HOST
from ldm.planning.step import Simulation, _Training, on_device, peak_of_step
from ldm.util import UserError
from tests.training_runs import CONFIG

GIB = 2**30
BASE = "finetune_stable_diffusion.yaml"
RESIDENT = "model.params.unet_config.params.use_checkpoint=false"
BF16 = "lightning.trainer.precision=bf16-true"
OPTIMIZER, UNET = "model.params.optimizer_config", "model.params.unet_config"


# The shape of SD v1 with a third of its operations, each of which costs a forecast as much as in the whole UNet.
SMALL = [f"{UNET}.params.{shape}" for shape in ("channel_mult=[1,2]", "num_res_blocks=1", "attention_resolutions=[2]")]


@cache
def predicted(*names: str, images: int = 1) -> dict[str, float]:
    """Return GiB per category at 512×512 for `BASE` with the `SMALL` UNet, other configs and overrides."""
    overrides = [name for name in names if "=" in name]
    config = load_config([BASE, *(name for name in names if "=" not in name)], [*SMALL, *overrides])
    return {category: bytes_ / GIB for category, bytes_ in peak_of_step(config, images=images).items()}


@pytest.mark.parametrize(
    ("names", "gib"),
    [
        ([RESIDENT], 1.671),
        ([RESIDENT, f"{OPTIMIZER}={{target: torch.optim.AdamW}}"], 1.859),  # foreach is torch's default on CUDA
        ([RESIDENT, "lightning.trainer.precision=bf16-mixed"], 1.574),
        ([BF16], 0.777),
        ([BF16, f"{OPTIMIZER}={{target: ldm.optim.low_bit.AdamW8bit}}"], 0.595),
    ],
    ids=["fused", "foreach", "autocast", "bf16", "8bit"],
)
def test_the_peaks_of_a_step(names: list[str], gib: float) -> None:
    """Those of the whole UNet are in test_families.py."""
    assert on_device(predicted(*names)) == pytest.approx(gib, rel=0.02)


def test_memory_per_image_in_the_fast_tier() -> None:
    held = predicted("fast.yaml", images=8)
    assert (held["activations"] + held["temporaries"]) / 8 == pytest.approx(0.195, rel=0.02)


def test_the_categories_of_a_step() -> None:
    config = load_config([BASE], SMALL)
    with torch.device("meta"):
        model = build_model(config).model  # the first stage is not on the device
    parameters = sum(parameter.numel() for parameter in model.parameters()) * 4 / GIB
    peak = predicted(f"{OPTIMIZER}={{target: torch.optim.AdamW}}", "model.params.use_ema=true")
    assert peak["weights"] == pytest.approx(2 * parameters, rel=0.01)  # with the EMA
    assert peak["gradients"] == pytest.approx(parameters, rel=0.01)
    assert peak["optimizer"] == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_lora_has_gradients_and_optimizer_state_for_its_factors_alone(streamed: bool) -> None:
    lora = ("model.params.use_ema=true", "model.params.lora.rank=8", "model.params.lora.targets=[attn1,attn2]")
    if streamed:
        lora += (f"{UNET}.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel",)
    found, plain = tiny(*lora), tiny("model.params.use_ema=false", *lora[3:])
    factors = 4 * 8 * ((32 + 32) * 6 + (8 + 32) * 2) * 4 / GIB  # 4 transformers, 32 channels, a context of 8
    if streamed:
        assert found[HOST] < 0.6 * plain[HOST]
        return
    assert found["weights"] - plain["weights"] == pytest.approx(2 * factors, rel=0.2)  # with the EMA
    assert found["optimizer"] == pytest.approx(2 * factors, rel=0.35)  # small tensors are rounded up to 512 bytes
    assert found["gradients"] <= 1.2 * factors


@cache
def tiny(*overrides: str, **kwargs: int) -> dict[str, float]:
    config = OmegaConf.merge(CONFIG, OmegaConf.from_dotlist(list(overrides)))
    return {category: bytes_ / GIB for category, bytes_ in peak_of_step(config, **kwargs).items()}


def test_accumulation_keeps_the_gradients_through_the_next_forward() -> None:
    key = "lightning.trainer.accumulate_grad_batches"
    once, twice = (tiny(f"{key}={count}", images=64, size=64) for count in (1, 2))
    assert twice["gradients"] > 5 * once["gradients"]
    assert twice["activations"] == pytest.approx(once["activations"], rel=0.01)


def test_weights_on_the_host_are_counted_there() -> None:
    """Float32 weights, gradients and moments with a pinned copy; or bfloat16 and 8 bits, and one bucket."""
    streamed = f"{UNET}.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"
    weights = tiny()["weights"]
    plain, streaming = tiny("model.params.use_ema=false"), tiny("model.params.use_ema=false", streamed)
    assert streaming["weights"] < 0.05 * plain["weights"]
    assert streaming["gradients"] == streaming["optimizer"] == 0
    kept = weights / 2  # of the two: without the average
    assert streaming[HOST] - plain[HOST] == pytest.approx(4.6 * kept, rel=0.1)
    inner = "{target: ldm.optim.low_bit.AdamW8bit, params: {keyed_rounding: true}}"
    low = f"{OPTIMIZER}={{target: ldm.optim.InBackward, params: {{optimizer: {inner}, bucket_mb: 0.01}}}}"
    smallest = tiny("model.params.use_ema=false", streamed, low, BF16)
    assert smallest["weights"] + smallest["optimizer"] + smallest["gradients"] == pytest.approx(0, abs=1e-4)
    # Half of it for weights and half for moments; float32 moments of small parameters and a table of 1 KiB per moment
    # add the rest, in a model as small as this. The first stage is bfloat16 too.
    assert smallest[HOST] - plain[HOST] / 2 == pytest.approx(1.4 * kept, rel=0.03)
    averaged = tiny("model.params.use_ema=true", streamed, low, BF16)
    assert averaged[HOST] - smallest[HOST] == pytest.approx(kept, rel=0.05)  # in float32


def test_batch_and_size_default_to_the_configs() -> None:
    assert tiny() == tiny(images=2, size=8)
    small, large = (tiny(images=8, size=size)["activations"] for size in (64, 128))
    assert large > 3.5 * small


def test_the_samples_of_a_prior_are_added() -> None:
    prior = ("data.params.prior_urls=prior.tar", "data.params.prior_ratio=0.5")
    assert tiny(*prior, images=4) == tiny(images=6)


def test_images_need_the_first_stage_on_the_device() -> None:
    assert tiny("data.target=main.DataModuleFromConfig")["weights"] > 1.1 * tiny()["weights"]


def test_captions_go_through_a_text_tower() -> None:
    config = OmegaConf.create(CONFIG)
    config.model.params.cond_stage_config = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"text_config": {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}},
    }
    vocabulary = 49_408 * 8 * 4
    assert peak_of_step(config)["weights"] > vocabulary


def test_frozen_parts_have_no_gradients_and_no_moments() -> None:
    parts = predicted(RESIDENT, "model.params.trained_parts.train_only=[attn2]")
    count = 4 * (2 * 640**2 + 640 + 2 * 768 * 640)  # to_q and to_out, its bias, to_k and to_v, of four blocks
    assert parts["optimizer"] == pytest.approx(8 * count / GIB, rel=0.01)
    assert parts["gradients"] <= 4 * count / GIB
    assert on_device(parts) < on_device(predicted(RESIDENT)) - 0.8 * predicted(RESIDENT)["optimizer"]


def test_moments_of_a_text_encoder_are_on_the_device_and_those_of_a_streamed_unet_are_not() -> None:
    texts = ["model.params.cond_stage_config.target=ldm.modules.encoders.modules.FrozenCLIPEmbedder"]
    texts += ["model.params.cond_stage_key=txt", "model.params.cond_stage_trainable=true"]
    texts += ["model.params.trained_parts.freeze=[token_embedding]"]
    alone, both = predicted("minimal.yaml"), predicted("minimal.yaml", *texts)
    tower = 123_060_480 - 49_408 * 768
    assert both["optimizer"] == pytest.approx(8 * tower / GIB, rel=0.01)
    assert both[HOST] == pytest.approx(alone[HOST], rel=0.02)


def test_a_forecast_leaves_random_state_and_tables_unchanged() -> None:
    from torchao.optim import subclass_8bit

    subclass_8bit.get_qmap_signed.cache_clear()
    before, compiled = torch.get_rng_state(), torch.compile
    tiny(f"{OPTIMIZER}={{target: ldm.optim.low_bit.AdamW8bit}}")
    assert torch.get_rng_state().equal(before) and torch.compile is compiled
    assert len(set(subclass_8bit.get_qmap_signed())) == 256


@pytest.mark.parametrize(
    ("override", "size", "message"),
    [
        (
            "lightning.trainer.precision=bf17",
            None,
            "trainer.precision 'bf17' cannot be predicted; valid: 16-",
        ),
        ("model.params.monitor=x", 7, "7 pixels per side: give a multiple of 2"),
        ("data.params.batch_size=null", None, "batch size None: give a whole number"),
    ],
)
def test_invalid_values_are_refused(override: str, size: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(override, size=size)


def test_an_autoencoder_is_refused() -> None:
    with pytest.raises(UserError, match="predicted for diffusion models only"):
        peak_of_step(load_config(["emoji_autoencoder.yaml"]))


@pytest.mark.parametrize("leaves", [False, True])
def test_further_batch_sizes_are_as_if_simulated_alone(monkeypatch: pytest.MonkeyPatch, leaves: bool) -> None:
    """The model is built once, and anew after a step that `leaves` tensors behind."""
    built, init, step = [], _Training.__init__, _Training.step

    def counted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        built.append(self)

    def leaving(self, *args):
        timeline = step(self, *args)
        with self._ledger:
            self.left = torch.zeros(3)
        return timeline

    monkeypatch.setattr(_Training, "__init__", counted)
    if leaves:
        monkeypatch.setattr(_Training, "step", leaving)
    config = OmegaConf.create(CONFIG)
    shared = Simulation(config)
    together = [shared.memory(images) for images in (2, 3, 2)]
    assert len(built) == (3 if leaves else 1)
    assert together == [Simulation(config).memory(images) for images in (2, 3, 2)]
    assert together[0] == together[2] != together[1] and together[0].extended(together[1], 0) == together[0]
