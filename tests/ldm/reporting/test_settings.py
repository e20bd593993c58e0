from __future__ import annotations

from pathlib import Path

import yaml

from ldm.config.load import find_config
from ldm.reporting.settings import differences, params_of, read_settings


def saved(tmp_path: Path, **changes: object) -> list[Path]:
    """The config of the demo with changes of `data.params`, in two files as a run saves it."""
    config = yaml.safe_load(find_config("demo_tiny.yaml").read_text())
    config["data"]["params"] |= changes
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({key: config[key] for key in ("model", "data")}))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"lightning": {**config["lightning"], "scale_lr": True}}))
    return [tmp_path / "a.yaml", tmp_path / "b.yaml"]


def test_read_settings_names_the_nearest_shipped_config_and_the_differences(tmp_path: Path) -> None:
    for given in ([], ["configs/latent-diffusion/demo_tiny.yaml"], ["mine.yaml"]):
        problems: list[str] = []
        settings = read_settings(saved(tmp_path, batch_size=5), given, problems)
        assert settings.base == ["demo_tiny.yaml"]
        assert settings.differences == [("data.params.batch_size", ["16", "5"])]
        assert problems == []


def test_read_settings_lists_a_damaged_config(tmp_path: Path) -> None:
    whole, other = saved(tmp_path)
    other.write_text("lightning: [")
    problems: list[str] = []
    assert read_settings([whole, other], [], problems).config["model"]
    assert len(problems) == 1 and "b.yaml" in problems[0] and "not valid YAML" in problems[0]


def test_read_settings_leaves_out_sections_that_are_no_mappings(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: x\ndata: {params: x}\nlightning: [1]\n")
    assert read_settings([path], [], []).config == {"data": {"params": "x"}}
    assert params_of({"data": {"params": "x"}}, "data") == params_of({}, "model") == {}


def test_read_settings_keeps_values_of_the_environment_as_text(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "do not show")
    settings = read_settings(saved(tmp_path, key="${oc.env:SECRET}"), [], [])
    assert ("data.params.key", ["–", "${oc.env:SECRET}"]) in settings.differences


def test_differences_of_flat_configs() -> None:
    assert differences([{"a": 1, "b": None}, {"a": 1, "b": False}]) == [("b", ["null", "false"])]
