"""Tests of pieces of HTML."""

from __future__ import annotations

from pathlib import Path

from ldm.studio.commands import Step
from ldm.studio.html_parts import file_link, html_table, image_slider, job_status, last_error, note
from ldm.studio.job_progress import Progress
from ldm.studio.job_store import FAILED, RUNNING, Job, JobState

EVIL = "<img src=x onerror=alert(1)>\n\"'"


def test_texts_of_others_are_escaped() -> None:
    job = Job(Path("x"), "test", EVIL, [Step(EVIL, ())], 0)
    state = JobState(RUNNING, 0, [], [0.0])
    pieces = [
        note(EVIL), file_link(Path(EVIL), EVIL), html_table([EVIL], [[EVIL, EVIL]]),
        job_status(job, state, Progress(0.5, EVIL), ""), image_slider(Path(EVIL), Path(EVIL), EVIL),
    ]  # fmt: skip
    assert not [piece for piece in pieces if "<img src=x" in piece or "alert(1)>" in piece]


def test_job_status_marks_each_command() -> None:
    job = Job(Path("x"), "test", "A title", [Step(name, ()) for name in "abc"], 0)
    text = job_status(job, JobState(FAILED, 1, [0, 1], [0.0, 5.0, 65.0]), None, "")
    assert 'data-state="failed"' in text and "1 min 5 s" in text
    assert [mark for mark in text if mark in "✓✗▶·"] == ["✓", "✗", "·"]
    stopping = JobState(RUNNING, 1, [0], [0.0, 5.0], is_stopping=True)
    assert 'data-state="running"><b>A title</b>: stopping, ' in job_status(job, stopping, None, "")
    assert job_status(None, None, None, "nothing") == note("nothing")


def test_last_error_is_the_line_of_the_command() -> None:
    assert last_error("a\nerror: a reason\nafter\n") == "error: a reason"
    assert last_error("a\n\nb\n\n") == "b"
    assert last_error("") == ""
