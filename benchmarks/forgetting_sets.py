"""Image sets of `forgetting.py`, for learning, measuring and remembering, pre-encoded once for all runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.cli.run import call
from ldm.files import atomic_write
from ldm.util import UserError

RELEASE, CONFIG = Path("data/base/emoji.safetensors"), "demo_tiny_release.yaml"
SAMPLING = ("--steps", 20, "--scale", 3, "--sampler", "dpm_solver", "--batch-size", 16)
_REST = 40  # images outside the neighbours' group, and the upper limit of those in it that no prior has
_SAMPLED = ("--seed", 1000, *SAMPLING)
_TEACHER = ("--teacher", 16)  # timesteps per image


@dataclass(frozen=True)
class Family:
    """Subject that the base does not know, and what the base knows near it.

    Args:
        name: the folder of the subject's images, in `data`.
        neighbours: key of the neighbours in `data/emoji/metadata.jsonl`.
        group: the group of that file that most neighbours belong to.
    """

    name: str
    neighbours: str
    group: str


FAMILIES = {
    "cats": Family("cats", "cat_neighbour", "animals"),
    "clocks": Family("clocks", "clock_neighbour", "things"),
}


def shards(folder: Path, name: str) -> str:
    """Return the pattern of the shards of the set `name` in the benchmark's `folder`."""
    return f"{folder}/shards/{name}/*.tar"


def write_sets(folder: Path, family: Family, needed: Collection[str]) -> None:
    """Pre-encode the image sets of a family and make the priors `needed`, if they are not in `folder` yet.

    Raises:
        UserError: the existing sets were made with another base.
    """
    digest, made_with = hashlib.sha256(RELEASE.read_bytes()).hexdigest(), folder / "base.sha256"
    if made_with.exists() and made_with.read_text(encoding="utf-8") != digest:
        raise UserError(f"{folder}: made with another {RELEASE}; give another --folder")
    write_text(digest, made_with)
    release = ("--ckpt", RELEASE, "--config", CONFIG)
    for name, (source, entries) in _image_sets(family).items():
        if not _is_whole(folder / "shards" / name):
            images = _copy_images(source, entries, folder / "images" / name)
            options = ("--size", 64, "--out", f"{folder}/shards/{name}/%06d.tar", "--overwrite", "--num-workers", 0)
            call("tools/preencode.py", *release, "--images", images, *options)
    for name, captions in _prior_captions(family).items():
        write_text("".join(caption + "\n" for caption in captions), folder / f"{name}.txt")
    if "known_falling" in needed:  # is made from it
        needed = {*needed, "known_taught"}
    for name, source in _priors(folder, family).items():
        if name in needed and not _is_whole(folder / "shards" / name):
            call("tools/make_prior.py", *release, *source, "--out", f"{folder}/shards/{name}/%06d.tar", "--overwrite")


def _priors(folder: Path, family: Family) -> dict[str, tuple[object, ...]]:
    """Return the options of `make_prior.py` for each prior: its source and its teacher."""
    captions = {name: ("--from-file", folder / f"{name}.txt") for name in _prior_captions(family)}
    kin, known = captions["kin"], captions["known"]
    taught = {f"{name}_taught": (*captions[name], *_SAMPLED, *_TEACHER) for name in captions if name != "kin"}
    return {
        "generated": (*kin, "--n", 2, *_SAMPLED),
        "generated_taught": (*kin, "--n", 2, *_SAMPLED, *_TEACHER),
        "real_taught": ("--shards", shards(folder, "real"), *_TEACHER),
        **taught,
        # whose captions are dropped already
        "known_falling": (
            "--shards",
            shards(folder, "known_taught"),
            *_TEACHER,
            "--teacher-power",
            1,
            "--null-share",
            0,
        ),
        "own_taught": (*known, "--shards", shards(folder, "subject"), *_TEACHER),
        "subject_taught": ("--shards", shards(folder, "subject"), "--teacher", 64),
    }


def _prior_captions(family: Family) -> dict[str, list[str]]:
    """Return the captions of each prior.

    `kin` are those of the real prior. `others` are of every kind, and have none of an image that is measured.
    `known` has the neighbours, measured ones included, as a user would ask for them, and captions of every kind.
    `near_alone`, `few` and `all` have the neighbours and other numbers of these captions.
    """
    sets, known = _image_sets(family), _read_metadata(Path("data/emoji"))
    measured = {entry["text"] for name in ("near", "kin", "rest") for entry in sets[name][1]}
    free = [entry["text"] for entry in known if entry["text"] not in measured]
    near = [entry["text"] for entry in known if entry.get(family.neighbours)]
    beside_near = {"known": free[1::4], "near_alone": [], "few": free[1::20], "all": free}
    return {
        "kin": [entry["text"] for entry in sets["real"][1]],
        "others": free[::4],
        **{name: near + [one for one in captions if one not in near] for name, captions in beside_near.items()},
    }


def count_samples(folder: Path, name: str) -> int:
    """Return the number of samples of the set `name`."""
    return json.loads((folder / "shards" / name / "index.json").read_text(encoding="utf-8"))["samples"]


def _image_sets(family: Family) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """Return folder and `metadata.jsonl` entries per set. `real` is a prior and contains `near_prior`.

    `kin` is of the neighbours' group without neighbours, and `rest` of the other groups.
    """
    images, emoji = Path("data") / family.name, Path("data/emoji")
    subject, known = _read_metadata(images), _read_metadata(emoji)
    near = [entry for entry in known if entry.get(family.neighbours)]
    distant = [entry for entry in known if not entry.get(family.neighbours)]
    kin = [entry for entry in distant if entry["group"] == family.group]
    others = [entry for entry in distant if entry["group"] != family.group]
    new = subject[2::3]
    return {
        "subject": (images, [entry for entry in subject if entry not in new]),
        "new": (images, new),
        "near": (emoji, near[1::2]),
        "near_prior": (emoji, near[::2]),
        "kin": (emoji, kin[1::2][:_REST]),
        "rest": (emoji, others[:: len(others) // _REST][:_REST]),
        "real": (emoji, near[::2] + kin[::2]),
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
