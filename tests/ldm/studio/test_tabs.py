"""Tests of the page as a whole."""

from __future__ import annotations

import re
from pathlib import Path

from ldm.studio import tabs
from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.fields import default_fields
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


def test_fields_have_a_first_value(tmp_path: Path) -> None:
    studio = Studio(AllowedFolders([tmp_path]), tmp_path / "work", default_fields(demo=True))
    assert set(studio.saved()) == set(default_fields(demo=False))
