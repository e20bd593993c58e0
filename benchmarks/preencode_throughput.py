#!/usr/bin/env python
"""Images per second of pre-encoding, from image files to shards, compared with the encoder alone on images in memory.

The two sides take turns, so that a drift in the machine's speed slows both. Without --images, the benchmark generates
photograph-like images.

--stand-in simulates a device that takes a given time per batch and no CPU time. Like a GPU it accepts work and executes
it in the background, one batch after the other. The drop in its rate is the cost of decoding and writing.

    python benchmarks/preencode_throughput.py --size 64 --batch-size 16 --rounds 3
    python benchmarks/preencode_throughput.py --ckpt sd-v1-4.ckpt --config stable_diffusion_v1.yaml --size 512 \\
        --images images/ --precision fp16
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, default=ROOT / "data/base/emoji.safetensors", help="release (default: the demo's release)")
    add("--config", default="demo_tiny_release.yaml", help="config of the release")
    add("--images", nargs="+", help="sources as for tools/preencode.py (default: generated images)")
    add("--generated", type=int, default=256, help="number of generated JPEGs of 768x512 pixels (default: 256)")
    add("--size", type=int, default=64, help="size of the encoded images in pixels (default: 64)")
    add("--buckets", action="store_true", help="as for tools/preencode.py")
    add("--batch-size", type=int, default=8, help="images per batch (default: 8)")
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="encoder precision (default: fp32)")
    add("--device", default="auto", help="as for tools/preencode.py")
    add("--num-workers", type=int, help="decoding processes (default: as for tools/preencode.py)")
    add("--stand-in", type=float, metavar="MS", help="simulate a device that takes MS milliseconds per batch")
    add("--rounds", type=int, default=3, help="rounds of both sides (default: 3)")
    return parser.parse_args()


def write_generated_images(folder: Path, count: int) -> None:
    """Write `count` JPEGs of shapes and noise with captions. They cost as much to decode as photographs."""
    import numpy as np
    from PIL import Image

    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).resize((768, 512), Image.BICUBIC)
        noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (512, 768, 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(f"generated image number {number}")


class StandIn:
    """Replacement for the image encoder that takes `seconds` per batch, one batch after the other.

    The result is a `Pending` that waits until its batch is complete. Its values come from one call of `encoder` per
    image shape.
    """

    def __init__(self, encoder: Any, seconds: float) -> None:
        self._real, self._seconds = encoder.images, seconds
        self._known: dict[Any, Any] = {}
        self._free_at = 0.0
        encoder.images = self.images

    def images(self, batch: torch.Tensor) -> Pending:
        shape = batch.shape[1:]
        if shape not in self._known:
            self._known[shape] = self._real(batch[:1])
        self._free_at = max(self._free_at, time.perf_counter()) + self._seconds
        return Pending(self._known[shape].expand(len(batch), -1, -1, -1), self._free_at)


class Pending:
    """Tensor that is ready at a given time, in place of `HostCopy`. `get` waits until then."""

    def __init__(self, tensor: Any, done_at: float | None = None) -> None:
        self._tensor, self._done_at = (tensor._tensor, tensor._done_at) if done_at is None else (tensor, done_at)

    def get(self) -> torch.Tensor:
        time.sleep(max(0.0, self._done_at - time.perf_counter()))
        return self._tensor

    cpu = get


def time_encoder(encoder: Any, captions: Sequence[str], size: int, batch_size: int) -> float:
    """Return the seconds that the encoder alone needs for `captions` and an equal number of images."""
    import torch

    pixels = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    encoder.forget_captions()
    started = time.perf_counter()
    for start in range(0, len(captions), batch_size):
        part = captions[start : start + batch_size]
        contexts = encoder.captions_later(part)
        last = encoder.images(pixels[: len(part)])
    contexts(), last.cpu()  # wait for the device
    return time.perf_counter() - started


def main() -> None:
    options = parse_arguments()
    import torch

    from ldm.data.image_sources import find_images
    from ldm.encoding import pipeline as encode_shards
    from ldm.encoding.encoder import SampleEncoder
    from ldm.encoding.preencode import preencode
    from ldm.encoding.read import default_workers
    from ldm.release.load import PRECISIONS, load_release, pick_device

    device = pick_device(options.device)
    encoder = SampleEncoder(load_release(options.ckpt, options.config), device, PRECISIONS[options.precision])
    if options.stand_in is not None:
        StandIn(encoder, options.stand_in / 1000)
        encode_shards.HostCopy = Pending
    workers = default_workers() if options.num_workers is None else options.num_workers
    settings = {"size": options.size, "buckets": options.buckets, "batch_size": options.batch_size}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.images is None:
            write_generated_images(folder, options.generated)
        items = find_images(options.images or folder)
        captions = [item.caption or "" for item in items]
        time_encoder(encoder, captions[: 2 * options.batch_size], options.size, options.batch_size)  # warm-up
        print(
            f"{len(items)} images, {options.size} pixels, {device}, torch threads {torch.get_num_threads()}, ", end=""
        )
        print(f"{workers} decoding processes")
        rates: dict[str, list[float]] = {"encoder alone": [], "to shards": []}
        for round_number in range(options.rounds):
            seconds = time_encoder(encoder, captions, options.size, options.batch_size)
            rates["encoder alone"].append(len(items) / seconds)
            started = time.perf_counter()
            preencode(encoder, items, str(folder / f"{round_number}" / "%d.tar"), workers=workers, **settings)
            rates["to shards"].append(len(items) / (time.perf_counter() - started))
    for side, found in rates.items():
        print(f"{side:>14}: {statistics.median(found):8.1f} images/s ({min(found):.1f} to {max(found):.1f})")
    alone, whole = rates.values()
    share = statistics.median(b / a for a, b in zip(alone, whole, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{share:.1%} of the rate of the encoder alone; peak memory {peak:.2f} GiB, without the decoding processes")


if __name__ == "__main__":
    main()
