"""Access to the golden cases.

A shared folder beside the checkout takes precedence over `tests/golden`, because it may hold more cases.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

_TESTS = Path(__file__).parent
_SHARED = _TESTS.parents[1] / "shared" / "golden"

# Lists of released keys, `<name>_keys.json`, by family.
RELEASED = {
    "sd1": "sd_v1",
    "sd1_inpainting": "sd_v1_inpainting",
    "instruct_pix2pix": "instruct_pix2pix",
    "sd2_768_v": "sd_v2",
    "sd2_base": "sd_v2",
    "sdxl": "sdxl_base",
}

GOLDEN: Path = _SHARED if _SHARED.is_dir() else _TESTS / "golden"


def _load_seeded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_seeded", GOLDEN / "seeded.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_seeded = _load_seeded()
fill_seeded = _seeded.fill_seeded
seeded_tensor = _seeded.seeded_tensor
seeded_weight = _seeded.seeded_weight


@functools.cache
def read_json(name: str) -> dict[str, Any]:
    """Return the parsed `name`.json of the golden folder."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


_EDITIONS = ("cases", "cases_v2")  # SD v1 and the first latent diffusion models; the families after them


def case(name: str) -> dict[str, Any]:
    """Return the case `name` of either edition: constructor arguments, shapes, expected keys and scalars."""
    return next(read_json(file)[name] for file in _EDITIONS if name in read_json(file))


def cases(kind: str, edition: int = 1) -> list[str]:
    """Return the names of all cases whose `kind` is `kind`, in file order."""
    return [name for name, entry in read_json(_EDITIONS[edition - 1]).items() if entry["kind"] == kind]


def reference(name: str, what: str) -> torch.Tensor:
    """Return the tensor `what` that the case `name` expects."""
    return next(tensors(file)[f"{name}/{what}"] for file in _EDITIONS if name in read_json(file))


@functools.cache
def tensors(file: str) -> dict[str, torch.Tensor]:
    """Return all tensors of `file`.safetensors, keyed `<case>/<name>`. Do not change them in place."""
    return load_file(GOLDEN / f"{file}.safetensors")


def released_keys(prefix: str = "", file: str = "sd_v1_keys") -> dict[str, tuple[int, ...]]:
    """Return key -> shape of a released checkpoint, for the keys below `prefix`, without the prefix."""
    keys = read_json(file)["keys"]
    return {key[len(prefix) :]: tuple(shape) for key, (shape, _) in keys.items() if key.startswith(prefix)}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ‖out − reference‖ / ‖reference‖ in float64; the shapes must be equal."""
    assert out.shape == reference.shape, f"shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
    out, reference = out.detach().cpu().double(), reference.cpu().double()
    return float((out - reference).norm() / reference.norm())
