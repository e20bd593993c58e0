"""Tests of the fields of the page and the values that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.commands import ROOT
from ldm.studio.fields import RECIPE, default_fields, read_recipe, whole_number
from ldm.studio.sampled_images import labels, new_folder, read_sampling
from ldm.util import UserError


def recipe(**values: Any) -> Any:
    fields = {**default_fields(demo=True), **values}
    allowed = AllowedFolders([ROOT / "data"])
    return read_recipe({name: fields[name] for name in RECIPE}, allowed, Path("work"), False)


def test_the_demo_fills_a_whole_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = recipe(prompts="\n a \n\nb", rate=None)
    assert (found.base, found.config, found.size) == ("demo_tiny.yaml", "demo_tiny_release.yaml", 64)
    assert Path(found.release) == ROOT / "data/base/emoji.safetensors"
    assert found.prompts == ("a", "b")
    assert found.overrides == ()  # what the release predicts, the config has
    assert default_fields(demo=False) == default_fields(demo=True)  # no release is at the usual place


def test_a_release_at_its_usual_place_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = Path("models/ldm/stable-diffusion-v1/model.ckpt")
    place.parent.mkdir(parents=True)
    place.touch()
    assert default_fields(demo=False)["release"] == str(place)
    assert default_fields(demo=True)["release"] == str(ROOT / "data/base/emoji.safetensors")


@pytest.mark.parametrize(("values", "reason"), [
    ({"images": "/etc"}, "folder of images '/etc': lies outside"),
    ({"images": str(ROOT / "data/missing")}, "no such file or folder"),
    ({"release": ""}, "release: is empty"),
    ({"release": str(ROOT / "data/cats/metadata.jsonl")}, "metadata.jsonl"),
    ({"base": "/etc/x.yaml"}, "config of the training '/etc/x.yaml': lies outside"),
    ({"base": ""}, "no family matches"),
    ({"name": "a/b"}, "name of the run"),
    ({"size": -64}, "size -64: give a whole number"),
    ({"steps": 1.5}, "steps 1.5: give a whole number"),
    ({"minutes": -1}, "time budget"),
])  # fmt: skip
def test_read_recipe_refuses_wrong_values(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        recipe(**values)


def test_whole_number_takes_an_empty_field() -> None:
    assert [whole_number(value, "x") for value in (None, 0, 3, 3.0)] == [0, 0, 3, 3]
    for value in (True, "3", 0.5, -1):
        with pytest.raises(UserError, match="x "):
            whole_number(value, "x")


def test_read_sampling() -> None:
    found = read_sampling("a\n\n b ", 3, None, 10, 7.5, "ddim")
    assert (found.prompts, found.seed, found.count) == (("a", "b"), 3, 1)
    assert labels(found.prompts, 3, 2) == ["a (seed 3)", "a (seed 4)", "b (seed 3)", "b (seed 4)"]
    with pytest.raises(UserError, match="prompts: are empty"):
        read_sampling(" \n", 3, 1, 10, 7.5, "ddim")
    with pytest.raises(UserError, match="more than 200 images"):
        read_sampling("a\nb", 3, 101, 10, 7.5, "ddim")
    with pytest.raises(UserError, match="scale"):
        read_sampling("a", 3, 1, 10, None, "ddim")


def test_new_folder_is_the_first_free_number(tmp_path: Path) -> None:
    assert new_folder(tmp_path) == tmp_path / "1"
    for name in ("1", "2", "4"):
        (tmp_path / name).mkdir()
    assert new_folder(tmp_path) == tmp_path / "3"
