"""Hostile configs in every tool and in training, under a guard: no process, no socket, no file outside the folder.

All run in one process, whose imports are done before the guard is armed. Each command also runs on a good config, so
that a refusal is one of the config.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hostile.config_files import placed_inside, placed_outside, untrusted
from tests.hostile.guarded_commands import (
    COMMANDS,
    TRAIN,
    merged,
    named_commands,
    reading_commands,
    resumed_commands,
    words_of,
    write,
    write_good,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of all commands, and one outside it that nothing may touch."""
    top = tmp_path_factory.mktemp("guarded")
    for name in ("work", "outside"):
        (top / name).mkdir()
    for name in ("victim.ckpt", "victim.txt"):
        (top / "outside" / name).write_text("keep")
    return top / "work", top / "outside"


@pytest.fixture(scope="module")
def outcomes(places: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    """Run all commands; return their outcomes by `kind: config: command`."""
    work, outside = places
    training, release = write_good(work)
    write(training, work / "tiny.yaml")
    write(release, work / "release.yaml")
    (work / "evil.py").write_text(f"open({str(outside / 'marker')!r}, 'w')\nclass Thing: ...\n")
    jinaai = work / "x-jinaai-x"
    jinaai.mkdir()
    (jinaai / "config.json").write_text('{"model_type": "clip", "auto_map": {"AutoModel": "evil.Thing"}}')
    (jinaai / "evil.py").write_text((work / "evil.py").read_text())
    guarded = []
    # One function reads the configs of all tools: each config goes to main.py and two tools, each tool gets many.
    others = [tool for tool in COMMANDS if tool != "main"]
    for number, (name, part) in enumerate(untrusted(outside / "marker").items()):
        write(merged(training, part), work / f"{number}-tiny.yaml")
        write(merged(release, part), work / f"{number}-release.yaml")
        guarded += [
            {"name": f"untrusted: {name}: {tool}", "words": words_of(COMMANDS[tool], f"{number}-")}
            for tool in ("main", *(others[(2 * number + step) % len(others)] for step in range(2)))
        ]
    for kind, parts in (("outside", placed_outside(outside)), ("inside", placed_inside(outside))):
        for number, (name, part) in enumerate(parts.items()):
            write(merged(training, part), work / f"{kind}{number}-tiny.yaml")
            guarded.append({"name": f"{kind}: {name}: main", "words": words_of(TRAIN, f"{kind}{number}-")})
    for option in ("--name", "--postfix"):
        for text in ("../../outside/x", str(outside / "x"), "a/../../x", "a\nb", "..\\x"):
            guarded.append({"name": f"outside: {option} {text!r}: main", "words": [*TRAIN.split(), f"{option}={text}"]})
    guarded += named_commands(work)
    guarded += resumed_commands(work, outside, training)
    guarded += reading_commands(work, training, untrusted(outside / "marker"))
    warm = [{"name": f"good: {tool}", "words": command.split()} for tool, command in COMMANDS.items()]
    plan = {"allowed": str(work), "warm": warm, "guarded": guarded}
    (work.parent / "plan.json").write_text(json.dumps(plan))
    environment = {name: value for name, value in os.environ.items() if name != "LDM_RUN_FOLDER"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(work)]), "OMP_NUM_THREADS": "1"}
    environment["XDG_CACHE_HOME"] = str(work / "cache")
    line = [sys.executable, str(ROOT / "tests/hostile/guard.py"), str(work.parent / "plan.json"), "../result.json"]
    done = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((work.parent / "result.json").read_text())


def of_kind(outcomes: Mapping[str, dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    found = {name: outcome for name, outcome in outcomes.items() if name.startswith(kind)}
    assert found
    return found


def test_good_configs_run_in_every_tool(outcomes: Mapping[str, dict[str, Any]]) -> None:
    assert {name: outcome["exit"] for name, outcome in of_kind(outcomes, "good").items() if outcome["exit"]} == {}


def test_untrusted_configs_ask_for_trust_in_every_tool(outcomes: Mapping[str, dict[str, Any]]) -> None:
    wrong = {}
    for name, outcome in of_kind(outcomes, "untrusted").items():
        said = outcome["exit"]
        asks = isinstance(said, str) and said.startswith("error: ") and "give --trust-config" in said
        if not asks or not said.isprintable() or outcome["stopped"]:
            wrong[name] = outcome
    assert wrong == {}


def test_places_outside_the_run_folder_are_refused(outcomes: Mapping[str, dict[str, Any]]) -> None:
    wrong = {}
    for name, outcome in of_kind(outcomes, "outside").items():
        said = outcome["exit"]
        refused = isinstance(said, str) and said.startswith("error: ") and said.isprintable()
        if not refused or outcome["stopped"]:
            wrong[name] = outcome
    assert wrong == {}


def test_places_that_a_run_does_not_follow_do_no_harm(outcomes: Mapping[str, dict[str, Any]]) -> None:
    wrong = {name: o for name, o in of_kind(outcomes, "inside").items() if o["exit"] is not None or o["stopped"]}
    assert wrong == {}


def test_a_resumed_run_touches_nothing_but_its_own_files(
    outcomes: Mapping[str, dict[str, Any]], places: tuple[Path, Path]
) -> None:
    before = of_kind(outcomes, "before")
    assert {name: outcome for name, outcome in before.items() if outcome["exit"] or outcome["stopped"]} == {}
    resumed = of_kind(outcomes, "resumed")
    assert {name: outcome["stopped"] for name, outcome in resumed.items() if outcome["stopped"]} == {}
    assert resumed.pop("resumed state")["exit"] is None
    for name, outcome in resumed.items():
        assert outcome["exit"].startswith("error: link '"), name
        assert "lies outside" in outcome["exit"], name
    (run,) = places[0].glob("logs-state/*")
    assert list((run / "configs").glob("*.yaml")) and (run / "checkpoints" / "last.ckpt").is_file()


def test_tools_that_read_configs_as_data_need_no_trust(outcomes: Mapping[str, dict[str, Any]]) -> None:
    for name, outcome in of_kind(outcomes, "reading").items():
        assert (outcome["exit"], outcome["stopped"]) == (None, []), name
        assert "\x1b" not in outcome["said"] and "usage:" not in outcome["said"]


def test_messages_hold_no_control_characters(outcomes: Mapping[str, dict[str, Any]]) -> None:
    obeyed = re.compile(r"[^\n\t\r\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")
    wrong = {name: outcome["said"] for name, outcome in outcomes.items() if obeyed.search(outcome["said"])}
    assert wrong == {}
    named = of_kind(outcomes, "names")
    for name, outcome in named.items():
        assert not re.search("^ *FORGED", outcome["said"], re.MULTILINE), name
        assert re.search(r"FORGED|\\x1b", outcome["said"]) or name == "names: prior", name
        assert "Traceback" not in outcome["said"], name


def test_nothing_outside_was_made_changed_or_removed(
    outcomes: Mapping[str, dict[str, Any]], places: tuple[Path, Path]
) -> None:
    work, outside = places
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"victim.ckpt": "keep", "victim.txt": "keep"}
    expected = {"work", "outside", "plan.json", "result.json"}
    assert {path.name for path in work.parent.iterdir()} == expected


def test_the_guard_stops_what_it_is_for(places: tuple[Path, Path]) -> None:
    work, outside = places
    script = work / "harmful.py"
    script.write_text(
        "import os, shutil, socket, subprocess, sys\n"
        f"outside = {str(outside)!r}\n"
        "acts = [lambda: subprocess.run(['true']), lambda: os.system('true'), lambda: os.fork(),\n"
        "    lambda: os.posix_spawn('/bin/true', ['true'], {}), lambda: socket.getaddrinfo('localhost', 1),\n"
        "    lambda: socket.socket().connect(('127.0.0.1', 9)), lambda: open(f'{outside}/x', 'w'),\n"
        "    lambda: os.remove(f'{outside}/victim.txt'), lambda: shutil.rmtree(outside),\n"
        "    lambda: os.rename('a', f'{outside}/x'), lambda: os.mkdir('../x'), lambda: open('link/victim.txt', 'a')]\n"
        "os.symlink(outside, 'link')\n"
        "stopped = 0\n"
        "for act in acts:\n"
        "    try:\n"
        "        act()\n"
        "    except PermissionError as error:\n"
        "        stopped += 'the guard' in str(error)\n"
        "os.unlink('link')\n"
        "open('own', 'w').close(), os.remove('own')\n"
        "sys.exit(len(acts) - stopped)\n"
    )
    plan = {"allowed": str(work), "warm": [], "guarded": [{"name": "harmful", "words": [str(script)]}]}
    (work / "plan.json").write_text(json.dumps(plan))
    line = [sys.executable, str(ROOT / "tests/hostile/guard.py"), "plan.json", "result.json"]
    subprocess.run(line, cwd=work, check=True)
    outcome = json.loads((work / "result.json").read_text())["harmful"]
    assert outcome["exit"] == 0 and len(outcome["stopped"]) == 12
