"""Test of the demo with two training steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from ldm.checkpoint import load_state_dict

ROOT = Path(__file__).parents[2]


def test_the_demo_runs_the_recipe_and_writes_an_image(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, ROOT / "tools" / "demo.py", "--out", out, "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    commands = re.findall(r"^\$ python (\S+)", done.stdout, re.MULTILINE)
    tuning = [None, "merge_release", "txt2img"]
    tools = ["preencode", "hack_weights", "txt2img", *tuning, "make_prior", *tuning]
    assert commands == [f"tools/{tool}.py" if tool else "main.py" for tool in tools]

    image = out / "before-and-after.png"
    assert str(image) in done.stdout.splitlines()[-1]
    assert len(Image.open(image).getcolors(1 << 20)) > 1000

    before = load_state_dict(ROOT / "data/base/emoji.safetensors")
    for name in ("tuned", "kept"):
        after = load_state_dict(out / f"{name}.safetensors")
        assert before.keys() == after.keys()
        assert {key.split(".")[0] for key in before if not before[key].equal(after[key])} == {"model"}
