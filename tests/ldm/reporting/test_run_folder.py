from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.events import END, FAULT, FORECAST, START, EventLog
from ldm.locks import LOCK, locked
from ldm.reporting.run_folder import count_of, read_run
from ldm.util import UserError
from tests.run_folders import write_run

COMMAND = ["main.py", "--base", "demo_tiny.yaml", "-t", "data.params.batch_size=3"]


def test_read_run_of_a_recorded_run(tmp_path: Path) -> None:
    run, release = write_run(tmp_path / "run"), {"name": "r.ckpt", "sha256": "ab"}
    events = EventLog(run)
    events.add(FORECAST, device_bytes=3 << 30, host_bytes=1 << 30)
    events.add(START, command=COMMAND, release=release)
    found = read_run(run, 1 << 20)
    assert found.state == "killed, or under way on another machine"
    assert (found.release, found.forecast) == (release, {"device": 3, "host": 1})
    assert found.settings.base == ["demo_tiny.yaml"]
    with locked(run / LOCK, "run"):
        assert read_run(run, 1 << 20).state == "under way"
    events.step = 2
    events.add(FAULT, text="not finite")
    found = read_run(run, 1 << 20)
    assert found.state == "ended by an error"
    assert [(moment.kind, moment.step, moment.text) for moment in found.moments] == [
        (FORECAST, None, "device 3.00 GiB, host 1.00 GiB"),
        (START, None, "python main.py --base demo_tiny.yaml -t data.params.batch_size=3"),
        (FAULT, 2, "not finite"),
    ]
    events.add(END)
    assert read_run(run, 1 << 20).state == "finished"


def test_read_run_without_events_shows_the_starts_of_its_configs(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path / "run"), 1 << 20)
    assert [(moment.time, moment.kind) for moment in found.moments] == [("2026-01-02T03:04:05", START)]


@pytest.mark.parametrize("value", ["1", '"x"', "[1]", "null"])
def test_read_run_with_events_of_wrong_types(tmp_path: Path, value: str) -> None:
    run = write_run(tmp_path / "run")
    line = f'{{"time": "", "kind": "start", "command": {value}, "release": {value}, "device_bytes": {value}}}\n'
    (run / "events.jsonl").write_text(line + line.replace("start", "forecast"))
    assert read_run(run, 1 << 20).release == {}


def test_read_run_with_events_of_large_numbers_and_other_commands(tmp_path: Path, capfd) -> None:
    run, large = write_run(tmp_path / "run"), 10**400
    start = {"time": "", "kind": "start", "images_per_step": large, "command": ["main.py", "--help", "--nope"]}
    forecast = {"time": "", "kind": "forecast", "device_bytes": large}
    (run / "events.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(forecast)}\n")
    found = read_run(run, 1 << 20)
    assert found.forecast == {} and count_of(found.start, "images_per_step") is None
    assert capfd.readouterr() == ("", "")


def test_read_run_keeps_the_order_of_events_if_the_clock_was_set_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    events = [{"time": time, "kind": "start"} for time in ("2026-01-03", "2026-01-01", "2026-01-02")]
    (run / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    assert [moment.time for moment in read_run(run, 1 << 20).moments] == [event["time"] for event in events]


def test_read_run_refuses_other_folders(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no such run folder"), (tmp_path, "not a run folder")):
        with pytest.raises(UserError, match=message):
            read_run(path, 1)
