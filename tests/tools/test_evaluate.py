"""Tests of the command `tools/evaluate.py` on two tiny releases and small sets."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint, save_state_dict
from ldm.config.load import build_model
from tests.conftest import ROOT
from tests.golden_data import fill_seeded, seeded_tensor
from tests.ldm.shard_files import write_set, write_tar
from tests.training_runs import CONFIG, TEXT_TOWER

TOOL = ROOT / "tools/evaluate.py"
SHAPES = {"f8_shape": (8, 4, 4), "t5_shape": (77, 8)}
FAST = ("--timesteps", 3, "--out", "out", "--device", "cpu")


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with base.safetensors, tuned.ckpt, other.ckpt of another model, two configs, and sets of shards."""
    folder = tmp_path_factory.mktemp("releases")
    config = copy.deepcopy(CONFIG)
    params = config["model"]["params"]
    OmegaConf.save(OmegaConf.create({"model": config["model"]}), folder / "stored.yaml")
    params |= {"use_ema": False, "first_stage_key": "image", "cond_stage_key": "txt", "cond_stage_config": TEXT_TOWER}
    OmegaConf.save(OmegaConf.create({"model": config["model"]}), folder / "release.yaml")
    model = fill_seeded(build_model(OmegaConf.create(config)))
    save_state_dict(model.state_dict(), folder / "base.safetensors")
    with torch.no_grad():
        for key, parameter in model.model.named_parameters():
            parameter += 0.05 * parameter.abs().mean() * seeded_tensor(f"tuned {key}", tuple(parameter.shape))
    save_checkpoint({"state_dict": model.state_dict()}, folder / "tuned.ckpt")
    params["unet_config"]["params"]["model_channels"] = 64
    save_checkpoint({"state_dict": build_model(OmegaConf.create(config)).state_dict()}, folder / "other.ckpt")
    write_set(folder / "new", 4, **SHAPES)
    write_set(folder / "rest", 6, **SHAPES)
    write_set(folder / "narrow", 2, f8_shape=(6, 4, 4))
    write_tar(folder / "empty.tar", [])
    return folder


@pytest.fixture
def here(releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_tool: Callable) -> Callable:
    """Return a function that runs the command in a folder with links to the releases, and returns None or the error."""
    for path in releases.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    return partial(run_tool, TOOL)


def pair(base: str = "base.safetensors", ckpt: str = "tuned.ckpt", config: str = "release.yaml") -> tuple[str, ...]:
    return "--base", base, "--ckpt", ckpt, "--config", config


def test_table_json_and_figure(releases: Path, command: Callable, tmp_path: Path) -> None:
    sets = ("--set", f"new={releases}/new/*.tar", "--set", f"rest={releases}/rest")
    files = pair(*(releases / name for name in ("base.safetensors", "tuned.ckpt", "release.yaml")))
    sampling = ("--sample", 2, "--seed", 9, "--steps", 2, "--scale", 2, "--sampler", "dpm_solver")
    done = command("tools/evaluate.py", *files, *sets, *sampling, *FAST, "--limit", 5, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    head, new, rest = done.stdout.strip().splitlines()[-5:-2]
    assert head.split()[:2] == ["set", "images"] and head.endswith("tuned to image")
    assert new.split()[:2] == ["new", "4"] and rest.split()[:2] == ["rest", "5"]

    content = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert content["format_version"] == 2 and content["base"].endswith("base.safetensors")
    assert content["settings"] == {
        "timesteps": 3,
        "batch_size": 2,
        "limit": 5,
        "precision": "fp32",
        "device": "cpu",
        "sampling": {"count": 2, "seed": 9, "steps": 2, "scale": 2.0, "sampler": "dpm_solver"},
    }
    for name, count in (("new", 4), ("rest", 5)):
        entry = content["sets"][name]
        assert entry["images"] == count and [at["t"] for at in entry["timesteps"]] == [8, 25, 41]
        drift = entry["overall"]["drift"]
        assert 0 < drift["low"] < drift["value"] < drift["high"] < 1
        assert [sample["seed"] for sample in entry["samples"]["images"]] == [9, 10]
        assert entry["samples"]["images"][0]["prompt"] == "caption 0"
        assert entry["samples"]["base_to_tuned"]["value"] > 0
    with Image.open(tmp_path / "out/evaluation.png") as figure:
        assert figure.format == "PNG" and figure.height > 600


def test_a_model_compared_with_itself_has_no_drift(here: Callable, tmp_path: Path) -> None:
    assert here(*pair(ckpt="base.safetensors"), "--set", "new=new", *FAST, "--sample", 1, "--steps", 2) is None
    entry = json.loads((tmp_path / "out/evaluation.json").read_text())["sets"]["new"]
    for summary in (entry["overall"], *entry["timesteps"]):
        assert summary["drift"] == {"value": 0, "low": 0, "high": 0}
        assert summary["loss_ratio"] == {"value": 1, "low": 1, "high": 1}
    assert entry["samples"]["base_to_tuned"]["value"] == 0


def test_without_a_text_encoder_the_stored_encodings_are_used(here: Callable, tmp_path: Path) -> None:
    assert here(*pair(config="stored.yaml"), "--set", "new=new", *FAST) is None
    stored = json.loads((tmp_path / "out/evaluation.json").read_text())["sets"]["new"]
    assert here(*pair(), "--set", "new=new", *FAST) is None
    read = json.loads((tmp_path / "out/evaluation.json").read_text())["sets"]["new"]
    assert stored["overall"]["loss_base"] != read["overall"]["loss_base"]
    assert stored["samples"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*pair(), "--set", "new=nowhere.tar"), "set 'new': nowhere.tar: no such file"),
        ((*pair(), "--set", "new=new", "--sweep-strength"), "--set new=new: a sweep needs a further set"),
        ((*pair(), "--set", "new=new", "--sweep-strength", "-1"), "--sweep-strength -1.0"),
        ((*pair(), "--set", "new=new", "--sweep-strength", "--sample", "1"), "--sample 1: a sweep samples no images"),
        ((*pair(), "--set", "new=new", "--block", "out"), "--block: belongs to --sweep-strength"),
        ((*pair(), "--set", "a=new", "--set", "b=rest", "--sweep-strength", "--subject", "c"), "--subject 'c'"),
        ((*pair(), "--set", "a=new", "--set", "b=rest", "--sweep-strength", "--block", "no"), "--block no: no weight"),
        ((*pair(), "--set", "narrow"), "--set narrow: give NAME=SHARDS"),
        ((*pair(), "--set", "new=narrow"), "set 'new': .* has shape (6, 4, 4); the model takes .* (8, h, w)"),
        ((*pair(), "--set", "new=empty.tar"), "set 'new': no samples in 1 shard, "),
        ((*pair(), "--set", "a=new", "--set", "a=rest"), "--set a=rest: the name 'a' is given twice"),
        ((*pair(base="other.ckpt"), "--set", "new=new"), "other.ckpt: .* is this a checkpoint of another model?"),
        ((*pair(ckpt="other.ckpt"), "--set", "new=new"), "other.ckpt: .* is this a checkpoint of another model?"),
        ((*pair(base="none.ckpt"), "--set", "new=new"), "none.ckpt: no such file"),
        ((*pair(ckpt="none.ckpt"), "--set", "new=nowhere.tar"), "none.ckpt: no such file"),
        ((*pair(config="none.yaml"), "--set", "new=new"), "config 'none.yaml' not found"),
        ((*pair(), "--set", "new=new", "--timesteps", 51), "51 timesteps for the evaluation: choose 1 to 50"),
        ((*pair(), "--set", "new=new", "--limit", 0), "--limit 0: give a whole number of at least 1, or leave it out"),
        ((*pair(), "--set", "new=new", "--seed", -1), "--seed -1: give a whole number from 0 to 9223372036854775807"),
        ((*pair(), "--set", "new=new", "--scale", "nan"), "--scale nan: give a finite number"),
        (
            (*pair(), "--set", "new=new", "--sample", 1, "--steps", 99),
            "sampling steps 99: give a whole number from 1 to 50",
        ),
        ((*pair(config="stored.yaml"), "--set", "new=new", "--sample", 1), "reads no captions"),
        ((*pair(), "--set", "new=new", "--out", "empty.tar"), "--out empty.tar: is a file"),
    ],
)
def test_bad_input_is_refused_in_one_line(here: Callable, tmp_path: Path, arguments: tuple, message: str) -> None:
    error = here(*FAST, *arguments)
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error
    for part in message.split(".* "):
        assert part in error
    assert not (tmp_path / "out").exists()


def test_a_sweep_begins_at_the_base_ends_at_the_tuned_release_and_passes_the_merge(
    here: Callable, tmp_path: Path, run_tool: Callable
) -> None:
    sets = ("--set", "new=new", "--set", "rest=rest")
    assert here(*pair(), *sets, *FAST, "--sweep-strength", 0, 0.5, 1) is None
    content = json.loads((tmp_path / "out/strengths.json").read_text())
    at = {entry["strength"]: entry for entry in content["strengths"]}
    assert content["subjects"] == ["new"] and list(at) == [0, 0.5, 1]
    assert all(entry["loss_ratio"]["value"] == 1 and entry["drift"]["value"] == 0 for entry in at[0]["sets"].values())
    with Image.open(tmp_path / "out/strengths.png") as figure:
        assert figure.format == "PNG"

    merge = run_tool(
        ROOT / "tools/merge_models.py", "base.safetensors", "tuned.ckpt", "--alpha", 0.5, "--out", "half.ckpt"
    )
    assert merge is None
    for strength, ckpt in ((0.5, "half.ckpt"), (1, "tuned.ckpt")):
        assert here(*pair(ckpt=ckpt), *sets, *FAST) is None
        merged = json.loads((tmp_path / "out/evaluation.json").read_text())["sets"]
        for name, entry in at[strength]["sets"].items():
            assert entry["drift"]["value"] == pytest.approx(merged[name]["overall"]["drift"]["value"], rel=1e-5)
            assert entry["loss_tuned"]["value"] == pytest.approx(
                merged[name]["overall"]["loss_tuned"]["value"], rel=1e-5
            )


def test_a_sweep_of_a_block_keeps_the_other_weights_tuned(here: Callable, tmp_path: Path) -> None:
    sets = ("--set", "new=new", "--set", "rest=rest")
    drifts = {}
    for block in ((), ("--block", "middle_block")):
        assert here(*pair(), *sets, *FAST, "--sweep-strength", 0, 1, *block) is None
        content = json.loads((tmp_path / "out/strengths.json").read_text())
        drifts[block] = [entry["sets"]["rest"]["drift"]["value"] for entry in content["strengths"]]
    (none, all_tuned), (other_blocks, same) = drifts.values()
    assert none == 0 < other_blocks != all_tuned and same == all_tuned
