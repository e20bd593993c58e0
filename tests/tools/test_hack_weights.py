"""Tests of the command `tools/hack_weights.py`."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fork_server import run_script
from ldm.checkpoint import ema_key, load_checkpoint, load_into, load_state_dict, save_checkpoint, save_state_dict
from ldm.checkpoint.keys import UNET
from ldm.config.load import build_model, load_config
from ldm.release.families import FAMILIES
from tests.sparse_files import write_sparse

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "hack_weights.py"
RELEASE = "models/ldm/stable-diffusion-v1/model.ckpt"
LAST = "logs/run/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Make a working folder with a release and the training checkpoint of an aborted run, at the default paths."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    weights = build_model(load_config(["demo_tiny.yaml"])).state_dict()
    text = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(64)}
    released = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in weights.items()}
    released = {key: value for key, value in released.items() if not key.startswith("model_ema.")}
    save_state_dict({**released, **text}, folder / RELEASE)
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    training = {"epoch": 0, "global_step": 3, "pytorch-lightning_version": "2.6.0", "loops": {}, "callbacks": {}}
    save_checkpoint(
        {**training, "state_dict": weights, "optimizer_states": [optimizer], "lr_schedulers": []}, folder / LAST
    )
    return folder


@pytest.fixture
def work(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "work")


def hack(folder, *arguments):
    return run_script([str(TOOL), *map(str, arguments)], folder)


def run_here(monkeypatch, folder, *arguments):
    """Run the tool in this process, which saves the import of torch; return the exit code or message."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOL), run_name="__main__")
    return caught.value.code


def check(path, release):
    """Assert that weights and average equal the release's weights, and that the schedule is the config's."""
    hacked, released = load_state_dict(path), load_state_dict(release)
    model = build_model(load_config(["demo_tiny.yaml"]))
    assert hacked.keys() == model.state_dict().keys()
    for key, value in hacked.items():
        if key.startswith(("model.", "first_stage_model.")):
            assert torch.equal(value, released[key]), key
        if key.startswith("model."):
            assert torch.equal(hacked[ema_key(key)], released[key])
    assert torch.equal(hacked["betas"], model.betas)
    load_into(model, hacked)


def test_without_arguments_the_default_paths_are_used_and_printed(work):
    before = (work / LAST).read_bytes()
    done = hack(work)
    assert done.returncode == 0, done.stderr
    check(work / LAST, work / RELEASE)
    content = load_checkpoint(work / LAST)
    assert content["global_step"] == 3
    assert content["optimizer_states"] == [{"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}]
    kept = work / LAST.replace("last", "last.before-hack")
    assert kept.read_bytes() == before
    for said in (
        RELEASE,
        LAST,
        kept.name,
        "text encoder weights of the release skipped: this training has no text encoder",
        "at step 3",
    ):
        assert said in done.stdout

    again = hack(work)
    assert again.returncode == 0
    assert kept.read_bytes() == before  # never overwritten
    assert (work / LAST.replace("last", "last.before-hack-2")).exists()


def test_base_makes_a_training_checkpoint(work):
    shutil.rmtree(work / "logs")
    done = hack(work, "--base", "demo_tiny.yaml")
    assert done.returncode == 0, done.stderr
    out = work / RELEASE.replace("model.ckpt", "hacked.ckpt")
    check(out, work / RELEASE)
    content = load_checkpoint(out)
    assert content["global_step"] == 0
    assert torch.load(out, weights_only=True).keys() == content.keys()
    assert f"--resume {RELEASE.replace('model.ckpt', 'hacked.ckpt')}" in done.stdout


def test_a_config_that_names_a_file_of_weights_makes_a_training_checkpoint(work, monkeypatch, run_tool):
    monkeypatch.chdir(work)
    (work / "own.yaml").write_text(f"model: {{params: {{ckpt_path: {RELEASE}}}}}")
    assert run_tool(TOOL, "--base", "demo_tiny.yaml", "own.yaml", "--out", "start.ckpt") is None
    check(work / "start.ckpt", work / RELEASE)


def test_out_leaves_the_training_checkpoint_unchanged(work):
    before = (work / LAST).read_bytes()
    shutil.move(work / RELEASE, work / "r.safetensors")
    done = hack(work, "--train-ckpt", LAST, "--release", "r.safetensors", "--out", "start.ckpt")
    assert done.returncode == 0, done.stderr
    check(work / "start.ckpt", work / "r.safetensors")
    assert (work / LAST).read_bytes() == before
    assert not list(work.rglob("*before-hack*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--release", "none.ckpt"], "none.ckpt: no such file"),
        (["--train-ckpt", "none.ckpt"], "none.ckpt: no such file"),
        (["--train-ckpt", RELEASE], "name two different files"),
        (["--release", LAST, "--train-ckpt", RELEASE], "not a training checkpoint"),
        (["--base", "none.yaml"], "none.yaml"),
        (["--base", "finetune_stable_diffusion.yaml"], "of another model"),
        (["--base", "demo_tiny.yaml", "--train-ckpt", LAST], "only one"),
        (["--base"], "no family matches these weights; the nearest is Stable Diffusion 1"),
        (["--out", RELEASE], "choose another --out"),
        (["--out", "hacked.safetensors"], "must end in .ckpt"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(arguments, message, prepared, monkeypatch):
    before = {path: path.is_file() and path.stat().st_mtime_ns for path in prepared.rglob("*")}
    printed = run_here(monkeypatch, prepared, *arguments)
    assert printed.startswith("error: ") and message in printed and "\n" not in printed
    assert {path: path.is_file() and path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_without_a_run_or_a_config_the_release_tells_its_family(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    shapes = {key: shape for key, shape in FAMILIES["sdxl"].shapes.items() if key.startswith(UNET)}
    write_sparse(tmp_path / "xl.safetensors", shapes)
    for base in ([], ["--base"]):
        caplog.clear()
        error = run_here(monkeypatch, tmp_path, "--release", "xl.safetensors", *base)
        assert "xl.safetensors: Stable Diffusion XL (1024 pixels, predicts the noise)" in caplog.messages
        assert "finetune_stable_diffusion_xl.yaml" in caplog.text
        assert error.startswith("error: xl.safetensors: lacks model.diffusion_model.")
        assert "\n" not in error and not list(tmp_path.glob("*.ckpt"))


def test_an_error_is_exit_code_1(tmp_path):
    done = hack(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "--train-ckpt" in done.stderr and done.stderr.count("\n") == 1


def test_help_imports_neither_torch_nor_lightning(help_of):
    printed, packages = help_of(TOOL)
    assert "--train-ckpt" in printed and not packages & {"torch", "pytorch_lightning", "lightning"}
