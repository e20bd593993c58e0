"""Tests of evaluation during training: metrics, saved initial results, resuming, and unchanged training."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.callbacks.forgetting import Forgetting
from ldm.checkpoint import load_checkpoint, load_into, load_state_dict, save_checkpoint, save_state_dict
from ldm.config.load import build_model
from ldm.evaluation.denoising import compare, record
from ldm.evaluation.protocol import midpoint_timesteps
from ldm.evaluation.sets import open_set
from ldm.util import UserError
from tests.golden_data import fill_seeded
from tests.sent_signals import sending
from tests.training_runs import (  # noqa: F401
    CONFIG,
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    the_run,
)

PLACE = "lightning.callbacks.forgetting"
RELEASED = "model.params.ckpt_path=released.safetensors"
KEYS = [f"eval/{name}/{metric}" for name in ("new", "rest") for metric in ("loss", "loss_ratio", "drift")]


def watching(every: int = 2, **sets: str) -> str:
    """Return the options that train from the released weights and evaluate on `sets`."""
    named = sets or {"new": "shards/s-000000.tar", "rest": "shards/s-000001.tar"}
    params = [f"every_n_train_steps={every}", "timesteps=4", "limit=3", "batch_size=2"]
    params += [f"sets.{name}={urls}" for name, urls in named.items()]
    words = [f"{PLACE}.target=ldm.callbacks.forgetting.Forgetting", *(f"{PLACE}.params.{param}" for param in params)]
    return " ".join([RELEASED, *words])


@pytest.fixture(name="released")
def fixture_released(tmp_path, train):
    """Save seeded weights as `released.safetensors`, because a fresh model predicts zero; return the model."""
    model = fill_seeded(build_model(OmegaConf.create(CONFIG)))
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("model_ema.")}
    save_state_dict(weights, tmp_path / "released.safetensors")
    return model


def everything_logged(run: Path) -> dict[str, dict[int, str]]:
    return {key: logged(run, key) for key in KEYS}


@pytest.mark.slow
def test_the_metrics_equal_an_evaluation_of_the_merged_weights(train, released, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert train(f"--max_steps 5 {watching()} --log_every_n_steps 50") == 0
    run = the_run(tmp_path / "logs")
    found = everything_logged(run)
    assert all(list(values) == [0, 2, 4] for values in found.values())
    for name in ("new", "rest"):
        assert float(found[f"eval/{name}/loss_ratio"][0]) == 1 and float(found[f"eval/{name}/drift"][0]) == 0
        assert float(found[f"eval/{name}/drift"][4]) > float(found[f"eval/{name}/drift"][2]) > 0
    assert "Evaluation at step 4: new loss " in caplog.text

    train(f"-l four --max_steps 4 {watching()}")
    tuned = copy.deepcopy(released)
    load_into(tuned, load_state_dict(the_run(tmp_path / "four") / "checkpoints" / "last.ckpt"))
    timesteps = midpoint_timesteps(50, 4)
    image_set = open_set("rest", "shards/s-000001.tar", released, 3)
    released.restart_ema()
    comparison = compare(record(released.eval(), image_set, timesteps, 8), tuned.eval(), image_set, timesteps, 8)
    expected = (comparison.tuned.mean(), comparison.tuned.mean() / comparison.base.mean(), comparison.drift.mean())
    values = [float(found[f"eval/rest/{metric}"][4]) for metric in ("loss", "loss_ratio", "drift")]
    assert values == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_evaluation_does_not_change_the_training(train, released, tmp_path):
    train(f"-l plain --max_steps 6 {RELEASED}")
    train(f"-l watched --max_steps 6 {watching()}")
    train(f"-l often --max_steps 6 {watching(1)}")
    for other in ("watched", "often"):
        assert_same_training(the_run(tmp_path / "plain"), the_run(tmp_path / other))


@pytest.mark.slow
def test_accumulated_batches_are_evaluated_once_per_step(train, released, tmp_path):
    train(f"--max_steps 4 {watching()} --accumulate_grad_batches 3")
    (path,) = the_run(tmp_path / "logs").glob("csv/*/metrics.csv")
    assert list(logged(the_run(tmp_path / "logs"), "eval/new/loss")) == [0, 2, 4]
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    assert sum(bool(row[header.index("eval/new/loss")]) for row in rows) == 3


@pytest.mark.slow
def test_a_resumed_run_logs_the_same_metrics(train, released, tmp_path):
    train(f"-l straight --max_steps 6 {watching()}")
    train(f"-l resumed --max_steps 3 {watching()}")
    straight, resumed = the_run(tmp_path / "straight"), the_run(tmp_path / "resumed")
    start = (resumed / "evaluation" / "start.safetensors").read_bytes()
    assert train(f"--resume {resumed} --max_steps 6") == 0
    assert (resumed / "evaluation" / "start.safetensors").read_bytes() == start
    assert everything_logged(resumed) == everything_logged(straight)
    assert_same_training(straight, resumed)
    assert [path.name for path in (resumed / "evaluation").iterdir()] == ["start.safetensors"]


@pytest.mark.slow
def test_monitor_keeps_the_best_without_validation_data(train, released, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options = "model.params.monitor=eval/new/loss lightning.modelcheckpoint.params.save_top_k=1"
    # The weights themselves, at a rate that makes the loss rise and fall.
    assert train(f"--max_steps 20 {watching()} {options} model.params.use_ema=False model.base_learning_rate=3e-2") == 0
    run = the_run(tmp_path / "logs")
    losses = {step: float(loss) for step, loss in logged(run, "eval/new/loss").items() if step}
    best = min(losses, key=losses.get)
    (kept,) = (path for path in (run / "checkpoints").iterdir() if path.name != "last.ckpt")
    assert load_checkpoint(kept)["global_step"] == best != 20
    assert "No best checkpoints" not in caplog.text


@pytest.mark.slow
def test_a_resumed_run_ranks_as_an_uninterrupted_one(train, released, tmp_path):
    options = "--max_steps 8 model.params.monitor=eval/new/drift --accumulate_grad_batches 2"
    train(f"-l straight {watching()} {options}")
    train(f"-l resumed {watching()} {options} {sending(4, 2)}")
    resumed = the_run(tmp_path / "resumed")
    assert train(f"--resume {resumed} {sending(0, 2)}") == 0
    names = [
        sorted(path.name for path in run.glob("checkpoints/*")) for run in (the_run(tmp_path / "straight"), resumed)
    ]
    assert names[0] == names[1] and len(names[0]) == 4


@pytest.mark.slow
def test_hacked_weights_are_a_new_start(train, released, tmp_path, caplog):
    """`hack_weights` leaves out the callback's state of the old weights."""
    train(f"--max_steps 2 {watching()}")
    run = the_run(tmp_path / "logs")
    last = run / "checkpoints" / "last.ckpt"
    content = load_checkpoint(last, mmap=False)
    assert content["callbacks"].pop("Forgetting") == {"recorded": 0}
    save_checkpoint(content, last)
    train(f"--resume {run} --max_steps 4")
    assert "made at step 2; loss ratio and drift compare with these weights" in caplog.text
    assert {step: float(drift) for step, drift in logged(run, "eval/new/drift").items()}[2] == 0
    assert load_checkpoint(last)["callbacks"]["Forgetting"] == {"recorded": 2}


@pytest.mark.slow
def test_a_resumed_run_needs_the_same_sets(train, released, tmp_path):
    train(f"--max_steps 2 {watching()}")
    run = the_run(tmp_path / "logs")
    for change in ("timesteps=5", "limit=2", "sets.new=shards/s-000001.tar", "sets.more=shards/s-000001.tar"):
        with pytest.raises(UserError, match=r"start\.safetensors: made with other images or timesteps of the set"):
            train(f"--resume {run} --max_steps 4 {PLACE}.params.{change}")
    (run / "evaluation" / "start.safetensors").unlink()
    assert train(f"--resume {run} --max_steps 4 {PLACE}.params.limit=2") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (watching(new="nowhere.tar"), "set 'new': nowhere.tar: no such file"),
        (watching(0), "forgetting: .*every_n_train_steps 0: give a whole number of at least 1"),
        (f"{watching()} {PLACE}.params.timesteps=51", "51 timesteps for the evaluation: choose 1 to 50"),
        (f"{watching()} {PLACE}.params.limit=0", "limit 0: give a whole number of at least 1"),
        (f"{watching()} {PLACE}.params.sets=null", "sets None: give at least one"),
        (f"{watching()} {PLACE}.params.every=3", "unknown key 'every'"),
        (f"{watching()} model.params.scale_by_std=True", "set scale_factor, not scale_by_std"),
    ],
)
def test_mistakes_are_refused_in_one_line_and_write_nothing(train, released, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        train(f"--max_steps 1 {options}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("logs/*"))


def test_other_models_are_refused():
    callback = Forgetting({"new": "shards/s-000000.tar"}, every_n_train_steps=1)
    with pytest.raises(UserError, match="needs a LatentDiffusion, not a Linear"):
        callback.setup(None, torch.nn.Linear(1, 1), "fit")


def test_a_set_that_is_null_is_left_out():
    assert Forgetting({"new": "data/val/*.tar", "rest": None}, every_n_train_steps=1).urls == {"new": "data/val/*.tar"}
    with pytest.raises(UserError, match="give at least one"):
        Forgetting({"rest": None}, every_n_train_steps=1)
