"""Mutated files are read as other programs read them, or refused in one line."""

import os
import signal

import pytest

from ldm.util import UserError
from tests.hostile import fuzz
from tests.hostile.fuzz import LOADERS, Loader

INPUTS = 2100


def test_fuzz_finds_nothing():
    result = fuzz.fuzz(INPUTS)
    assert not result.failures, "\n".join(result.failures)
    assert sum((result.taken + result.compared + result.refused).values()) == INPUTS
    for name in LOADERS:  # else a loader that refuses everything, or whose other reader does, would pass
        assert result.compared[name] >= 3, name
        assert result.refused[name] >= 5 or name == "kept table", name  # a damaged one is made again


def test_input_of_is_the_same_each_time():
    for name in LOADERS:
        for number in range(20):
            assert fuzz.input_of(name, number) == fuzz.input_of(name, number), name


def _raise(error):
    raise error


class _TwoLines(UserError):
    """An error that does not escape the ends of lines, as `UserError` does."""

    __str__ = ValueError.__str__


@pytest.mark.parametrize(
    ("ours", "said"),
    {
        "right": (lambda folder, data: data, None),
        "refused": (lambda folder, data: _raise(UserError("x: broken")), None),
        "another value": (lambda folder, data: data + b"!", "another value"),
        "two lines": (lambda folder, data: _raise(_TwoLines("x:\nbroken")), "a message of 2 lines"),
        "another error": (lambda folder, data: _raise(KeyError("x")), "KeyError"),
        "a hang": (lambda folder, data: _wait(), "TooLong"),
        "a crash": (lambda folder, data: _crash(), "the process died"),
        "much memory": (lambda folder, data: bytearray(1 << 34), "MemoryError"),
    }.values(),
)
def test_fuzz_tells_what_is_wrong(ours, said, monkeypatch):
    """The fuzzer itself can fail, for each of the reasons that it is there for."""
    inputs = 1 if said == "TooLong" else 3
    if said == "TooLong":
        monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(LOADERS, "made up", Loader(lambda rng: b"data", ours, lambda data: data))
    failures = fuzz.fuzz(inputs, names=["made up"]).failures
    assert len(failures) == (0 if said is None else inputs)
    assert all(failure.startswith("made up ") and said in failure for failure in failures)


def _wait():
    while True:
        pass


def _crash():
    os.kill(os.getpid(), signal.SIGKILL)
