"""Tests of jobs: commands that run apart from the studio."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ldm.locks import process_start
from ldm.studio.commands import Step
from ldm.studio.job_store import (
    FAILED,
    FINISHED,
    KILLED,
    PASSWORD,
    RUNNING,
    STATE,
    STOPPED,
    Job,
    JobState,
    JobStore,
    is_alive,
    read_job,
    read_log,
    takes_signal,
)
from ldm.util import UserError
from tests.waiting import LIMIT

WAITS = "import time; print('here', flush=True); time.sleep(1000)"


def step(code: str, *words: str) -> Step:
    return Step("a step", ("-c", code, *words))


def wait(store: JobStore, job: Job, until: str | None = None) -> JobState:
    """Wait until the job has ended, or its present command has printed `until` and its runner has noted its process."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        state = store.state(job)
        has_said = until is not None and state.child is not None and until in read_log(job, state.step)
        if not state.is_running or has_said:
            return state
        time.sleep(0.05)
    raise AssertionError(f"{job.name} did not end: {read_log(job, 0)}")


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs")


def test_commands_run_in_order_without_a_shell(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD, "a secret")
    says = f"import os, sys; print(sys.argv[1], os.environ.get({PASSWORD!r}), os.getcwd())"
    monkeypatch.chdir(tmp_path)
    job = store.start("test", "A title", [step(says, "$HOME; 'x'"), step("print(2)")], {"out": "x"})
    state = wait(store, job)
    assert (state.status, state.codes, len(state.times)) == (FINISHED, [0, 0], 3)
    assert read_log(job, 0).strip() == f"$HOME; 'x' None {tmp_path}"
    assert read_log(job, 1).strip() == "2"
    again = JobStore(store.folder)  # as after a new start of the studio
    found = again.newest("test")
    assert found == job
    assert again.state(found).status == FINISHED
    assert again.newest("other") is None


def test_a_failed_command_is_the_last(store: JobStore) -> None:
    job = store.start("test", "A title", [step("raise SystemExit('error: a reason')"), step("print(2)")])
    state = wait(store, job)
    assert (state.status, state.codes) == (FAILED, [1])
    assert read_log(job, 0).strip() == "error: a reason"
    assert not job.log(1).exists()


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_stop_interrupts_as_ctrl_c_does_and_starts_nothing_further(store: JobStore, handler: Any) -> None:
    """Also in a studio that a script started in the background, where Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, handler)
    code = f"try:\n    {WAITS}\nexcept KeyboardInterrupt:\n    print('saved')"
    try:
        job = store.start("test", "A title", [step(code), step("print(2)")])
    finally:
        signal.signal(signal.SIGINT, before)
    wait(store, job, "here")
    other = JobStore(store.folder)
    assert other.running("test") == job
    other.stop(job)
    state = wait(store, job)
    assert (state.status, state.codes) == (STOPPED, [0])
    assert "saved" in read_log(job, 0)
    assert store.running("test") is None


def test_a_command_that_takes_its_time_to_stop_is_stopping(store: JobStore) -> None:
    code = f"try:\n    {WAITS}\nexcept KeyboardInterrupt:\n    print('saves', flush=True); time.sleep(1000)"
    job = store.start("test", "A title", [step(code)])
    assert not wait(store, job, "here").is_stopping
    store.stop(job)
    state = wait(store, job, "saves")
    assert (state.status, state.is_stopping) == (RUNNING, True)
    store.stop(job)
    state = wait(store, job)
    assert (state.status, state.is_stopping) == (STOPPED, False)


def test_stop_before_the_first_command_is_kept(store: JobStore) -> None:
    job = store.start("test", "A title", [step(WAITS)])
    store.stop(job)
    assert wait(store, job).status == STOPPED


def test_start_refuses_a_second_job_and_save_now_signals_only_a_command_that_takes_it(store: JobStore) -> None:
    handled = "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: print('saved', flush=True))\n"
    job = store.start("test", "A title", [step(WAITS)])
    wait(store, job, "here")
    with pytest.raises(UserError, match="no training can save now"):
        store.save_now(job)
    with pytest.raises(UserError, match="A title: is running; wait for its end, or stop it"):
        store.start("test", "Another", [step(WAITS)])
    store.stop(job)
    wait(store, job)
    job = store.start("test", "A title", [step(f"{handled}{WAITS}")])
    wait(store, job, "here")
    store.save_now(job)
    assert wait(store, job, "saved").status == RUNNING
    store.stop(job)
    wait(store, job)


def test_a_killed_runner_leaves_a_command_that_can_be_stopped(store: JobStore) -> None:
    job = store.start("test", "A title", [step(WAITS)])
    state = wait(store, job, "here")
    runner = json.loads((job.folder / STATE).read_text())["runner"][0]
    os.kill(runner, signal.SIGKILL)
    end = time.monotonic() + LIMIT
    while is_alive(runner, None) and time.monotonic() < end:
        store.state(job)
    assert store.state(job).status == RUNNING
    os.kill(state.child[0], signal.SIGKILL)
    assert wait(store, job).status == KILLED


def test_newest_reads_no_other_job(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1-test-0", "2-test-0", "3-other-0"):
        content = {"kind": name[2:-2], "title": "", "steps": [], "started": 0, "about": {}}
        (store.folder / name).mkdir(parents=True)
        (store.folder / name / "job.json").write_text(json.dumps(content))
    read: list[str] = []
    monkeypatch.setattr("ldm.studio.job_store.read_job", lambda folder: read.append(folder.name) or read_job(folder))
    assert store.newest("test").name == "2-test-0"
    assert read == ["2-test-0"]
    assert [job.name for job in store.list()] == ["3-other-0", "2-test-0", "1-test-0"]


def test_damaged_jobs_are_left_out(store: JobStore) -> None:
    for name, content in (("a-test-0", "{"), ("b-test-0", "[]"), ("c-test-0", '{"kind": "test"}')):
        (store.folder / name).mkdir(parents=True)
        (store.folder / name / "job.json").write_text(content)
    assert store.list() == [] and store.newest("test") is None


def test_is_alive_tells_a_reused_id() -> None:
    own = os.getpid()
    assert is_alive(own, process_start(own)) and is_alive(own, None)
    assert not is_alive(own, process_start(own) + 1)


def test_takes_signal_asks_for_a_handler() -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert takes_signal(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not takes_signal(os.getpid(), signal.SIGUSR2)


def test_read_log_shows_the_last_state_of_a_bar(tmp_path: Path) -> None:
    job = Job(tmp_path, "test", "", [], 0)
    job.log(0).write_bytes(b"first\n\r 0%|\r\x1b[31m50%|\x1b[0m\nlast\xff\n")
    assert read_log(job, 0) == "first\n50%|\nlast�\n"
    assert read_log(job, 1) == ""
