"""Tests of signals as requests in training, and of their effect in data workers."""

import os
import signal

import pytest

from ldm.callbacks.signals import SignalRequests


@pytest.fixture
def requests():
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)]
    with SignalRequests() as requests:
        yield requests
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)] == before


def send(number):
    os.kill(os.getpid(), number)


def test_sigusr1_requests_a_checkpoint_at_any_time(requests):
    send(signal.SIGUSR1)
    assert requests.save and requests.stop is None


def test_during_training_the_first_signal_requests_a_stop_and_the_second_quits(requests):
    requests.training = True
    send(signal.SIGINT)
    assert requests.stop == signal.SIGINT
    with pytest.raises(SystemExit) as caught:
        send(signal.SIGINT)
    assert caught.value.code == 130


def test_sighup_acts_like_sigterm_unless_nohup_ignores_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with SignalRequests() as requests:
            requests.training = True
            send(signal.SIGHUP)
            assert requests.stop == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with SignalRequests() as requests:
            requests.training = True
            send(signal.SIGHUP)
            assert requests.stop is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_training_the_first_signal_quits(requests, number, code):
    with pytest.raises(SystemExit) as caught:
        send(number)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("number", "survives"), [(signal.SIGINT, True), (signal.SIGUSR1, True), (signal.SIGTERM, False)]
)
def test_workers_ignore_signals_except_sigterm(requests, number, survives):
    worker = os.fork()
    if worker == 0:
        send(number)
        send(number)
        os._exit(7)
    status = os.waitpid(worker, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (7 if survives else -number)


def test_a_signal_forwarded_by_torchrun_is_not_a_second_signal(requests, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    requests.training = True
    send(signal.SIGTERM)
    now = 102.0
    send(signal.SIGTERM)
    now = 104.0
    with pytest.raises(SystemExit):
        send(signal.SIGTERM)
