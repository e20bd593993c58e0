"""Memory that large images take: of one, and of all workers together."""

import fcntl
import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
from PIL import Image

from ldm.encoding.read import read_images
from ldm.images import decode_lock
from ldm.images.find import ImageItem
from tests.waiting import join, wait_for


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_lock, "lock_path", lambda: tmp_path / "lock")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_read_of_a_large_image_holds_it_once(tmp_path, mode):
    """A PNG of 50 megapixels in a process of its own: 4 bytes a pixel as Pillow holds it, 3 as RGB, and little more."""
    options = {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (10_000, 5_000)).save(tmp_path / "large.png", compress_level=1, **options)

    def peak(connection):
        import resource

        import torch

        from ldm.images.transforms import fit_square

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        torch.set_num_threads(1)
        ImageItem("large", tmp_path / "large.png").read(lambda pixels: fit_square(torch.from_numpy(pixels), 64))
        connection.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=peak, args=(theirs,))
    process.start()
    assert wait_for(ours.poll, process) and ours.recv() < 50_000_000 * 10
    join(process)


# Pillow's blocks of 16 MB lie on the heap once a larger block was freed, and a later block keeps them there.
FRAGMENTED = """
from pathlib import Path

import psutil
from PIL import Image

from ldm.images import decode_lock

decode_lock.lock_path = lambda: Path("lock")
held = psutil.Process().memory_full_info
bytes(20 << 20)
before = held().uss
with decode_lock.DecodeLock() as lock:
    lock.take()
    image = Image.new("RGB", (6_000, 6_000), "red")
    kept = [bytes(100_000) for _ in range(3)]
    del image
    print(held().uss - before)
print(held().uss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_leaving_the_decode_lock_returns_the_memory_of_a_large_image(tmp_path):
    done = subprocess.run([sys.executable, "-c", FRAGMENTED], cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    inside, after = (int(line) for line in done.stdout.split())
    assert inside > 100_000_000 and after < 10_000_000


def test_read_images_holds_one_large_image_in_all_workers_together(tmp_path):
    """Four workers, and eight images of 36 megapixels: while one is held, no other worker holds any, or keeps one."""
    entries, pixel_bytes = [], 36_000_000 * 3
    for number in range(8):
        path = tmp_path / f"{number}.png"
        Image.new("P", (6_000, 6_000)).save(path, compress_level=1)
        entries.append((number, ImageItem(path.name, path, caption="")))

    others_here = {process.pid for process in psutil.Process().children()}  # such as the fork server of other tests

    def read(number, item):
        """Return the memory of each worker while this one has the pixels, and whether the lock is free."""

        def measured(pixels):
            held = {}
            for worker in psutil.Process(os.getppid()).children():
                with suppress(psutil.Error):
                    if worker.pid in others_here:
                        continue
                    held[worker.pid] = worker.memory_full_info().uss
            with (tmp_path / "lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return held.pop(os.getpid()), list(held.values()), False
            return 0, [], True

        return item.read(measured)

    for own, others, is_free in read_images(entries, read, workers=4, ahead=4):
        assert not is_free
        assert own > pixel_bytes and all(other < pixel_bytes for other in others), (own, others)
