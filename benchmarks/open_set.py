"""Time and memory to open a set of shards: for the first time, and again with the kept tables.

    python benchmarks/open_set.py --samples 1000000 --folder sets

Makes shards of tiny samples once, and opens them in processes of their own. Prints seconds, microseconds per sample,
and the private memory that opening and the batches of one epoch add.

    python benchmarks/open_set.py --samples 10000000 --folder sets --finish --against CHECKOUT

Writes the tables of a set instead, as pre-encoding does when it finishes one, with the code of another checkout and
with this one, in turns. The shards are links to one, whose table is built once: the time to read the headers is not
included. Prints seconds and the peak of memory beyond that before, each with its ratio, and compares the files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, os.environ.get("MEASURED_CHECKOUT") or str(Path(__file__).resolve().parents[1]))

from ldm.shards import npy
from ldm.shards.kept_tables import TABLES

MEMBERS = {"f8.npy": npy.encode(np.zeros((8, 2, 2), np.float16)), "t5.npy": npy.encode(np.zeros((1, 4), np.float16))}


def make_set(folder: Path, samples: int, shard_size: int, linked: bool = False) -> None:
    """Write the shards, without those that exist. With `linked`, all are links to the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, samples, shard_size):
        path = folder / f"{first // shard_size:06d}.tar"
        if path.exists():
            continue
        if linked and first:
            path.hardlink_to(folder / f"{0:06d}.tar")
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as tar:
            for number in range(first, min(first + shard_size, samples)):
                for extension, data in {**MEMBERS, "txt": f"caption {number}".encode()}.items():
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                tar.members.clear()
        path.with_suffix(".part").rename(path)


def private_mebibytes() -> float:
    """Return the memory that this process has written to and does not share."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def open_set(folder: Path) -> None:
    """Open the set, plan an epoch, and print the figures."""
    from ldm.data.batch_sampler import EpochBatchSampler
    from ldm.shards.open import open_shards

    before, start = private_mebibytes(), time.perf_counter()
    dataset = open_shards(str(folder))
    opened, memory = time.perf_counter() - start, private_mebibytes() - before
    sampler = EpochBatchSampler(dataset.groups(), 16, dataset.sample_keys, shuffle=True)
    first = next(iter(sampler))[0]
    planned = time.perf_counter() - start - opened
    dataset[first[1]]
    each = opened / len(dataset) * 1e6
    print(
        f"{len(dataset)} samples: {opened:.2f} s to open ({each:.2f} µs per sample, {memory:.0f} MiB), {planned:.2f} s "
        f"to the first batch's numbers ({private_mebibytes() - before:.0f} MiB in all)",
        flush=True,
    )


def mebibytes(entry: str) -> float:
    """Return an entry of memory of this process, such as `VmRSS`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) / 1024


def finish_set(folder: Path) -> None:
    """Write the tables of a set of links to one shard, and print seconds and the added peak of memory."""
    from ldm.shards import kept_tables
    from ldm.shards.table import build_table

    paths = sorted(folder.glob("*.tar"))
    table = build_table(paths[0])
    kept_tables.build_table = lambda path: replace(table, path=path)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before, start = mebibytes("VmRSS"), time.perf_counter()
    kept_tables.keep_tables(paths)
    print(time.perf_counter() - start, mebibytes("VmHWM") - before)


def compare_finishing(folder: Path, against: Path, rounds: int) -> None:
    """Print seconds and memory of `finish_set` in the checkout `against` and in this one."""
    here = Path(__file__).resolve().parents[1]
    for number in range(rounds):
        figures, digests = [], []
        for checkout in (against, here):
            (folder / TABLES).unlink(missing_ok=True)
            command = [sys.executable, __file__, "--child", *sys.argv[1:]]
            child = subprocess.run(
                command, check=True, capture_output=True, env={**os.environ, "MEASURED_CHECKOUT": str(checkout)}
            )
            figures.append([float(figure) for figure in child.stdout.split()])
            with (folder / TABLES).open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        (old, before), (new, now) = figures
        print(
            f"round {number + 1}: {old:.1f} s and {before:.0f} MiB with {against}, {new:.1f} s and {now:.0f} MiB here: "
            f"{new / old:.2f} of the time, {now / before:.3f} of the memory; the files are "
            f"{'equal' if len(set(digests)) == 1 else 'NOT EQUAL'}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("sets"), help="folder for the shards")
    parser.add_argument("--samples", type=int, default=100_000, help="number of samples")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples per shard")
    parser.add_argument("--rounds", type=int, default=2, help="times to open the set with kept tables")
    parser.add_argument("--finish", action="store_true", help="write the tables of a finished set instead")
    parser.add_argument("--against", type=Path, help="with --finish: another checkout, to compare with")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder / f"{options.samples}{'-links' * options.finish}"
    if options.child:
        (finish_set if options.finish else open_set)(folder)
        return
    if options.finish:
        make_set(folder, options.samples, options.shard_size, linked=True)
        compare_finishing(folder, options.against, options.rounds)
        return
    make_set(folder, options.samples, options.shard_size)
    (folder / TABLES).unlink(missing_ok=True)
    for name in ("first", *["again"] * options.rounds):
        print(f"{name}: ", end="", flush=True)
        subprocess.run([sys.executable, __file__, "--child", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
