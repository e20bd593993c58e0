"""Tests that resuming from a last.ckpt with one changed part gives one line, or succeeds."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from ldm.checkpoint import save_checkpoint
from ldm.util import UserError
from tests.training_runs import fixture_one_thread, fixture_train, state, the_run  # noqa: F401

BLOCKS, MUTATIONS = 2, 15  # blocks of a seed each; the fuzzer mutates many more without a training
SCHEDULE = "model.params.scheduler_config"
OPTIONS = f"{SCHEDULE}.target=ldm.lr_scheduler.LambdaLinearScheduler " + " ".join(
    f"{SCHEDULE}.params.{setting}"
    for setting in ("warm_up_steps=[1]", "cycle_lengths=[9]", "f_start=[1.0]", "f_max=[1.0]", "f_min=[0.5]")
)
VALUES = (None, "text", -1, 2.5, float("nan"), [], {}, True, torch.zeros(3), torch.full((2,), float("nan")), "missing")


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Yield the paths of all parts of `value`, and of weights and moments only two each."""
    found = [path] if path else []
    if isinstance(value, dict):
        keys = list(value)
        if path in (("state_dict",), ("optimizer_states", 0, "state")):
            keys = keys[:2]
        for key in keys:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for number, part in enumerate(value[:2]):
            found += places(part, (*path, number))
    return found


def mutated(content: dict, path: tuple, value: Any) -> dict:
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(value, str) and value == "missing":
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return content


@pytest.mark.parametrize("block", range(BLOCKS))
def test_check_structure_leaves_no_traceback(train, tmp_path, block) -> None:
    train(f"--max_steps 2 {OPTIONS}")
    run = the_run(tmp_path / "logs")
    last = run / "checkpoints" / "last.ckpt"
    content = state(last)
    rng = random.Random(block)
    found = places(content)
    refused = 0
    for _ in range(MUTATIONS):
        path, value = rng.choice(found), rng.choice(VALUES)
        save_checkpoint(mutated(content, path, value), last)
        try:
            train(f"--resume {run} --max_steps 3")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), (path, value)
        except Exception as error:  # names the mutation
            pytest.fail(f"{path} = {value!r}: {type(error).__name__}: {error}")
    assert refused > MUTATIONS // 4


def test_check_structure_refuses_non_finite_values_and_names_the_newest_undamaged_one(train, tmp_path) -> None:
    where = "lightning.modelcheckpoint.params"
    train(f"--max_steps 2 {where}.every_n_train_steps=1 {where}.monitor=null {where}.save_top_k=-1")
    run = the_run(tmp_path / "logs")
    last = run / "checkpoints" / "last.ckpt"
    content = state(last)
    for path in (
        ("state_dict", next(key for key in content["state_dict"] if key.startswith("model."))),
        ("optimizer_states", 0, "state", 0, "exp_avg_sq"),
        ("optimizer_states", 0, "param_groups", 0, "lr"),
        ("learning_rate",),
    ):
        old = content
        for key in path:
            old = old[key]
        bad = torch.full_like(old, float("nan")) if isinstance(old, torch.Tensor) else float("nan")
        save_checkpoint(mutated(content, path, bad), last)
        with pytest.raises(UserError, match=r"finite.*; resume the newest undamaged one .*of step 2: ") as caught:
            train(f"--resume {run} --max_steps 3")
        assert str(path[-1]) in str(caught.value)


def test_a_checkpoint_of_lightning_1_4_gives_its_weights(train, tmp_path, caplog) -> None:
    train("--max_steps 2")
    run = the_run(tmp_path / "logs")
    last = run / "checkpoints" / "last.ckpt"
    content = state(last)
    del content["loops"]
    save_checkpoint({**content, "pytorch-lightning_version": "1.4.2", "callbacks": {}}, tmp_path / "old.ckpt")
    caplog.set_level("INFO")
    assert train("-b tiny.yaml --resume old.ckpt -l new --max_steps 1") == 0
    assert caplog.text.count("the step counters start at 0") == 1
    assert state(the_run(tmp_path / "new") / "checkpoints" / "last.ckpt")["global_step"] == 1
