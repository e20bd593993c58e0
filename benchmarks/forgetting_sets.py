"""Image sets of `forgetting.py`, for learning, measuring and remembering, pre-encoded once for all runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ldm.cli.run import call
from ldm.files import atomic_write
from ldm.util import UserError

RELEASE, CONFIG = Path("data/base/emoji.safetensors"), "demo_tiny_release.yaml"
SAMPLING = ("--steps", 20, "--scale", 3, "--sampler", "dpm_solver", "--batch-size", 16)
_REST = 40  # images without an animal, and the upper limit of animals outside the neighbours and the prior
_SAMPLED = ("--n", 2, "--seed", 1000, *SAMPLING)  # per caption of the prior
_TEACHER = ("--teacher", 16)  # timesteps per image


def shards(folder: Path, name: str) -> str:
    """Return the pattern of the shards of the set `name` in the benchmark's `folder`."""
    return f"{folder}/shards/{name}/*.tar"


def write_sets(folder: Path) -> None:
    """Pre-encode the image sets and make the priors that are not in `folder` yet.

    Raises:
        UserError: the existing sets were made with another base.
    """
    digest, made_with = hashlib.sha256(RELEASE.read_bytes()).hexdigest(), folder / "base.sha256"
    if made_with.exists() and made_with.read_text(encoding="utf-8") != digest:
        raise UserError(f"{folder}: made with another {RELEASE}; give another --folder")
    write_text(digest, made_with)
    release = ("--ckpt", RELEASE, "--config", CONFIG)
    for name, (source, entries) in _image_sets().items():
        if not _is_whole(folder / "shards" / name):
            images = _copy_images(source, entries, folder / "images" / name)
            options = ("--size", 64, "--out", f"{folder}/shards/{name}/%06d.tar", "--overwrite", "--num-workers", 0)
            call("tools/preencode.py", *release, "--images", images, *options)
    prompts = folder / "prompts.txt"
    write_text("".join(entry["text"] + "\n" for entry in _image_sets()["real"][1]), prompts)
    priors = {
        "generated": ("--from-file", prompts, *_SAMPLED),
        "generated_taught": ("--from-file", prompts, *_SAMPLED, *_TEACHER),
        "real_taught": ("--shards", shards(folder, "real"), *_TEACHER),
    }
    for name, source in priors.items():
        if not _is_whole(folder / "shards" / name):
            call("tools/make_prior.py", *release, *source, "--out", f"{folder}/shards/{name}/%06d.tar", "--overwrite")


def _image_sets() -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """Return folder and `metadata.jsonl` entries per set. `real` is a prior and contains `near_prior`."""
    cats, emoji = Path("data/cats"), Path("data/emoji")
    subject, known = _read_metadata(cats), _read_metadata(emoji)
    near = [entry for entry in known if entry.get("cat_neighbour")]
    animals = [entry for entry in known if entry["group"] == "animals" and not entry.get("cat_neighbour")]
    others = [entry for entry in known if entry["group"] != "animals"]
    new = subject[2::3]
    return {
        "cats": (cats, [entry for entry in subject if entry not in new]),
        "new_cats": (cats, new),
        "near": (emoji, near[1::2]),
        "near_prior": (emoji, near[::2]),
        "animals": (emoji, animals[1::2][:_REST]),
        "rest": (emoji, others[:: len(others) // _REST][:_REST]),
        "real": (emoji, near[::2] + animals[::2]),
    }


def _read_metadata(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def _copy_images(source: Path, entries: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        shutil.copy(source / entry["file_name"], folder)
    write_text("".join(json.dumps(entry) + "\n" for entry in entries), folder / "metadata.jsonl")
    return folder


def _is_whole(folder: Path) -> bool:
    """Return True if the shards in `folder` were written to the end."""
    index = folder / "index.json"
    return index.is_file() and json.loads(index.read_text(encoding="utf-8")).get("complete", True)


def write_text(text: str, path: Path) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
