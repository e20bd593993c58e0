"""What lists of runs choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.cli.paths import LOGS
from ldm.studio.controls import with_new_runs


def test_a_list_follows_the_newest_run_unless_another_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs, empty = with_new_runs([], None)
    assert (runs, empty["choices"], empty["value"]) == ([], [], None)
    for name in ("1_cats", "2_cats", "3_cats"):
        (LOGS / name / "checkpoints").mkdir(parents=True)
    found, first, newest, other = with_new_runs(["2_cats", "1_cats"], None, "2_cats", "1_cats")
    assert found == ["3_cats", "2_cats", "1_cats"]
    assert [update["choices"] for update in (first, newest, other)] == [found] * 3
    assert [update["value"] for update in (first, newest, other)] == ["3_cats", "3_cats", "1_cats"]
