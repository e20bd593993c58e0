"""Tests of the page as a whole."""

from __future__ import annotations

import re
from pathlib import Path

import gradio as gr
import pytest

from ldm.studio import tabs
from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.commands import ROOT
from ldm.studio.fields import DEMO_RELEASE, default_fields
from ldm.studio.studio import Studio


def test_the_docstring_names_the_controls(tmp_path: Path) -> None:
    page = tabs.build_page(Studio(AllowedFolders([tmp_path]), tmp_path / "work", default_fields(demo=True)))
    own = {block.elem_id for block in page.blocks.values() if block.elem_id} - {"title"}
    kinds = [*re.findall(r"kind `([a-z-]+)`", tabs.__doc__), "images-check"]
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", tabs.__doc__)) - {"running", "finished", "stopped", "failed",
                                                                        "killed", "data-state"}  # fmt: skip
    named |= {f"{kind}-{part}" for kind in kinds for part in ("status", "stop", "output", "log")}
    assert named - {"evaluate", "lora", "strength"} == own
    assert page.analytics_enabled is False


def test_no_function_of_the_page_is_a_public_api(tmp_path: Path) -> None:
    page = tabs.build_page(Studio(AllowedFolders([tmp_path]), tmp_path / "work", default_fields(demo=True)))
    assert {function.api_visibility for function in page.fns.values()} == {"private"}


def test_an_idle_page_asks_once_for_all_jobs_and_makes_no_component_anew(tmp_path: Path) -> None:
    page = tabs.build_page(Studio(AllowedFolders([tmp_path]), tmp_path / "work", default_fields(demo=True)))
    (timer,) = (number for number, block in page.blocks.items() if isinstance(block, gr.Timer))
    (asked,) = (function for function in page.fns.values() if (timer, "tick") in function.targets)
    assert len(asked.outputs) > 5 and all(isinstance(output, gr.State) for output in asked.outputs)


def test_fields_have_a_first_value(tmp_path: Path) -> None:
    studio = Studio(AllowedFolders([tmp_path]), tmp_path / "work", default_fields(demo=True))
    assert set(studio.saved()) == set(default_fields(demo=False))


@pytest.mark.parametrize("shown", ["train-commands", "plan-command", "plan-recognised", "compare-command",
                                   "strength-command", "evaluate-command", "release-merge-command"])  # fmt: skip
def test_no_command_reads_a_config_through_a_link_that_leads_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    (tmp_path / "here/logs/a/configs").mkdir(parents=True)
    (tmp_path / "secret.yaml").write_text("a: b")
    monkeypatch.chdir(tmp_path / "here")
    Path("link.yaml").symlink_to(tmp_path / "secret.yaml")
    values = default_fields(demo=True) | {"compare_tuned": str(DEMO_RELEASE)}
    page = tabs.build_page(Studio(AllowedFolders([Path(), ROOT / "data"]), Path("work"), values))
    given = {
        "plan-config": "link.yaml", "plan-base": "link.yaml", "images-folder": values["images"],
        "train-overwrite": False, "strength-run": "a", "release-run": "a", "release-strength": 1.0,
        "compare-n": 1, "compare-steps": 1, "compare-scale": 1, "compare-sampler": "ddim",
    }  # fmt: skip
    function = next(one for one in page.fns.values()
                    if [part.elem_id for part in one.outputs] == [shown] and one.fn.__name__ != "begin")  # fmt: skip
    found = function.fn(*[given[name] if name in given else values.get(name.replace("-", "_"), values.get(name[5:], ""))
                          for name in (part.elem_id for part in function.inputs)])  # fmt: skip
    assert "link.yaml" in found and "lies outside of the folders" in found
