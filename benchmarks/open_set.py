"""Time and memory to open a set of shards: for the first time, and again with the kept tables.

    python benchmarks/open_set.py --samples 1000000 --folder sets

Makes shards of tiny samples once, and opens them in processes of their own. Prints seconds, microseconds per sample,
and the private memory that opening and the batches of one epoch add.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.shards import npy
from ldm.shards.kept_tables import TABLES

MEMBERS = {"f8.npy": npy.encode(np.zeros((8, 2, 2), np.float16)), "t5.npy": npy.encode(np.zeros((1, 4), np.float16))}


def make_set(folder: Path, samples: int, shard_size: int) -> None:
    """Write the shards, without those that exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, samples, shard_size):
        path = folder / f"{first // shard_size:06d}.tar"
        if path.exists():
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("sets"), help="folder for the shards")
    parser.add_argument("--samples", type=int, default=100_000, help="number of samples")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples per shard")
    parser.add_argument("--rounds", type=int, default=2, help="times to open the set with kept tables")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder / str(options.samples)
    if options.child:
        open_set(folder)
        return
    make_set(folder, options.samples, options.shard_size)
    (folder / TABLES).unlink(missing_ok=True)
    for name in ("first", *["again"] * options.rounds):
        print(f"{name}: ", end="", flush=True)
        subprocess.run([sys.executable, __file__, "--child", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
