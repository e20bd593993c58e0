"""Mutation fuzzer of everything that reads a user's files: an equal value, or a `UserError` of one line.

Each loader is one entry of the table `LOADERS`: how to make a whole file, our reader, and another program's reader.
A file is made, changed in a few places, and read. What ours takes is compared with what the other reader makes of it,
where that reads the file too. Each input has a number, from which it can be made again.

    python tests/hostile/fuzz.py --inputs 100000                # all loaders in turn
    python tests/hostile/fuzz.py --only tar --first 1234 --inputs 1   # one input again
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, from whichever folder this is run

import torch

from ldm.util import UserError
from tests.hostile import fuzz_checkpoints as checkpoints
from tests.hostile import fuzz_images as images
from tests.hostile import fuzz_runs as runs
from tests.hostile import fuzz_samples as samples
from tests.hostile import fuzz_tables as tables
from tests.hostile.fuzz_values import comparable
from tests.waiting import LIMIT, join

SECONDS = 10  # of processor time, an input
MEMORY = 2 << 30  # bytes beyond those that the process begins with
NUMBERS = (0, 1, -1, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


@dataclass(frozen=True)
class Loader:
    """A kind of file: how it is made, how ours reads it, and how another program does."""

    make: Callable[[random.Random], bytes]
    ours: Callable[[Path, bytes], Any]
    other: Callable[[bytes], Any]
    tokens: tuple[bytes, ...] = ()  # bytes that mean something in such a file
    whole: float = 0.1  # share of the inputs whose bytes are left as they are made


LOADERS = {
    "checkpoint": Loader(
        checkpoints.make_zip, checkpoints.read_checkpoint, checkpoints.torch_load, checkpoints.PICKLE_TOKENS
    ),
    "pickle in a checkpoint": Loader(
        checkpoints.make_sealed, checkpoints.read_sealed, checkpoints.load_sealed, checkpoints.PICKLE_TOKENS
    ),
    "old checkpoint": Loader(
        checkpoints.make_legacy, checkpoints.read_checkpoint, checkpoints.torch_load, checkpoints.PICKLE_TOKENS
    ),
    "resumed checkpoint": Loader(
        checkpoints.make_training, checkpoints.read_training, checkpoints.load_training, whole=1.0
    ),
    "safetensors": Loader(
        checkpoints.make_safetensors, checkpoints.read_checkpoint, checkpoints.load_safetensors, samples.JSON
    ),
    "npy": Loader(samples.make_npy, samples.read_npy, samples.load_npy, samples.NPY_TOKENS),
    "tar": Loader(samples.make_tar, samples.read_tar, samples.load_tar, samples.TAR_TOKENS),
    "streamed tar": Loader(samples.make_tar, samples.stream_members, samples.load_tar, samples.TAR_TOKENS),
    "kept table": Loader(tables.make_table, tables.read_with_table, tables.samples_of_the_tar, samples.JSON),
    "index": Loader(samples.make_index, samples.read_set_index, samples.load_json, samples.JSON),
    "record": Loader(samples.make_record, samples.read_shard_record, samples.load_json, samples.JSON),
    "metadata": Loader(samples.make_metadata, samples.read_metadata, samples.load_metadata, samples.JSON),
    "pairs": Loader(samples.make_pairs, samples.read_pairs, samples.load_pairs, samples.JSON),
    "sizes": Loader(samples.make_sizes, samples.read_sizes, samples.load_sizes, samples.JSON),
    "crops": Loader(samples.make_sizes, samples.read_crops, samples.load_crops, samples.JSON),
    "config": Loader(samples.make_config, samples.read_config, samples.load_config, samples.YAML_TOKENS),
    "loss mask": Loader(images.make_mask, images.read_mask, images.load_mask),
    "LoRA": Loader(runs.make_lora, runs.read_lora_file, runs.load_lora, whole=0.7),
    "prompts of a run": Loader(runs.make_prompts, runs.read_prompts, runs.load_prompts, samples.JSON, whole=0.7),
    "LoRA training": Loader(runs.make_trained_lora, runs.read_trained_lora, runs.load_trained_lora, whole=0.7),
    "events of a run": Loader(runs.make_events, runs.read_run_events, runs.load_events, samples.JSON),
    "metrics of a run": Loader(runs.make_metrics, runs.read_run_metrics, runs.load_metrics, runs.CSV_TOKENS),
    "evaluation": Loader(runs.make_evaluation, runs.read_run_evaluation, runs.load_evaluation, samples.JSON, whole=0.5),
}


@dataclass
class Result:
    """Counts of what became of the inputs, by loader, and the failures."""

    taken: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class TooLong(BaseException):
    """An input took more than `SECONDS`."""


def mutated(rng: random.Random, data: bytes, tokens: tuple[bytes, ...]) -> bytes:
    """Return `data` changed in one to four places."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _changed(rng, data, tokens)
    return data


def _changed(rng: random.Random, data: bytes, tokens: tuple[bytes, ...]) -> bytes:
    place = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:  # headers are where the meaning is
        place = min(place, rng.randrange(600))
    length = min(rng.randint(1, 32), max(len(data) - place, 1))
    other = rng.randrange(len(data) + 1)
    width = rng.choice((1, 2, 4, 8))
    number = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    before, after = data[:place], data[place + 1 :]
    changes = {
        "bit": lambda: before + bytes(b ^ 1 << rng.randrange(8) for b in data[place : place + 1]) + after,
        "byte": lambda: before + rng.randbytes(1) + after,
        "number": lambda: before + number + data[place + width :],
        "digit": lambda: before + rng.choice((b"0", b"9", b"-1", b"1e9", b"99999999999")) + after,
        "zeros": lambda: before + bytes(length) + data[place + length :],
        "noise": lambda: before + rng.randbytes(length) + data[place + length :],
        "gap": lambda: before + data[place + length :],
        "twice": lambda: data[: place + length] + data[place:],
        "copy": lambda: before + data[other : other + length] + data[place + length :],
        "token": lambda: before + rng.choice(tokens or (b"",)) + data[place + rng.choice((0, 1, length)) :],
        "cut": lambda: before,
    }
    return changes[rng.choice((*changes, "token"))]()


def input_of(name: str, number: int) -> bytes:
    """Return input `number` of the loader `name`."""
    rng, loader = random.Random(f"{name}/{number}"), LOADERS[name]
    data = loader.make(rng)
    return data if rng.random() < loader.whole else mutated(rng, data, loader.tokens)


def verdict(name: str, data: bytes, folder: Path) -> tuple[str, str]:
    """Return `taken`, `compared` or `refused`, and what is wrong with that, or nothing."""
    loader = LOADERS[name]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        ours = loader.ours(folder, data)
    except UserError as error:
        lines = str(error).splitlines()
        return "refused", "" if len(lines) == 1 else f"a message of {len(lines)} lines: {error!s:.200}"
    except BaseException as error:
        return "refused", f"{type(error).__name__}: {error!s:.200}\n{traceback.format_exc(limit=-4)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        other = loader.other(data)
    except (Exception, TooLong):
        return "taken", ""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if comparable(ours) == comparable(other):
        return "compared", ""
    return "compared", f"another value: {ours!r:.300}, not {other!r:.300}"


def _stop(signum: int, frame: FrameType | None) -> None:
    raise TooLong


def _work(names: list[str], numbers: range, results: Any) -> None:
    """Send name and number of each input, then its verdict; in a process of its own, since a bad file may end it."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    signal.signal(signal.SIGPROF, _stop)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            name = names[number % len(names)]
            data = input_of(name, number)
            results.send((name, number, None))
            results.send((name, number, verdict(name, data, Path(folder))))
    results.send(None)


def _messages(names: list[str], numbers: range) -> Iterator[tuple[str, int, tuple[str, str] | None]]:
    """Yield what the workers send; a worker that dies is replaced by one that goes on behind the input."""
    context = multiprocessing.get_context("fork")  # the imports are done
    while numbers:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(names, numbers, sender))
        process.start()
        sender.close()
        last = ("", numbers.start - 1)
        try:
            while receiver.poll(LIMIT) and (message := receiver.recv()) is not None:
                last = message[:2]
                yield message
            if receiver.poll(0) or message is None:
                return
            reason = "hangs where no signal reaches it"
        except EOFError:
            reason = "the process died"
        finally:
            process.kill()
            join(process)
        yield (*last, ("refused", reason))
        numbers = range(last[1] + 1, numbers.stop)


def fuzz(inputs: int, first: int = 0, names: list[str] | None = None) -> Result:
    """Read `inputs` inputs from number `first` on, by the loaders `names` in turn."""
    result = Result()
    for name, number, said in _messages(names or list(LOADERS), range(first, first + inputs)):
        if said is None:
            continue
        what, wrong = said
        getattr(result, what)[name] += 1
        if wrong:
            result.failures.append(f"{name} {number}: {wrong}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--only", choices=list(LOADERS), action="append", help="loaders to use; default: all")
    options = parser.parse_args()
    result = fuzz(options.inputs, options.first, options.only)
    for name in options.only or LOADERS:
        counts = (result.taken[name], result.compared[name], result.refused[name])
        sys.stdout.write("{:24} taken {:6}, compared {:6}, refused {:6}\n".format(name, *counts))
    sys.exit("\n".join([*result.failures, f"{len(result.failures)} failures"]) if result.failures else 0)


if __name__ == "__main__":
    main()
