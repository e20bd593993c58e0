"""Every part of a checkpoint that a resume takes up is checked before anything is built."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.release.fresh import loops_at_start
from ldm.training.structure import check_structure
from ldm.util import UserError
from tests.training_runs import fixture_one_thread, fixture_train, state, the_run  # noqa: F401

SCHEDULE = (
    "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaLinearScheduler"
    " model.params.scheduler_config.params.warm_up_steps=[1] model.params.scheduler_config.params.cycle_lengths=[8]"
    " model.params.scheduler_config.params.f_start=[0.1] model.params.scheduler_config.params.f_max=[1.0]"
    " model.params.scheduler_config.params.f_min=[0.0]"
)
VALUES = [None, True, -1, 3, 2**70, math.nan, math.inf, "text", "", [], [1], {}, {"a": 1}, torch.tensor(math.nan)]
MUTATIONS = 120


@pytest.fixture(name="saved")
def fixture_saved(train, tmp_path: Path) -> dict[str, Any]:
    """The content of a real `last.ckpt`, with a schedule and optimizer state."""
    assert train(f"--max_steps 3 {SCHEDULE}") == 0
    return state(the_run(tmp_path / "logs") / "checkpoints/last.ckpt")


def places(value: Any, where: tuple = ()) -> list[tuple]:
    """The path of each entry below `value`, but for most of the weights."""
    found = []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, part) in enumerate(entries):
        if where[:1] in (("state_dict",), ("optimizer_states",)) and number > 3:
            break
        found += [(*where, key), *places(part, (*where, key))]
    return found


def mutated(content: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """A copy of `content` with one entry removed or replaced, and what was done."""
    content = copy.deepcopy(content)
    *parents, last = rng.choice(places(content))
    owner = content
    for key in parents:
        owner = owner[key]
    if isinstance(owner, dict) and rng.random() < 0.3:
        del owner[last]
        return content, f"{parents} without {last!r}"
    owner[last] = copy.deepcopy(rng.choice(VALUES))
    return content, f"{[*parents, last]} = {owner[last]!r}"


def test_check_structure_takes_a_real_checkpoint(saved):
    check_structure(saved, "last.ckpt", loops_at_start())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("pytorch-lightning_version"), "pytorch-lightning_version None is not a version"),
        (lambda c: c.update(global_step=-1), "global_step -1 is not a count"),
        (lambda c: c["state_dict"].update(extra=3), "state_dict.extra is not a tensor"),
        (lambda c: c["state_dict"].update(extra=torch.tensor(math.nan)), "state_dict.extra has values that are not fi"),
        (lambda c: c["loops"]["fit_loop"].pop("epoch_progress"), "loops.fit_loop.epoch_progress is missing"),
        (lambda c: c["optimizer_states"][0].pop("param_groups"), r"optimizer_states\[0\] has no param_groups"),
        (lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr=math.inf), "lr.* is not|lr is inf"),
        (lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"].fill_(math.inf), r"state\[0\].exp_avg has values"),
        (lambda c: c["lr_schedulers"][0].update(base_lrs=["x"]), r"lr_schedulers\[0\].base_lrs are not finite numbers"),
        (lambda c: c["callbacks"].update(StepSeeds={"seed": "x"}), "callbacks.StepSeeds.seed 'x' is not a seed"),
        (lambda c: c.update(callbacks=[1]), "callbacks is not a mapping"),
    ],
)
def test_check_structure_names_the_entry(saved, change, message):
    change(saved)
    with pytest.raises(UserError, match=rf"last\.ckpt: cannot be resumed \(.*({message})"):
        check_structure(saved, "last.ckpt", loops_at_start())


def test_a_mutated_checkpoint_resumes_or_is_refused_in_one_line(train, saved, tmp_path, monkeypatch):
    """Nothing but `UserError` may come out of a resume, whatever single entry of its checkpoint is wrong."""
    run = the_run(tmp_path / "logs")
    last = run / "checkpoints/last.ckpt"
    rng = random.Random(7)
    refused = 0
    for _ in range(MUTATIONS):
        content, what = mutated(saved, rng)
        torch.save(content, last)
        try:
            assert train(f"--resume {run} --max_steps 4") == 0, what
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), what
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert 10 < refused < MUTATIONS


def test_a_checkpoint_of_lightning_1_4_is_taken_as_weights(train, saved, tmp_path, caplog):
    caplog.set_level("INFO")
    del saved["loops"]
    saved |= {"pytorch-lightning_version": "1.4.2", "hparams_name": "kwargs"}
    torch.save(saved, tmp_path / "old.ckpt")
    assert train("-b tiny.yaml --resume old.ckpt -l second --max_steps 1 model.base_learning_rate=0") == 0
    resumed = state(the_run(tmp_path / "second") / "checkpoints/last.ckpt")
    assert resumed["global_step"] == 1 and "step counters start anew" in caplog.text and "1.4.2" in caplog.text
    key = next(key for key in saved["state_dict"] if key.startswith("model.diffusion_model."))
    torch.testing.assert_close(resumed["state_dict"][key], saved["state_dict"][key])
