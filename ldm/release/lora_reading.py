"""LoRA files of kohya, LyCORIS (see also `lycoris.py`), diffusers and PEFT.

A layer's change is ΔW = α/r · B A with A (r, in) and B (out, r) (arXiv:2106.09685, section 4.1). For a convolution, A
has its kernel and B is 1×1, or a core lies between both. DoRA adds the magnitude of the changed weight
(arXiv:2402.09353).
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import converted, in_memory, open_checkpoint, weights_of
from ldm.release.layer_names import PREFIXES, TEXT_1, TEXT_2, UNET_PART, flat
from ldm.release.lora_alpha import PEFT, Alphas
from ldm.release.lycoris import DIFFERENCE, HADAMARD, KRONECKER, LycorisChange, is_lycoris, lycoris_change
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)

Name = tuple[str, str]  # part of the release, and path of the layer with underscores for dots

# Starts of keys with dotted paths, by part, longest first.
_DOTTED = {f"{TEXT_2}.": TEXT_2, f"{TEXT_1}.": TEXT_1, f"{UNET_PART}.": UNET_PART, "diffusion_model.": UNET_PART}
_DOTTED["lycoris_"] = UNET_PART  # of LyCORIS beside other trainers
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")  # of diffusers until 0.26
_TENSORS = {
    "down": r"lora_down\.weight|lora_A(?:\.default)?\.weight|lora(?:_linear_layer)?\.down\.weight",
    "up": r"lora_up\.weight|lora_B(?:\.default)?\.weight|lora(?:_linear_layer)?\.up\.weight",
    "mid": r"lora_mid\.weight",
    "alpha": r"alpha",
    "dora_scale": r"dora_scale",
    "magnitude": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    **{name: name for name in (*HADAMARD, *KRONECKER, *DIFFERENCE)},
}
_KEY = re.compile(r"(.+?)\.(?:" + "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _TENSORS.items()) + ")")
# Ends of keys of other kinds.
_OTHER_KINDS = (
    (r"\.b?oft_\w+(?:\.weight)?", "OFT"),
    (r"\.(?:on_input|ia3_\w+)", "IA3"),
    (r"\.(?:glora_\w+|[ab]m?[12]\.weight)", "GLoRA"),
    (r"\.vera_\w+", "VeRA"),
    (r"\.(?:diff_b|lora_B(?:\.default)?\.bias)", "the change of a bias"),
    (r"\.[wb]_norm", "the change of a norm"),
    (r"\.set_weight", "a whole weight"),
)
_EMBEDDING = "bundle_emb."  # embeddings that trainers put beside the factors
_TAKEN = "this program adds LoRA, LoCon, DoRA, LoHa, LoKr and differences of weights; save it as one of these"


@dataclass(frozen=True)
class Factors:
    """Change of one layer.

    Args:
        down: A, (r, in) or (r, in, kh, kw).
        up: B, (out, r) or (out, r, 1, 1).
        mid: core (r, r, kh, kw) of a convolution; `down` is (r, in, 1, 1) then.
        scale: α / r.
        magnitude: m of DoRA, (out, 1) or (1, in).
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    scale: float
    magnitude: Tensor | None

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape (in, kh, kw) of what the change of one output is computed from; (in · kh · kw,) if it is flat."""
        down = tuple(self.down.shape[1:])
        return down if self.mid is None else (down[0], *self.mid.shape[2:])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the change as a matrix (out, in · kh · kw)."""
        kernel = 1 if self.mid is None else self.mid[0, 0].numel()
        return self.up.shape[0], self.down[0].numel() * kernel

    def change(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ΔW as a matrix (out, in · kh · kw)."""

        def read(tensor: Tensor) -> Tensor:
            return converted(in_memory(tensor), dtype).to(device)

        down, up = read(self.down), read(self.up).flatten(1)
        if self.mid is not None:
            down = torch.einsum("abhw,bi->aihw", read(self.mid), down.flatten(1))
        return self.scale * (up @ down.flatten(1))


def read_lora(path: str | Path) -> dict[Name, Factors | LycorisChange]:
    """Return the changes in the file at `path` by layer.

    Raises:
        UserError: the file cannot be read, or holds something else than LoRA, LoCon, DoRA, LoHa, LoKr or differences.
    """
    opened = open_checkpoint(path)
    tensors: dict[Name, dict[str, Tensor]] = defaultdict(dict)
    paths: dict[Name, str] = {}
    weights = weights_of(opened.content, path)
    embeddings = [key for key in weights if key.startswith(_EMBEDDING)]
    if embeddings:
        log.warning("%s: textual-inversion embeddings left out: %s", path, ", ".join(embeddings)[:200])
    for key, value in weights.items():
        if key in embeddings:
            continue
        part, dotted = _part_of(_PROCESSOR.sub(_in_layer, key).removeprefix(PEFT))
        match = _KEY.fullmatch(dotted)
        if match is None:
            other = next((name for end, name in _OTHER_KINDS if re.search(f"{end}$", key)), None)
            what = f"is {other}" if other else "is not the name of a LoRA's weight"
            raise UserError(f"{path}: {key:.200} {what}; {_TAKEN}")
        name = part, flat(match[1])
        paths[name] = match[1]
        if match.lastgroup in tensors[name]:
            raise UserError(f"{path}: {key:.200} is there under two names; save the file again with one of them")
        if value.is_complex():
            raise UserError(f"{path}: {key:.200} has complex numbers; this program reads real factors")
        tensors[name][match.lastgroup] = value
    alphas = Alphas(opened.metadata, path, any(key.startswith(PEFT) for key in weights))
    result = {}
    for name, found in tensors.items():
        rank = len(found["down"]) if "down" in found and found["down"].ndim else None
        alpha = None if "alpha" in found else alphas.of(name[0], paths[name], rank)
        result[name] = factors_from(found, alpha, f"{path}: {paths[name]:.200}")
    without = sum(change.scale == 0 for change in result.values())
    if without:
        log.warning("%s: alpha is 0 in %d of %d layers, which therefore change nothing", path, without, len(result))
    return result


def _in_layer(match: re.Match) -> str:
    return f".{match[1]}{'.0' if match[1] == 'to_out' else ''}.lora."


def _part_of(key: str) -> tuple[str, str]:
    """Return the part of the release that `key` belongs to, and the key below it."""
    starts = ((start, part) for start, part in (*PREFIXES.items(), *_DOTTED.items()) if key.startswith(start))
    start, part = next(starts, ("", TEXT_1 if key.startswith(("text_model.", "encoder.layers.")) else UNET_PART))
    below = key.removeprefix(start)
    if part != UNET_PART and below.startswith(("encoder.", "encoder_")):  # of transformers 5
        below = f"text_model{below[len('encoder')]}{below}"
    return part, below


def factors_from(tensors: Mapping[str, Tensor], alpha: float | None, where: str) -> Factors | LycorisChange:
    """Return the change of a layer from its `tensors`, by the names `down`, `up`, `alpha` and so on.

    `alpha` is α if the tensors have none, and None if it is the rank. `where` names the layer in messages.

    Raises:
        UserError: a tensor is missing, or has a shape that does not fit.
    """
    if "alpha" in tensors:
        alpha = float(in_memory(tensors["alpha"]).reshape(-1)[0]) if tensors["alpha"].numel() == 1 else float("nan")
        refuse_if(not math.isfinite(alpha), f"{where}: its alpha is not a finite number")
    magnitude = _magnitude(tensors)
    if is_lycoris(tensors):
        return lycoris_change(tensors, alpha, magnitude, where)
    refuse_if(
        "down" not in tensors or "up" not in tensors,
        f"{where}: lacks one of its two factors; the file is incomplete, download it again",
    )
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    rank = down.shape[0] if down.ndim else 0
    fits = min(down.ndim, up.ndim) >= 2 and rank and up.shape[1:].numel() == rank
    if not fits or (
        mid is not None and (mid.ndim != 4 or mid.shape[:2] != (rank, rank) or down[0].numel() != down.shape[1])
    ):
        raise UserError(f"{where}: has factors of shapes {tuple(down.shape)} and {tuple(up.shape)}, which do not fit")
    return Factors(down, up, mid, 1.0 if alpha is None else alpha / rank, magnitude)


def _magnitude(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return m of DoRA, (out, 1) or (1, in), or None."""
    magnitude = tensors.get("dora_scale")
    if magnitude is not None:  # (out, 1, …), or (1, in, …)
        return in_memory(magnitude).flatten(1) if magnitude.ndim > 1 else in_memory(magnitude).reshape(-1, 1)
    return in_memory(tensors["magnitude"]).reshape(-1, 1) if "magnitude" in tensors else None
