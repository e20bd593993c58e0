"""Tests that git ignores the files of users in the checkout, and not those of the project in `data/`."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_data_of_users_is_ignored_and_ours_is_not(tmp_path):
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    theirs = ["data/train/set-000.tar", "data/shards/null.t5.npy", "data/tom.png"]
    theirs += ["logs/run/last.ckpt", ".mine.ckpt.lock"]
    ours = ["data/README.md", "data/render_emoji.py", "data/LICENSE-NotoEmoji.txt"]
    ours += [f"data/{folder}/new.png" for folder in ("base", "cats", "emoji", "prompts")]
    command = ["git", "-C", tmp_path, "check-ignore", "--no-index", *theirs, *ours]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == theirs
