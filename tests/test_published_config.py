"""Tests of the recipe's config of 2022 as published, and of configs without each of their optional parts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import main
from ldm.release.initialisation import without_initialisation
from tests.training_runs import (  # noqa: F401
    CONFIG,
    fixture_one_thread,
    fixture_train,
    the_run,
    write_inputs,
)

# From the public interface of 2022: `model` and `data` alone. Only the three paths are changed.
PUBLISHED = """\
model:
  base_learning_rate: 6.666e-08
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.012
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: f8
    cond_stage_key: t5
    image_size: 64
    channels: 4
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_heads: 8
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: True
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [1, 2, 4, 4]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.DummyEncoder
      params:
        key: t5
data:
  target: main.WebDataNpyModuleFromConfig
  params:
    batch_size: 2
    num_workers: 4
    training_urls: shards/s-{000000..000001}.tar
    val_urls: shards/s-000000.tar
    test_urls: shards/s-000001.tar
"""
OPTIONAL = (
    "lightning",
    "lightning.callbacks",
    "lightning.trainer",
    "data.params.num_workers",
    "data.params.null_cond_dropout",
    "model.params.timesteps",
    "model.params.log_every_t",
    "model.params.monitor",
    "model.params.use_ema",
    "model.params.scale_factor",
    "model.params.unet_config.params.legacy",
)


def test_main_starts_from_the_published_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Run everything up to the first step with weights on the meta device, as 860 million weights take too long."""
    write_inputs(tmp_path)
    (tmp_path / "published.yaml").write_text(PUBLISHED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that the value of this run goes away with the test
    begun = []
    monkeypatch.setattr(
        "ldm.training.fit.fit", lambda trainer, model, data, config, plan: begun.append((trainer, model))
    )
    monkeypatch.setattr(sys, "argv", ["main.py", "--no-test", "--base", "published.yaml", "-t", "--gpus", "0,"])
    with without_initialisation(on_meta=True):
        main.main()
    ((trainer, model),) = begun
    assert trainer.num_devices == 1 and model.model.diffusion_model.model_channels == 320
    assert model.learning_rate == pytest.approx(2 * 6.666e-08)


@pytest.mark.parametrize("part", OPTIONAL)
def test_a_config_without_an_optional_part_starts(part: str, train, tmp_path: Path) -> None:
    config = OmegaConf.create(CONFIG)
    *parents, last = part.split(".")
    owner = OmegaConf.select(config, ".".join(parents)) if parents else config
    del owner[last]
    OmegaConf.save(config, tmp_path / "tiny.yaml")
    assert train("--max_steps 1") == 0
    assert (the_run(tmp_path / "logs") / "checkpoints/last.ckpt").is_file()
