from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ldm.events import END, EVENTS, START, WARNING, EventLog, read_events
from ldm.util import UserError


def begun(folder: Path) -> Path:
    (folder / "configs").mkdir()
    return folder


def test_event_log_waits_until_the_run_has_begun(tmp_path: Path) -> None:
    events = EventLog(tmp_path)
    events.add(START, seed=1)
    assert list(tmp_path.iterdir()) == []
    begun(tmp_path)
    events.step = 4
    events.add(END)
    found, damaged = read_events(tmp_path)
    assert [(event["kind"], event["step"]) for event in found] == [(START, None), (END, 4)]
    assert found[0]["seed"] == 1 and damaged == 0


def test_event_log_collects_warnings_once_per_message(tmp_path: Path) -> None:
    events = EventLog(begun(tmp_path))
    log = logging.getLogger("test")
    with events.collecting_warnings():
        log.info("quiet")
        log.warning("\nthe disk is %s", "full")
    log.warning("later")
    assert [(event["kind"], event["text"]) for event in read_events(tmp_path)[0]] == [(WARNING, "the disk is full")]


def test_event_log_begins_a_line_after_a_cut_one(tmp_path: Path) -> None:
    (begun(tmp_path) / EVENTS).write_text('{"kind": "sta')
    EventLog(tmp_path).add(END)
    found, damaged = read_events(tmp_path)
    assert [event["kind"] for event in found] == [END]
    assert damaged == 1


def test_event_log_follows_no_link_and_raises_nothing(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (begun(tmp_path) / EVENTS).symlink_to(other)
    EventLog(tmp_path).add(END)
    assert not other.exists()


@pytest.mark.parametrize("line", ["[]", "1", '{"kind": 1, "time": ""}', '{"kind": "end", "time": "", "step": 1.5}'])
def test_read_events_counts_damaged_lines(tmp_path: Path, line: str) -> None:
    (tmp_path / EVENTS).write_text(line + "\n")
    assert read_events(tmp_path) == ([], 1)


def test_event_log_takes_anything_and_shortens_it(tmp_path: Path) -> None:
    EventLog(begun(tmp_path)).add(START, words=["x" * 1000] * 5000, odd={(1, 2): {3}, "big": "y" * 1000}, nothing=None)
    [event], damaged = read_events(tmp_path)
    assert len(event["words"]) == 1000 and len(event["words"][0]) == len(event["odd"]["big"]) == 500
    assert (event["odd"]["(1, 2)"], event["nothing"], damaged) == ("{3}", None, 0)


def test_event_log_of_many_starts_gets_no_more_warnings_at_its_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ldm.events._MOST_BYTES_WITH_WARNINGS", 1000)
    log = logging.getLogger("test")
    for _ in range(30):
        events = EventLog(begun(tmp_path) if not (tmp_path / "configs").exists() else tmp_path)
        with events.collecting_warnings():
            log.warning("x" * 100)
    events.add(END)
    kinds = [event["kind"] for event in read_events(tmp_path)[0]]
    assert kinds[-1] == END and len(kinds) < 10


def test_read_events_of_a_large_file_are_the_newest(tmp_path: Path, monkeypatch) -> None:
    events = EventLog(begun(tmp_path))
    for number in range(20):
        events.add(WARNING, text=str(number))
    monkeypatch.setattr("ldm.events._MOST_BYTES", 500)
    found, damaged = read_events(tmp_path)
    assert found[-1]["text"] == "19" and 0 < len(found) < 20 and damaged == 0


def test_read_events_of_a_folder_at_its_path(tmp_path: Path) -> None:
    (tmp_path / EVENTS).mkdir()
    with pytest.raises(UserError, match=EVENTS):
        read_events(tmp_path)
