"""Values of the page's fields: their defaults, and the recipe that they make. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.release import CONVENTIONAL_RELEASE
from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.commands import ROOT, TrainingRecipe
from ldm.util import UserError, check_number

DEMO_RELEASE, DEMO_IMAGES = ROOT / "data/base/emoji.safetensors", ROOT / "data/cats"
# Fields of a recipe, in the order in which the page passes them.
RECIPE = ("name", "images", "release", "config", "base", "predicts", "size", "flip", "overwrite", "tier", "batch",
          "steps", "minutes", "rate", "prompts", "preview_steps")  # fmt: skip
RELEASE_CONFIG, BASE_CONFIG = "config of the release", "config of the training"  # in messages
_EMPTY = {
    "name": "my-run", "images": "", "release": "", "config": "", "base": "", "predicts": "", "size": 0, "flip": False,
    "overwrite": False, "tier": "", "batch": 0, "steps": 1000, "minutes": 0, "rate": 0, "prompts": "",
    "preview_steps": 0, "card": 24, "ram": 0, "sample_steps": 50, "scale": 7.5, "sampler": "ddim",
    "out": "outputs/mine.safetensors", "compare_base": "", "compare_tuned": "outputs/mine.safetensors",
    "compare_prompts": "", "seed": 1, "count": 2, "sets": "", "lora_tuned": "outputs/mine.safetensors",
    "lora": "outputs/mine-lora.safetensors",
}  # fmt: skip
_DEMO = {
    "name": "cats", "config": "demo_tiny_release.yaml", "base": "demo_tiny.yaml", "size": 64, "steps": 200,
    "prompts": "tom the cat, grinning\ndog face", "preview_steps": 100, "card": 1, "sample_steps": 25, "scale": 3,
    "sampler": "dpm_solver", "compare_prompts": "tom the cat, grinning\ntom the cat, crying\ndog face\ntiger face",
    "sets": "cats=outputs/studio/cats/shards/*.tar",
}  # fmt: skip


def default_fields(demo: bool) -> dict[str, Any]:
    """Return the first values of the fields: of the demo, if `demo` or if there is no release at the usual place."""
    if not demo and CONVENTIONAL_RELEASE.exists():
        return {**_EMPTY, "release": str(CONVENTIONAL_RELEASE), "compare_base": str(CONVENTIONAL_RELEASE)}
    if not (DEMO_RELEASE.exists() and DEMO_IMAGES.is_dir()):
        return dict(_EMPTY)
    release = _from_here(DEMO_RELEASE)
    return {**_EMPTY, **_DEMO, "release": release, "compare_base": release, "images": _from_here(DEMO_IMAGES)}


def _from_here(path: Path) -> str:
    return str(path.relative_to(ROOT) if Path.cwd() == ROOT else path)


@dataclass(frozen=True)
class Recognised:
    """Training config of a release: its files and the changes that the release makes to it."""

    base: str
    overrides: tuple[str, ...]
    prediction: str  # eps or v
    text: str


def recognise_release(release: Path, base: str, predicts: str, size: int) -> Recognised:
    """Return the training config of the release at `release`: `base` if it is given, or else that of its family.

    Raises:
        UserError: the file cannot be read, or no family matches it.
    """
    from ldm.release.configs import training_config

    chosen = training_config(release, [base] if base else (), predicts or None, size=size or None)
    what = "" if base else f"{Path(chosen.names[0]).stem.removeprefix('finetune_').replace('_', ' ')}, "
    return Recognised(
        chosen.names[0], tuple(chosen.overrides), chosen.prediction, f"{what}predicts {chosen.prediction}"
    )


def read_recipe(values: Mapping[str, Any], allowed: AllowedFolders, work: Path, gpu: bool) -> TrainingRecipe:
    """Return the recipe of the values of the fields `RECIPE`, with the release's own config where none is given.

    Raises:
        UserError: a value is wrong, or a path is outside of the allowed folders.
    """
    images = str(allowed.check_folder(values["images"], "folder of images"))
    release = allowed.check_existing(values["release"], "release")
    for name, what in (("config", RELEASE_CONFIG), ("base", BASE_CONFIG), ("tier", "tier")):
        allowed.check_config(values[name], what)
    numbers = {name: whole_number(values[name], what) for name, what in (
        ("size", "size"), ("batch", "batch"), ("steps", "steps"), ("preview_steps", "steps between previews"),
    )}  # fmt: skip
    for name, what in (("minutes", "time budget"), ("rate", "learning rate")):
        check_number(what, values[name] or 0, least=0, whole=False)
    found = recognise_release(release, values["base"], values["predicts"], numbers["size"])
    return TrainingRecipe(
        name=values["name"].strip(),
        images=images,
        release=str(release),
        base=found.base,
        config=values["config"],
        overrides=found.overrides,
        is_family=not values["base"],
        # Told to every tool, so that all recognise the same family.
        predicts=values["predicts"] or ("" if values["base"] else found.prediction),
        flip=bool(values["flip"]),
        overwrite=bool(values["overwrite"]),
        tier=values["tier"],
        minutes=values["minutes"] or 0,
        rate=values["rate"] or 0,
        prompts=tuple(filter(None, map(str.strip, values["prompts"].splitlines()))),
        gpu=gpu,
        work=work,
        **numbers,
    )


def whole_number(value: Any, what: str) -> int:
    """Return the number of a field, 0 if it is empty."""
    value = 0 if value is None else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{what} {value!r}: give a whole number, or 0 for the default")
    return value
