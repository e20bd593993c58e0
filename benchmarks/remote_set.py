"""Samples per second from a set on a server of this machine, and from the same set in its folder.

    python benchmarks/remote_set.py --folder sets --workers 2 --delays 0 20

Makes a set with its index once: samples of SD v1 at 512×512, without an image behind them. The server gives parts of
files. It waits for each of `--delays`, in milliseconds, before an answer, as a distant one would. Sides alternate, and
the median of the ratios of consecutive runs is printed.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.shards.index import INDEX, write_index
from ldm.shards.kept_tables import keep_tables
from ldm.shards.sample import encode_members
from ldm.shards.writer import ShardWriter

SHARD_SIZE = 500


class PartServer(BaseHTTPRequestHandler):
    """Answers with parts of the files in `folder`, after `delay` seconds."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and data together
    folder: Path
    delay: float

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.delay)
        path = self.folder / self.path.lstrip("/")
        size = path.stat().st_size
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(part[1]), min(int(part[2]), size - 1)) if part else (0, size - 1)
        with path.open("rb") as file:
            data = os.pread(file.fileno(), last - first + 1, first)
        self.send_response(206 if part else 200)
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(data)))
        if part:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        self.wfile.write(data)


def serve(folder: Path, delay: float, port: Any) -> None:
    """Serve the set, and tell the port."""
    PartServer.folder, PartServer.delay = folder, delay
    with ThreadingHTTPServer(("127.0.0.1", 0), PartServer) as server:
        port.send(server.server_port)
        server.serve_forever()


def make_set(folder: Path, samples: int) -> None:
    """Write the set, unless it exists."""
    if (folder / INDEX).exists():
        return
    random = np.random.default_rng(0)
    with ShardWriter(str(folder / "%06d.tar"), SHARD_SIZE) as writer:
        for number in range(samples):
            latent = random.standard_normal((8, 64, 64), np.float32).astype(np.float16)
            context = random.standard_normal((77, 768), np.float32).astype(np.float16)
            writer.write(f"{number:06d}", encode_members(latent, {"t5": context}, f"caption {number}", {}))
    write_index(folder, {"format": 2, "out": "%06d.tar", "complete": True, "shards": writer.shards})
    keep_tables(sorted(folder.glob("*.tar")))


def speed(folder: str, shards: int, workers: int) -> float:
    """Return the samples per second of one epoch after the first batch, by wall-clock time."""
    names = f"{folder}/{{{0:06d}..{shards - 1:06d}}}.tar"
    data = WebDataNpyModuleFromConfig(16, names, num_workers=workers, seed=1, verify_shards=False)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch["__key__"]) for batch in batches)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("sets"), help="folder for the shards")
    parser.add_argument("--samples", type=int, default=2000, help="number of samples, 0.18 MB each")
    parser.add_argument("--workers", type=int, default=2, help="data workers")
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0], help="milliseconds before each answer")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    folder = options.folder.absolute() / f"remote-{options.samples}"
    make_set(folder, options.samples)
    shards = -(-options.samples // SHARD_SIZE)
    os.environ["LATENT_FINETUNE_CACHE"] = str(options.folder.absolute() / "cache")
    for delay in options.delays:
        ours, theirs = get_context("spawn").Pipe()
        server = get_context("spawn").Process(target=serve, args=(folder, delay / 1000, theirs), daemon=True)
        server.start()
        url, ratios = f"http://127.0.0.1:{ours.recv()}", []
        for number in range(options.rounds):
            local, remote = (speed(place, shards, options.workers) for place in (str(folder), url))
            ratios.append(remote / local)
            print(
                f"{delay:g} ms, {options.workers} workers, round {number + 1}: {local:.0f} samples/s local, "
                f"{remote:.0f} remote, ratio {ratios[-1]:.3f}",
                flush=True,
            )
        print(f"{delay:g} ms, {options.workers} workers: median ratio {median(ratios):.3f}", flush=True)
        server.terminate()


if __name__ == "__main__":
    main()
