"""Tests of the recipe's config of 2022 as published, and of configs without each of their optional parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import main
from ldm.release.initialisation import without_initialisation
from ldm.util import UserError
from tests.training_runs import CONFIG, fixture_one_thread, write_inputs  # noqa: F401

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
Begin = Callable[[str], tuple[Any, Any]]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Begin:
    """Run main.py up to its first step, and return the trainer and the model."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that the value of this run goes away with the test
    begun = []
    monkeypatch.setattr(
        "ldm.training.fit.fit", lambda trainer, model, data, config, plan: begun.append((trainer, model))
    )

    def call(line: str) -> tuple[Any, Any]:
        monkeypatch.setattr(sys, "argv", ["main.py", "--no-test", "-t", *line.split()])
        main.main()
        (made,) = begun
        return made

    return call


def test_main_starts_from_the_published_config(begin: Begin, tmp_path: Path) -> None:
    """Everything up to the first step, with weights on the meta device: 860 million take too long in a test."""
    (tmp_path / "published.yaml").write_text(PUBLISHED)
    with without_initialisation(on_meta=True):
        trainer, model = begin("--base published.yaml --gpus 0,")
    assert trainer.num_devices == 1 and model.model.diffusion_model.model_channels == 320
    assert model.learning_rate == pytest.approx(2 * 6.666e-08)


@pytest.mark.parametrize("part", OPTIONAL)
def test_a_config_without_an_optional_part_starts(part: str, begin: Begin, tmp_path: Path) -> None:
    config = OmegaConf.create(CONFIG)
    *parents, last = part.split(".")
    owner = OmegaConf.select(config, ".".join(parents)) if parents else config
    del owner[last]
    OmegaConf.save(config, tmp_path / "tiny.yaml")
    trainer, _ = begin("--base tiny.yaml --max_steps 1")
    assert trainer.max_steps == 1


@pytest.mark.parametrize(
    "empty",
    [
        *(
            "lightning:",
            "data:",
            "model:",
            "lightning: {callbacks: }",
            "lightning: {trainer: }",
            "lightning: {logger: }",
        ),
        *("lightning: {modelcheckpoint: }", "lightning: {modelcheckpoint: {params: }}", "lightning: {strategy: }"),
        *("lightning: {trainer: {max_steps: , gpus: , logger: , max_time: }}",),
        *("lightning: {callbacks: {learning_rate_logger: {target: , params: }}}", "lightning: {scale_lr: }"),
        *("lightning: {find_unused_parameters: , metrics_over_trainsteps_checkpoint: }",),
        *("lightning: {modelcheckpoint: {params: {save_top_k: , filename: , every_n_train_steps: , mode: }}}",),
        *("model: {params: {scheduler_config: {}, optimizer_config: {}, loss_config: {}, noise_config: {}}}",),
        *("model: {params: {timestep_config: {}, optimizer_config: {target: torch.optim.AdamW, params: {lr: }}}}",),
    ],
)
def test_a_part_with_nothing_in_it_is_as_if_it_were_left_out(empty: str, begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text(empty)
    trainer, model = begin("--base tiny.yaml empty.yaml")
    assert trainer.max_steps == -1 and model.learning_rate == pytest.approx(2e-3)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert {"ImageLogger", "LearningRateMonitor", "KeptCheckpoints", "LastCheckpoint"} <= set(names)
    assert len(trainer.loggers) == 2


def test_a_callback_that_is_null_is_left_out(begin: Begin) -> None:
    trainer, _ = begin("--base tiny.yaml lightning.callbacks.image_logger=null")
    names = {type(callback).__name__ for callback in trainer.callbacks}
    assert "ImageLogger" not in names and "LearningRateMonitor" in names


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("lightning: 3", "section 'lightning' must be a mapping, not 3"),
        ("lightning: {trainer: 3}", "lightning.trainer 3: give a mapping"),
        ("lightning: {callbacks: [3]}", "part.yaml: replaces a mapping by a list"),
        ("lightning: {callbacks: 3}", "lightning.callbacks 3: give a mapping"),
        ("lightning: {modelcheckpoint: []}", r"lightning.modelcheckpoint \[\]: give a mapping"),
        ("lightning: {callbacks: {image_logger: off}}", "lightning.callbacks.image_logger False: give a mapping"),
        ("model: {params: {unet_config: }}", "unet_config=None in params of .*LatentDiffusion: give a mapping"),
        ("model: {params: {first_stage_config: 3}}", "first_stage_config=3 in params of .*: give a mapping"),
    ],
)
def test_a_part_of_another_kind_is_one_line(part: str, said: str, begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text(part)
    with pytest.raises(UserError, match=said) as caught:
        begin("--base tiny.yaml part.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["data", "model"])
def test_a_missing_section_is_named(section: str, begin: Begin, tmp_path: Path) -> None:
    OmegaConf.save({name: part for name, part in CONFIG.items() if name != section}, tmp_path / "part.yaml")
    with pytest.raises(UserError, match=f"the config has no '{section}' section; give one with --base"):
        begin("--base part.yaml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("personalization_config={target: x}", r"personalization_config \{'target': 'x'\}: .*textual_inversion.yaml"),
        ("unfreeze_model=False", "unfreeze_model False: .*unet_trainable is false"),
        ("model_lr=1e-7", "model_lr 1e-07: .*model.base_learning_rate"),
        ("reg_weight=1.0", "reg_weight 1.0: .*prior_loss_weight"),
    ],
)
def test_a_training_that_a_fork_would_do_otherwise_is_refused(given: str, said: str, begin: Begin, tmp_path) -> None:
    key, _, value = given.partition("=")
    (tmp_path / "fork.yaml").write_text(f"model: {{params: {{{key}: {value}}}}}")
    with pytest.raises(UserError, match=f"model.params.{said}.*; to train without it, .*model.params.{key}=null"):
        begin("--base tiny.yaml fork.yaml")
    begin(f"--base tiny.yaml fork.yaml model.params.{key}=null")


def test_keys_of_forks_that_change_nothing_train(begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "fork.yaml").write_text(
        "model: {params: {unfreeze_model: true, model_lr: 1.0e-3, embedding_reg_weight: 0.0, u_cond_percent: 0,"
        " unet_config: {params: {add_conv_in_front_of_unet: false}}}}"
    )
    _, model = begin("--base tiny.yaml fork.yaml")
    assert model.learning_rate == pytest.approx(2e-3)


def test_a_folder_of_checkpoints_is_named_that_is_not_used(begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = begin("--base tiny.yaml lightning.modelcheckpoint.params.dirpath=elsewhere")
    assert "lightning.modelcheckpoint.params.dirpath is ignored: checkpoints are in logs/" in caplog.text
    assert not any("elsewhere" in str(getattr(callback, "dirpath", "")) for callback in trainer.callbacks)
