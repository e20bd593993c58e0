"""Tests of main.py: training, the run folder and its logs, and the switches and names of 2022."""

import logging
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers.logger import DummyLogger

import main
from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.config.load import load_config
from ldm.release.merge import merge_files
from ldm.training.resume import AtomicCheckpointIO
from ldm.util import get_obj_from_str
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    run_main,
    state,
    the_run,
    write_inputs,
)


class FakeWandbLogger(DummyLogger):
    """Notes what it was made with."""

    made = None

    def __init__(self, name, save_dir, project) -> None:
        super().__init__()
        type(self).made = {"name": name, "save_dir": save_dir, "project": project}


def test_a_run_folder_holds_checkpoints_configs_logs_and_images(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    images = "lightning.callbacks.image_logger.params.disabled=False lightning.callbacks.image_logger.params"
    validation = "data.params.val_urls=shards/s-000000.tar"
    assert train(f"-n first -f x --max_steps 3 {images}.batch_frequency=4 {validation} --val_check_interval 2") == 0
    run = the_run(tmp_path / "logs")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_first_x", run.name)
    kept = [path.name for path in (run / "checkpoints").iterdir()]
    assert "last.ckpt" in kept and len(kept) == 2
    steps = {path.name.split("_gs-")[1][:6] for path in (run / "images" / "train").glob("*.png")}
    assert steps == {"000001", "000002"}
    assert {path.name.split("_gs-")[0] for path in (run / "images" / "val").glob("*.png")} >= {"inputs", "samples"}
    assert list((run / "tensorboard").glob("events*")) and sorted(logged(run, "train/loss")) == [0, 1, 2]
    assert set(logged(run, "lr-AdamW").values()) == {"0.002"}
    assert "2.000e-03 = 1 (accumulated batches) * 1 (devices) * 2 (batch size) * 1.000e-03" in caplog.text

    project, lightning = (next((run / "configs").glob(f"*-{name}.yaml")) for name in ("project", "lightning"))
    assert OmegaConf.load(project).data.params.val_urls == "shards/s-000000.tar"
    assert OmegaConf.load(lightning).lightning.trainer.max_steps == 3
    assert set(load_config([lightning, project])) == {"model", "data", "lightning"}


def test_the_best_checkpoints_are_ranked_by_the_validation_of_their_step(train, tmp_path, monkeypatch):
    saved = []

    def note(self, content, path, storage_options=None):
        saved.append((content["global_step"], Path(path).name))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    every = (
        "lightning.modelcheckpoint.params.every_n_train_steps=1 lightning.modelcheckpoint.params.in_background=false"
    )
    assert train(f"--max_steps 5 --val_check_interval 2 {every} data.params.val_urls=shards/s-000000.tar") == 0
    assert [step for step, name in saved if name != "last.ckpt"] == [2, 4]
    assert [step for step, name in saved if name == "last.ckpt"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--val_check_interval 4", [4, 10]),  # an epoch has 6 steps
        ("--val_check_interval 4 lightning.modelcheckpoint.params.save_on_train_epoch_end=true", [4, 10]),
        ("--check_val_every_n_epoch 2 lightning.modelcheckpoint.params.save_on_train_epoch_end=true", [12]),
        ("lightning.modelcheckpoint.params.save_on_train_epoch_end=true", [6, 12]),
    ],
)
def test_the_end_of_an_epoch_is_ranked_only_by_a_score_of_its_step(train, tmp_path, options, steps):
    where = "lightning.modelcheckpoint.params"
    name = f"{where}.filename={{step}}-{{val/loss_simple_ema:.9f}} {where}.save_top_k=-1"
    assert train(f"--max_epochs 2 {options} {name} data.params.val_urls=shards/s-000000.tar") == 0
    run = the_run(tmp_path / "logs")
    scores = {int(step) + 1: float(score) for step, score in logged(run, "val/loss_simple_ema").items()}
    folder = run / "checkpoints"
    assert not [path for path in folder.iterdir() if path.is_dir()]  # for the / in the metric's name
    kept = {path for path in folder.iterdir() if path.name != "last.ckpt"}
    assert {path.name for path in kept} == {f"step={n}-val_loss_simple_ema={scores[n]:.9f}.ckpt" for n in steps}
    assert {state(path)["global_step"] for path in kept} == set(steps)


@pytest.mark.parametrize("option", ["lightning.logger=false", "--logger False"])
def test_without_a_logger_nothing_is_logged(train, tmp_path, option):
    assert train(f"--max_steps 1 {option}") == 0
    run = the_run(tmp_path / "logs")
    assert {path.name for path in run.iterdir()} == {"checkpoints", "configs", "events.jsonl"}
    assert not list(tmp_path.rglob("*tfevents*")) and not list(tmp_path.rglob("*.csv"))


def test_the_csv_has_its_columns_in_order_and_the_same_after_a_resume(train, tmp_path):
    validation = "data.params.val_urls=shards/s-000000.tar --val_check_interval 2"
    train(f"--max_steps 2 {validation}")
    run = the_run(tmp_path / "logs")
    train(f"--resume {run} --max_steps 4")
    heads = [path.read_text().splitlines()[0].split(",") for path in sorted(run.glob("csv/*/metrics.csv"))]
    assert len(heads) == 2 and all(head == sorted(head) for head in heads)
    assert all({"step", "epoch", "train/loss", "val/loss_simple_ema", "lr-AdamW"} <= set(head) for head in heads)


def test_what_was_typed_is_saved_and_taken_up_as_it_was(train, tmp_path):
    (tmp_path / "shards").rename(tmp_path / "s #1 [on] %d")
    typed = ["lightning.callbacks.image_logger.params.log_images_kwargs={n_row: 2, plot_denoise_rows: false}"]
    typed += ["model.params.monitor=null", "model.params.linear_end=2e-2"]
    assert train(["--max_steps", "1", "data.params.training_urls=s #1 [on] %d/s-000000.tar", *typed]) == 0
    run = the_run(tmp_path / "logs")
    project, lightning = (next((run / "configs").glob(f"*-{name}.yaml")) for name in ("project", "lightning"))
    saved = load_config([project, lightning])
    assert saved.data.params.training_urls == "s #1 [on] %d/s-000000.tar"
    assert saved.model.params.monitor is None and saved.model.params.linear_end == 0.02
    kwargs = saved.lightning.callbacks.image_logger.params.log_images_kwargs
    assert kwargs == {"n_row": 2, "plot_denoise_rows": False}
    assert train(["--resume", str(run), "--max_steps", "2"]) == 0
    assert sorted(logged(run, "train/loss")) == [0, 1]


def test_weights_are_kept_at_intervals_as_public_configs_ask(train, tmp_path):
    where = "lightning.callbacks.metrics_over_trainsteps_checkpoint"
    assert train(f"--max_steps 4 {where}.params.every_n_train_steps=2") == 0
    folder = the_run(tmp_path / "logs") / "checkpoints" / "trainstep_checkpoints"
    names = ["epoch=000000-step=000000002.ckpt", "epoch=000000-step=000000004.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    content = state(folder / names[0])
    assert content["global_step"] == 2 and "optimizer_states" not in content
    release = {key: value for key, value in content["state_dict"].items() if not key.startswith("model_ema.")}
    save_state_dict({key: torch.zeros_like(value) for key, value in release.items()}, tmp_path / "release.ckpt")
    merge_files(folder / names[0], tmp_path / "release.ckpt", tmp_path / "merged.ckpt", "raw", half=False)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(load_state_dict(tmp_path / "merged.ckpt")[key], release[key])


def test_without_a_monitor_checkpoints_are_kept_at_intervals(train, tmp_path):
    params = "lightning.modelcheckpoint.params"
    assert train(f"--max_steps 4 {params}.every_n_train_steps=2 {params}.monitor=null {params}.save_top_k=-1") == 0
    kept = {path.name for path in (the_run(tmp_path / "logs") / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "epoch=000000-step=000000002.ckpt", "epoch=000000-step=000000004.ckpt"}


def test_checkpoints_hold_plain_data_that_a_strict_reader_takes(train, tmp_path):
    train("--max_steps 1")
    checkpoint = state(the_run(tmp_path / "logs") / "checkpoints" / "last.ckpt")
    assert checkpoint["callbacks"]["StepSeeds"] == {"seed": 23}
    assert any(key.startswith("model_ema.") for key in checkpoint["state_dict"])


def test_images_validation_and_workers_do_not_change_the_losses(train, tmp_path):
    train("-l plain --max_steps 8")
    image_logger = "lightning.callbacks.image_logger.params.disabled=False"
    train(f"-l busy --max_steps 8 {image_logger} data.params.val_urls=shards/s-000000.tar data.params.num_workers=2")
    assert_same_training(the_run(tmp_path / "plain"), the_run(tmp_path / "busy"))


def test_piped_output_is_a_few_lines(train, capsys, caplog, recwarn):
    caplog.set_level(logging.INFO)
    validation = "data.params.val_urls=shards/s-000000.tar model.params.monitor=nope"
    assert train(f"--max_steps 18 --log_every_n_steps 50 --enable_model_summary True {validation}") == 0
    output = capsys.readouterr()
    assert not output.out and not output.err
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "img/s" in line] == [
        line for line in said if line.startswith("Epoch 2, step 18: ")
    ]
    assert any(line.endswith("parameters, 246 K of them trained") for line in said)
    assert not [line for line in said if "FLOP" in line or "TPU" in line or "weights_only" in line]
    assert not [warning for warning in recwarn if "logging interval" in str(warning.message)]
    (warning,) = (line for line in said if "No best checkpoints" in line)
    assert "'nope' is not logged (" in warning and "val/loss_simple_ema" in warning and "validation data" not in warning


def test_the_2022_name_of_the_weights_to_start_from(train, tmp_path):
    train("-l first --max_steps 1")
    (the_run(tmp_path / "first") / "checkpoints" / "last.ckpt").rename(tmp_path / "released.ckpt")
    weights = state(tmp_path / "released.ckpt")["state_dict"]
    assert train("--finetune_from released.ckpt --scale_lr False --num_nodes 1 --max_steps 1 -l second") == 0
    tuned = state(the_run(tmp_path / "second") / "checkpoints" / "last.ckpt")
    assert tuned["global_step"] == 1
    for key in (key for key in weights if key.startswith("model.")):
        torch.testing.assert_close(tuned["state_dict"][key], weights[key], rtol=0, atol=2e-3)


def test_the_switches_of_2022_train(train, tmp_path, caplog):
    old = "--gpus 0, --accelerator ddp --precision 32 --num_nodes 1 --weights_summary None --replace_sampler_ddp False"
    old += " --progress_bar_refresh_rate 0 --auto_select_gpus False --checkpoint_callback True --benchmark True"
    assert train(f"{old} --max_epochs 1 --check_val_every_n_epoch 1 --scale_lr False") == 0
    assert "no CUDA device" in caplog.text and "auto_select_gpus is ignored" in caplog.text
    run = the_run(tmp_path / "logs")
    assert set(logged(run, "lr-AdamW").values()) == {"0.001"}
    assert state(run / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_the_test_set_runs_after_training_and_alone(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, "-b tiny.yaml -t --max_steps 1")
    assert "No test: the config has no test set" in caplog.text
    run = the_run(tmp_path / "logs")
    run_main(monkeypatch, f"--resume {run} data.params.test_urls=shards/s-000000.tar")
    assert logged(run, "test/loss_ema")


def test_fast_dev_run_writes_no_checkpoint(train, tmp_path):
    assert train("--fast_dev_run True") == 0
    assert not list(tmp_path.rglob("*.ckpt"))


def test_exports_are_what_yaml_files_name():
    for name in ("DataModuleFromConfig", "WebDataNpyModuleFromConfig", "SetupCallback", "ImageLogger", "CUDACallback"):
        assert get_obj_from_str(f"main.{name}").__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'ImageLoger'"):
        main.ImageLoger  # noqa: B018


def test_another_logger_replaces_tensorboard(train, tmp_path):
    assert train("--max_steps 1 -p paintings lightning.logger.target=tests.test_main.FakeWandbLogger") == 0
    run = the_run(tmp_path / "logs")
    folder = run.relative_to(tmp_path)
    made = get_obj_from_str("tests.test_main.FakeWandbLogger").made  # pytest knows this file by another name
    assert made == {"name": run.name, "save_dir": str(folder), "project": "paintings"}
    assert not (run / "tensorboard").exists() and logged(run, "train/loss")
