"""Test of the demo with two steps per training and per image, and with few images."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ldm.checkpoint import load_state_dict
from tests.conftest import ROOT
from tools import demo


def test_the_demo_runs_the_recipe_and_writes_an_image(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "demo"
    monkeypatch.chdir(ROOT)  # as the demo does
    monkeypatch.setattr("ldm.cli.run.subprocess.run", lambda line: command(*line[1:], cwd=ROOT))
    monkeypatch.setattr(demo, "SAMPLER", ("--steps", 2, *demo.SAMPLER[2:]))
    for name, value in (("SAMPLES", 1), ("NEIGHBOURS", ["dog face"]), ("OTHERS", 4)):  # images, prompts, captions
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(out), "--steps", "2"])
    caplog.set_level("INFO")
    demo.main()
    said = "\n".join(caplog.messages)

    commands = re.findall(r"^\$ python (\S+)", said, re.MULTILINE)
    tuning = [None, "merge_release", "txt2img"]
    tools = ["preencode", "hack_weights", "txt2img", *tuning, "make_prior", *tuning]
    assert commands == [f"tools/{tool}.py" if tool else "main.py" for tool in tools]

    image = out / "before-and-after.png"
    assert str(image) in said.splitlines()[-1]
    assert len(Image.open(image).getcolors(1 << 20)) > 1000

    before = load_state_dict(ROOT / "data/base/emoji.safetensors")
    for name in ("tuned", "kept"):
        after = load_state_dict(out / f"{name}.safetensors")
        assert before.keys() == after.keys()
        assert {key.split(".")[0] for key in before if not before[key].equal(after[key])} == {"model"}
