"""The choice of a strength, by hand."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldm.evaluation.front import AtStrength
from ldm.release import keep
from ldm.release.keep import chosen_strength
from ldm.util import UserError


def swept(**losses: float) -> list[AtStrength]:
    """Return results with the loss ratio of the subject per strength in hundredths, such as `a50=0.4`."""

    def row(name: str, loss: float) -> Any:
        of = {"loss_ratio": SimpleNamespace(value=loss), "drift": SimpleNamespace(value=0.1)}
        return SimpleNamespace(name=name, overall=SimpleNamespace(**of))

    return [AtStrength(int(key[1:]) / 100, [row("subject", loss), row("kept", 1.0)]) for key, loss in losses.items()]


def test_the_lowest_strength_that_keeps_the_share() -> None:
    """Learnt are 0.5, 0.75, 0.79 and 0.8 of the loss; 95 % of 0.8 is 0.76, and 90 % is 0.72."""
    results = swept(a40=0.5, a60=0.25, a80=0.21, a100=0.2)
    assert chosen_strength(results, 0.95, "x") == 0.8
    assert chosen_strength(results, 0.9, "x") == 0.6
    assert chosen_strength(results, 1.0, "x") == 1.0


def test_keeping_strength_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process knows the temporary folder of a killed one by its name."""
    monkeypatch.setattr(keep, "_run_config", lambda _: {})
    monkeypatch.setattr(keep, "_sets", lambda *_: {})
    made = []

    def fail(training: Path, release: Path, out: Path, *_: Any, **__: Any) -> None:
        made.append(out.parent.name)
        out.write_text("half")
        raise UserError("the disk is full")

    monkeypatch.setattr(keep, "merge_files", fail)
    with pytest.raises(UserError, match="the disk is full"):
        keep.keeping_strength(tmp_path / "last.ckpt", tmp_path / "r.ckpt", 0.9)
    assert list(tmp_path.iterdir()) == []
    assert re.fullmatch(rf"\.keep\.{re.escape(os.uname().nodename)}\.{os.getpid()}-\w+-\w+\.\w+\.tmp", made[0])


def test_a_lower_strength_may_have_learnt_more() -> None:
    assert chosen_strength(swept(a40=0.3, a100=0.4), 1.0, "x") == 0.4


def test_a_training_that_learnt_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"--keep: on shards/x\.tar, the training's loss is 1\.2 times the release's"):
        chosen_strength(swept(a50=1.0, a100=1.2), 0.95, "shards/x.tar")
