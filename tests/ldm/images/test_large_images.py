"""Memory that large images take: of one, and of all workers together."""

import multiprocessing
import threading
from contextlib import suppress
from functools import partial

import psutil
import pytest
from PIL import Image

from ldm.encoding.read import read_fitted, read_images
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


def test_read_images_holds_one_large_image_in_all_workers_together(tmp_path):
    """Four workers, and four images of 36 megapixels, 0.25 GB each."""
    most, ended = [0], threading.Event()

    def watch():
        while not ended.wait(0.01):
            held = 0
            for worker in psutil.Process().children():
                with suppress(psutil.Error):
                    held += worker.memory_full_info().uss
            most[0] = max(most[0], held)

    entries = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.new("P", (6_000, 6_000)).save(path)
        entries.append((number, ImageItem(path.name, path, caption="")))
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        read = list(read_images(entries, partial(read_fitted, sizes=[(64, 64)]), workers=4, ahead=4))
    finally:
        ended.set()
        watcher.join()
    assert [image.size for image in read] == [(64, 64)] * 4
    assert 36_000_000 * 4 < most[0] < 36_000_000 * 16, f"{most[0] / 1e6:.0f} MB"
