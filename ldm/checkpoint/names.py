"""Translation of other programs' key names to those of this package, and back.

To add the layout of a program, add an entry to `_RENAMED`, or to `_CARRIED` for values that the model does not use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from ldm.checkpoint.causes import is_scale
from ldm.checkpoint.diffusers_keys import VAE_ATTENTION
from ldm.checkpoint.keys import (
    COND_STAGE,
    CONDITIONER,
    EMA,
    FIRST_STAGE,
    MODEL,
    OPTIONAL_KEYS,
    PREDICTION_MARKERS,
    SCHEDULE_KEYS,
    UNET,
    ema_key,
    has_part,
    is_optional,
)
from ldm.checkpoint.writing import Pending

Weights = Mapping[str, torch.Tensor]

_LABELS = 10  # maximum number in a message
_PARTS = (MODEL, EMA, FIRST_STAGE, COND_STAGE, CONDITIONER)
_TOWER = rf"(?:{re.escape(COND_STAGE)}|{re.escape(CONDITIONER)}embedders\.\d+\.)"  # of a text encoder
_ATTENTION = rf"^({re.escape(FIRST_STAGE)}|)((?:encoder|decoder)\.(?:.*\.)?(?:attn_\d+|attn\.\d+))\."
_VAE_NAMES = {ours: "|".join(map(re.escape, theirs)) for ours, theirs in VAE_ATTENTION.items()}
# (pattern, replacement), applied in order.
_RENAMED = [
    # Wrappers of a saved module: torch.compile, distributed training, and a checkpoint flattened to one level.
    (re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."), ""),
    (re.compile(r"^(?:_forward_module\.|module\.|state_dict\.)+"), ""),
    (re.compile(rf"^{re.escape(MODEL)}module\."), MODEL),
    # A UNet alone.
    (re.compile(r"^(?:diffusion_model\.)?((?:input|output)_blocks\.|middle_block\.|(?:time|label)_emb\w*\.|out\.\d)"),
     rf"{UNET}\1"),
    # The text tower in transformers 5, or saved without the outer module.
    (re.compile(rf"^({_TOWER}transformer\.)(embeddings|encoder|final_layer_norm)\."), r"\1text_model.\2."),
    # Attention of an autoencoder in diffusers.
    *((re.compile(rf"{_ATTENTION}(?:{theirs})\.(weight|bias)$"), rf"\1\2.{ours}.\3")
      for ours, theirs in _VAE_NAMES.items()),
]  # fmt: skip
_LORA = re.compile(r"(?:^|\.)lora_")
# Values inside of the parts that no model here uses.
_CARRIED = [
    re.compile(rf"^{re.escape(FIRST_STAGE)}(?:.*\.)?[^.]*ema[^.]*(?:\.|$)"),
    re.compile(rf"^{_TOWER}(?:transformer\.)?(?:vision_model|visual_projection|text_projection)\."),
    re.compile(rf"^{_TOWER}(?:transformer\.)?(?:logit_scale|text_projection)$"),
    _LORA,
]
# Values that programs add to networks: GLIGEN, AnimateDiff, IP-Adapter, LoRA.
_ADDED = re.compile(r"(?:^|\.)(?:position_net|fuser|motion_modules)\.|\.to_[kv]_ip\.|\.(?:alpha|dora_scale)$")
# Weights without which those of the model have another meaning: the classes of a UNet.
_NEEDED = re.compile(rf"^{re.escape(UNET)}label_emb\.")
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[A-Za-z_]*[A-Za-z]")
_LINEAR = re.compile(rf"{_ATTENTION}(?:q|k|v|proj_out)\.weight$")


@dataclass(frozen=True)
class Renamed:
    """Weights under this package's names and shapes, and the names in the file.

    `origins` maps each key of `weights` to a key of `file`. `carried` are the keys of `file` that no model has.
    """

    file: Weights
    weights: dict[str, torch.Tensor]
    origins: dict[str, str]
    carried: list[str]

    def summary(self) -> list[str]:
        """Return a line for renamed keys and a line for unused keys, if there are any."""
        renamed = [(theirs, ours) for ours, theirs in self.origins.items() if theirs != ours]
        lines = []
        if renamed:
            (theirs, ours) = renamed[0]
            lines.append(f"{len(renamed)} keys have other names, such as {theirs} for {ours}")
        unused = [key for key in self.carried if key not in PREDICTION_MARKERS]  # no weights, but they are read
        if unused:
            labels = list(dict.fromkeys(_label(key) for key in unused))
            more = ", …" if len(labels) > _LABELS else ""
            lines.append(f"{len(unused)} values are not used: {', '.join(labels[:_LABELS])}{more}")
        return lines

    def with_carried(self) -> dict[str, torch.Tensor]:
        """Return the weights, and after them the values that no model uses, under the file's names."""
        return {**self.weights, **{key: self.file[key] for key in self.carried}}

    def restored(self, state_dict: Mapping[str, torch.Tensor | Pending]) -> dict[str, torch.Tensor | Pending]:
        """Return `state_dict` with the names, shapes and order of the file, and with its unused values.

        Keys that the file lacks come last, under this package's names.
        """
        ours = {theirs: key for key, theirs in self.origins.items()}
        result = {}
        for theirs, original in self.file.items():
            if theirs not in ours:
                result[theirs] = original
            elif ours[theirs] in state_dict:
                result[theirs] = _reshaped(state_dict[ours[theirs]], tuple(original.shape))
        return {**result, **{key: value for key, value in state_dict.items() if key not in self.origins}}


def in_our_names(weights: Weights, own: Collection[str] = ()) -> Renamed:
    """Return `weights` under the names of the model with the keys `own`. A key in `own` keeps its name.

    If the UNet has only EMA weights, they become its weights. EMA keys have no dots, so this needs `own`. Within the
    parts of the model, values of other programs are carried, but not those whose names have only words of the model's
    keys, such as a further layer or a bias: they mean another model.
    """
    own = set(own)
    names = {key: key if key in own else _our_name(key) for key in weights}
    if not has_part(names.values(), MODEL) and has_part(names.values(), EMA):
        shadows = {ema_key(key): key for key in own if key.startswith(MODEL)}
        names = {key: shadows.get(name, name) for key, name in names.items()}
    known, is_extra = _known(own), _extras_beside(own, names.values())
    exact = {key for key, name in names.items() if key == name}
    renamed = Renamed(weights, {}, {}, [])
    for key, name in names.items():
        taken = name in renamed.origins or (key != name and name in exact)
        if taken or (name not in own and (_is_carried(name, known) or is_extra(name))):
            renamed.carried.append(key)
            continue
        renamed.weights[name] = _as_convolution(name, weights[key])
        renamed.origins[name] = key
    return renamed


def _extras_beside(own: set[str], names: Iterable[str]) -> Callable[[str], bool]:
    """Return a test for names of other programs, within the parts that both `own` and `names` have."""
    shared = own.intersection(names)
    parts = tuple(part for part in _PARTS if part != EMA and has_part(shared, part))
    words = {word for key in own for word in _WORD.findall(key)}

    def is_extra(name: str) -> bool:
        if not name.startswith(parts) or is_optional(name) or is_scale(name) or _NEEDED.match(name):
            return False
        return not words.issuperset(_WORD.findall(name))

    return is_extra


def is_carried(key: str, own: Iterable[str] = ()) -> bool:
    """Return True if no model uses the value `key`. `own` are further keys of the model."""
    return _is_carried(key, _known(own))


def _known(own: Iterable[str]) -> set[str]:
    """Return the possible names before the first dot of a model's keys."""
    return {_kind(key) for key in (*own, *_PARTS, *SCHEDULE_KEYS, *OPTIONAL_KEYS)}


def _our_name(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return key


def _kind(key: str) -> str:
    return key.split(".")[0]


def _label(key: str) -> str:
    """Return the name that messages show for an unused value."""
    if _LORA.search(key):
        return "lora_*"
    if not key.startswith(_PARTS):
        return _kind(key)
    is_listed = any(pattern.search(key) for pattern in _CARRIED)
    return ".".join(key.split(".")[:2]) if is_listed else _NUMBER.sub("*", key)


def _is_carried(name: str, known: Iterable[str]) -> bool:
    return _kind(name) not in known or any(pattern.search(name) for pattern in (*_CARRIED, _ADDED))


def _as_convolution(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight (O, I) of a linear layer as (O, I, 1, 1), if the model has a 1x1 convolution there."""
    return weight[:, :, None, None] if weight.ndim == 2 and _LINEAR.search(name) else weight


def _reshaped(value: torch.Tensor | Pending, shape: tuple[int, ...]) -> torch.Tensor | Pending:
    if tuple(value.shape) == shape:
        return value
    if isinstance(value, Pending):
        return Pending(shape, value.dtype, lambda: value.compute().reshape(shape))
    return value.reshape(shape)
