"""Hostile and broken files, thrown at everything that reads files: a `UserError` of one line, or a right result.

Never another exception, a crash, code that runs, minutes or gigabytes. So each corpus is read in a process of its own
that may take little more memory than it begins with, and a few seconds a file.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from ldm.checkpoint import load_state_dict
from ldm.config.load import load_config, plain
from ldm.data.image_sources import find_images
from ldm.data.stream import ShardStream
from ldm.images.decode import decode_image
from ldm.shards.members import decode_member
from ldm.shards.open import check_encoders, open_shards
from ldm.shards.reader import ShardDataset
from ldm.util import UserError
from tests.hostile.image_files import png_of
from tests.hostile.make_corpus import everything
from tests.hostile.sample_files import SAMPLE, tar_of
from tests.waiting import LIMIT, join

SECONDS = 5  # of processor time, a file
MEMORY = 1 << 30  # bytes beyond those that the process begins with

Reader = Callable[[Path, bytes], Any]


def read_weights(folder: Path, data: bytes) -> Any:
    path = folder / "model.ckpt"
    path.write_bytes(data)
    weights = load_state_dict(path)
    return {
        key: (value.dtype, tuple(value.shape), value.clone().flatten().view(torch.uint8).numpy().tobytes())
        for key, value in weights.items()
    }


def read_array(folder: Path, data: bytes) -> Any:
    array = decode_member("f8", bytearray(data), "a.f8.npy")
    return array.dtype, array.shape, array.tobytes()


def plain_samples(samples: Any) -> list[dict[str, Any]]:
    return [
        {key: value if isinstance(value, str) else value.tobytes() for key, value in sample.items()}
        for sample in samples
    ]


def read_shard(folder: Path, data: bytes) -> Any:
    """Read samples by offset and front to back; assert that both are the same."""
    path = folder / "s.tar"
    path.write_bytes(data)
    dataset = ShardDataset([path])
    samples = plain_samples(dataset[number] for number in range(len(dataset)))
    assert samples == read_stream(folder, data)
    return samples


def read_stream(folder: Path, data: bytes) -> Any:
    path = folder / "s.tar"
    path.write_bytes(data)
    return plain_samples(ShardStream([f"file:{path}"]))


def read_images(folder: Path, data: bytes) -> Any:
    path = folder / "s.tar"
    path.write_bytes(data)
    return [(item.name, item.caption, item.read().tobytes()) for item in find_images(path)]


def read_image(folder: Path, data: bytes) -> Any:
    image = decode_image(data, "a.png")
    return image.shape, image.tobytes()


def read_metadata(folder: Path, data: bytes) -> Any:
    for letter in "abc":
        (folder / f"{letter}.png").write_bytes(png_of(2, 2, data=bytes(14)))
    (folder / "metadata.jsonl").write_bytes(data)
    return [(item.name, item.caption, item.read().tobytes()) for item in find_images(folder)]


def read_index(folder: Path, data: bytes) -> Any:
    (folder / "s-0.tar").write_bytes(tar_of(SAMPLE))
    (folder / "index.json").write_bytes(data)
    check_encoders(open_shards(folder), {"autoencoder": "a" * 64, "text_tower": "b" * 64}, "a model")
    return "taken"


def read_config(folder: Path, data: bytes) -> Any:
    path = folder / "c.yaml"
    path.write_bytes(data)
    return repr(plain(load_config([path])))


READERS: dict[str, tuple[str, Reader]] = {
    "weights from .ckpt": ("checkpoint", read_weights),
    "weights from .safetensors": ("safetensors", read_weights),
    "arrays": ("npy", read_array),
    "shards by offset": ("shard", read_shard),
    "shards front to back": ("shard", read_stream),
    "tars of images": ("images", read_images),
    "images": ("image", read_image),
    "metadata of images": ("metadata", read_metadata),
    "indexes": ("index", read_index),
    "configs": ("config", read_config),
}
CHECKED = ("zip-",)  # has checksums, so that whatever hits a file must show
LINES = ("metadata", "config")  # text that is text still when it is cut; of all else a cut must show


class TooLong(BaseException):
    """A file took more than `SECONDS`."""


def stop(signum: int, frame: FrameType | None) -> None:
    raise TooLong


def verdict(read: Reader, folder: Path, data: bytes) -> tuple[str, Any]:
    """Read a file; return the fault found, or an empty text, and the content, or None if the file was refused."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return "", read(folder, data)
    except UserError as error:
        return ("" if len(str(error).splitlines()) == 1 else f"more than one line: {error!s:.200}"), None
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.300}", None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def must_show(kind: str, name: str) -> bool:
    """Return True if a reader must detect this damage."""
    return name.startswith(CHECKED) or ("cut-" in name and kind not in LINES)


def read_all(kind: str, read: Reader, folder: Path, results: Any) -> None:
    """Read all files of a kind. Send each name before it is read, then the fault, and a mark at the end."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    signal.signal(signal.SIGPROF, stop)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    marker, whole, count, taken = folder / "marker", {}, 0, 0
    for name, data in everything(marker)[kind]:
        results.send((name, None))
        place = folder / "files"
        place.mkdir(exist_ok=True)
        wrong, found = verdict(read, place, data)
        series = name.rpartition("whole")[0] if name.endswith("whole") else next(filter(name.startswith, whole), None)
        if name.endswith("whole"):
            whole[series] = found
            wrong = wrong or ("" if found is not None else "a whole file is refused")
        elif series is not None and found not in (None, whole[series]) and must_show(kind, name):
            wrong = wrong or "taken, but it says something else"
        if marker.exists():
            wrong = "ran its payload"
            marker.unlink()
        count, taken = count + 1, taken + (found is not None)
        results.send((name, wrong))
    results.send(("", (count, taken)))


@pytest.mark.parametrize("what", READERS)
def test_every_file_is_read_or_refused(what: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # the imports are done
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=read_all, args=(*READERS[what], tmp_path, sender))
    process.start()
    sender.close()
    wrong, name, done = [], "", None
    try:
        while done is None and receiver.poll(LIMIT):
            name, said = receiver.recv()
            if not name:
                done = said
            elif said:
                wrong.append(f"{name}: {said}")
    except EOFError:
        wrong.append(f"{name}: the process died")
    else:
        if done is None:
            wrong.append(f"{name}: hangs where no signal reaches it")
    finally:
        process.kill()
        join(process)
    assert not wrong, "\n".join(wrong)
    count, taken = done
    assert 0 < taken < count
