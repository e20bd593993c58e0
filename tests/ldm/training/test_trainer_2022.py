"""Tests of the translation of Trainer arguments of 2022."""

import logging

import pytest
from omegaconf import OmegaConf

from ldm.training.trainer_2022 import check_names, merge_arguments, move_old_keys, translate_arguments
from ldm.util import UserError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"devices": 1}),
        ({"gpus": "0,"}, {"accelerator": "gpu", "devices": [0]}),
        ({"gpus": "0,1"}, {"accelerator": "gpu", "devices": [0, 1]}),
        ({"gpus": "0,1,"}, {"accelerator": "gpu", "devices": [0, 1]}),
        ({"gpus": 1}, {"accelerator": "gpu", "devices": 1}),
        ({"gpus": "2"}, {"accelerator": "gpu", "devices": 2}),
        ({"gpus": "0", "accelerator": "gpu"}, {"accelerator": "gpu", "devices": [0]}),
        ({"gpus": [1]}, {"accelerator": "gpu", "devices": [1]}),
        ({"gpus": -1}, {"accelerator": "gpu", "devices": -1}),
        ({"gpus": 0}, {"accelerator": "cpu", "devices": 1}),
        ({"gpus": None}, {"accelerator": "cpu", "devices": 1}),
        ({"gpus": "0,", "accelerator": "ddp"}, {"accelerator": "gpu", "devices": [0]}),
        ({"gpus": "0,1", "accelerator": "ddp"}, {"accelerator": "gpu", "devices": [0, 1], "strategy": "ddp"}),
        ({"gpus": "0,1", "distributed_backend": "ddp_spawn"}, {"accelerator": "gpu", "devices": [0, 1]}
         | {"strategy": "ddp_spawn"}),
        ({"accelerator": "ddp_cpu", "num_processes": 2}, {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}),
        ({"accelerator": "gpu", "devices": 2}, {"accelerator": "gpu", "devices": 2}),
        ({"replace_sampler_ddp": False}, {"use_distributed_sampler": False, "devices": 1}),
        ({"terminate_on_nan": True}, {"detect_anomaly": True, "devices": 1}),
        ({"checkpoint_callback": False}, {"enable_checkpointing": False, "devices": 1}),
        ({"weights_summary": None}, {"enable_model_summary": False, "devices": 1}),
        ({"weights_summary": "None"}, {"enable_model_summary": False, "devices": 1}),
        ({"strategy": "dp", "gpus": 2}, {"accelerator": "gpu", "devices": 2, "strategy": "ddp"}),
        ({"strategy": "fsdp", "devices": 2}, {"devices": 2, "strategy": "fsdp"}),
        ({"row_log_interval": 5, "val_percent_check": 0.5, "max_nb_epochs": 3, "gradient_clip": 1.0},
         {"log_every_n_steps": 5, "limit_val_batches": 0.5, "max_epochs": 3, "gradient_clip_val": 1.0, "devices": 1}),
        ({"weights_summary": "top"}, {"enable_model_summary": True, "devices": 1}),
        ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False, "devices": 1}),
        ({"progress_bar_refresh_rate": 20}, {"devices": 1}),
        ({"reload_dataloaders_every_epoch": True}, {"reload_dataloaders_every_n_epochs": 1, "devices": 1}),
        ({"precision": "bf16", "max_steps": 5}, {"precision": "bf16", "max_steps": 5, "devices": 1}),
    ],
)  # fmt: skip
def test_translation(given, expected):
    assert translate_arguments(given, has_cuda=True) == expected


def test_without_cuda_gpus_warns_and_trains_on_the_cpu(caplog):
    assert translate_arguments({"gpus": "0,"}, has_cuda=False) == {"accelerator": "cpu", "devices": 1}
    assert "no CUDA device" in caplog.text


def test_no_gpu_is_told_of_where_there_is_one(caplog):
    assert translate_arguments({"gpus": 0}, has_cuda=True) == {"accelerator": "cpu", "devices": 1}
    assert "--gpus 0 means no GPU, so training runs on the CPU; for GPU number 0, give '--gpus 0,'" in caplog.text
    caplog.clear()
    translate_arguments({"gpus": 0}, has_cuda=False)
    assert not caplog.text


@pytest.mark.parametrize("name", ["auto_select_gpus", "amp_backend", "flush_logs_every_n_steps", "track_grad_norm"])
def test_obsolete_arguments_are_ignored_with_one_warning(name, caplog):
    caplog.set_level(logging.WARNING)
    assert translate_arguments({name: True}, has_cuda=True) == {"devices": 1}
    assert len(caplog.records) == 1 and f"Trainer argument {name} is ignored: " in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": "cuda:0"}, "--gpus 'cuda:0': give device numbers"),
        ({"gpus": "a,b"}, "give device numbers"),
        (
            {"gpus": 2, "distributed_backend": "ddp_spwn"},
            "unknown distributed_backend 'ddp_spwn'; did you mean 'ddp_spawn'",
        ),
    ],
)
def test_bad_values_are_named(given, message):
    with pytest.raises(UserError, match=message):
        translate_arguments(given, has_cuda=True)


def test_unknown_names_are_refused_with_the_nearest():
    valid = {"max_steps", "precision"}
    check_names(["max_steps", "gpus", "amp_backend", "replace_sampler_ddp"], valid, "option --{}")
    with pytest.raises(UserError, match="unknown option --max_step; did you mean 'max_steps'"):
        check_names(["max_step"], valid, "option --{}")


def test_move_old_keys_finds_find_unused_parameters_in_the_trainer(caplog):
    section = OmegaConf.create({"trainer": {"find_unused_parameters": True, "max_steps": 3}})
    move_old_keys(section)
    assert section == {"trainer": {"max_steps": 3}, "find_unused_parameters": True}
    own = OmegaConf.create({"trainer": {"find_unused_parameters": True}, "find_unused_parameters": False})
    move_old_keys(own)
    assert own.find_unused_parameters is False  # the present place takes precedence
    move_old_keys(OmegaConf.create({}))
    assert not caplog.records


@pytest.mark.parametrize(
    ("config", "typed", "expected"),
    [
        ({"log_every_n_steps": 1}, {"row_log_interval": 5}, {"row_log_interval": 5}),
        ({"val_percent_check": 0.5}, {"limit_val_batches": 3}, {"limit_val_batches": 3}),
        ({"devices": 2, "max_steps": 9}, {"gpus": "0,"}, {"gpus": "0,", "max_steps": 9}),
        ({"weights_summary": "full"}, {"enable_model_summary": False}, {"enable_model_summary": False}),
        ({"strategy": "ddp"}, {"distributed_backend": "ddp_spawn"}, {"distributed_backend": "ddp_spawn"}),
        ({"gpus": 2, "max_steps": 9}, {"max_steps": 1}, {"gpus": 2, "max_steps": 1}),
    ],
)
def test_merge_arguments_gives_way_to_what_is_typed_under_any_name(config, typed, expected):
    assert merge_arguments(config, typed) == expected


def test_merge_arguments_refuses_two_names_of_one_argument():
    with pytest.raises(UserError, match=r"lightning.trainer.overfit_pct and lightning.trainer.overfit_batches"):
        merge_arguments({"overfit_pct": 0.5, "overfit_batches": 1}, {})


def test_move_old_keys_points_to_resume():
    section = OmegaConf.create({"trainer": {"resume_from_checkpoint": None, "max_steps": 3}})
    move_old_keys(section)
    assert section == {"trainer": {"max_steps": 3}}
    with pytest.raises(UserError, match=r"resume_from_checkpoint 'a\.ckpt': give --resume a\.ckpt"):
        move_old_keys(OmegaConf.create({"trainer": {"resume_from_checkpoint": "a.ckpt"}}))


def test_move_old_keys_names_metrics_over_trainsteps_checkpoint(caplog):
    move_old_keys(OmegaConf.create({"metrics_over_trainsteps_checkpoint": False}))
    assert not caplog.records
    move_old_keys(OmegaConf.create({"metrics_over_trainsteps_checkpoint": True}))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "save_top_k: -1" in caplog.text
