"""Names of weights in diffusers' folders, and their names in this package.

Each kind of network has one table of modules, for any number of levels and blocks, which is read in both directions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ldm.checkpoint.keys import COND_STAGE, FIRST_STAGE, POSITION_IDS, TOWERS, UNET, has_part

# Parts of a model: subfolders of a folder, and names in LoRA files.
UNET_PART, VAE_PART, TEXT_1, TEXT_2 = "unet", "vae", "text_encoder", "text_encoder_2"
# Parts by the prefix of their keys. Text towers of one encoder, and of SDXL.
PART_PREFIXES = {UNET: UNET_PART, FIRST_STAGE: VAE_PART, COND_STAGE: TEXT_1, TOWERS[0]: TEXT_1, TOWERS[1]: TEXT_2}
CLIP, OPEN_CLIP = "transformer.", "model."  # below a tower's prefix: CLIP in transformers' names, or OpenCLIP
RESBLOCKS_OF_SD2 = f"{COND_STAGE}{OPEN_CLIP}transformer.resblocks."

# Modules outside of the blocks, and modules of a residual block, of a UNet.
UNET_OUTSIDE = {
    **{"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"},
    **{"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"},
    **{"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"},
}
_RESIDUAL = {
    **{"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"},
    **{"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"},
}
_UNET_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
# Modules of an autoencoder's attention: today's names in diffusers first, then older ones.
VAE_ATTENTION = {
    **{"q": ("to_q", "query"), "k": ("to_k", "key"), "v": ("to_v", "value")},
    **{"proj_out": ("to_out.0", "to_out", "proj_attn"), "norm": ("group_norm",)},
}
_VAE_RESIDUAL = {"nin_shortcut": "conv_shortcut"}
_VAE_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
_MOST_BLOCKS = 16  # of a level of an autoencoder
# Modules of OpenCLIP's tower, and of one of its blocks. Three layers of CLIP are the rows of one weight.
_OPEN_CLIP_OUTSIDE = {"token_embedding": "text_model.embeddings.token_embedding"}
_OPEN_CLIP_OUTSIDE["ln_final"] = "text_model.final_layer_norm"
OPEN_CLIP_BLOCK = {
    **{"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"},
    **{"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
}
_POSITIONS, _THEIR_POSITIONS = "positional_embedding", "text_model.embeddings.position_embedding.weight"
_PROJECTION = "text_projection"  # (width, features) of OpenCLIP; a linear layer in transformers
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_UNFUSED = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)")
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")

_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(\w+)")
_THEIR_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")


class Place(NamedTuple):
    """Place of a value in a folder: its part, and its key there."""

    part: str
    key: str


@dataclass(frozen=True)
class Origin:
    """Places of the value, or of its rows in their order, of one key of this package."""

    places: tuple[Place, ...]
    is_transposed: bool = False


class Names:
    """Table of modules: path here, path in diffusers, and the names inside of the module."""

    def __init__(self, rows: Iterable[tuple[str, str, Mapping[str, str]]]) -> None:
        self.rows = {ours: (theirs, inner) for ours, theirs, inner in rows}

    def reversed(self) -> Names:
        return Names(
            (theirs, ours, {theirs: ours for ours, theirs in inner.items()})
            for ours, (theirs, inner) in self.rows.items()
        )

    def __call__(self, path: str) -> str | None:
        """Return the other name of the module `path`, or None if the table lacks it."""
        head, tail = path, ""
        while head not in self.rows:
            head, dot, last = head.rpartition(".")
            if not dot:
                return None
            tail = f"{last}.{tail}" if tail else last
        other, inner = self.rows[head]
        return f"{other}.{inner.get(tail, tail)}" if tail else other

    def of_key(self, key: str) -> str | None:
        """Return the other name of the weight or bias `key`."""
        path, _, kind = key.rpartition(".")
        other = self(path)
        return other and f"{other}.{kind}"


class _UnetLevel(NamedTuple):
    """Level of a UNet on one of its ways: residual blocks, and whether it has attention and a sampling layer."""

    blocks: int
    has_attention: bool
    has_sampler: bool


def unet_names(keys: Iterable[str]) -> Names:
    """Return the table of a UNet whose weights have these `keys`, of this package or of diffusers."""
    keys = list(keys)
    down, up = _their_levels(keys) if any(_THEIR_BLOCK.match(key) for key in keys) else _our_levels(keys)
    rows = [(ours, theirs, {}) for ours, theirs in UNET_OUTSIDE.items()]
    rows += [(f"middle_block.{n}", f"mid_block.{name}", _RESIDUAL) for n, name in _UNET_MIDDLE.items()]
    for levels, side, other, sampler in (
        (down, "input_blocks", "down_blocks", "op"),
        (up, "output_blocks", "up_blocks", "conv"),
    ):
        number = 1 if side == "input_blocks" else 0
        for level, (blocks, has_attention, has_sampler) in enumerate(levels):
            for place in range(blocks):
                rows.append((f"{side}.{number}.0", f"{other}.{level}.resnets.{place}", _RESIDUAL))
                rows.append((f"{side}.{number}.1", f"{other}.{level}.attentions.{place}", {}))
                number += 1
            if has_sampler and sampler == "op":
                rows.append((f"{side}.{number}.0.op", f"{other}.{level}.downsamplers.0.conv", {}))
                number += 1
            elif has_sampler:  # in the last block of its level
                child = 2 if has_attention else 1
                rows.append((f"{side}.{number - 1}.{child}.conv", f"{other}.{level}.upsamplers.0.conv", {}))
    return Names(rows)


def _our_levels(keys: Iterable[str]) -> tuple[list[_UnetLevel], list[_UnetLevel]]:
    """Return the levels of the ways down and up. A level ends with a sampling layer."""
    children: dict[str, dict[int, dict[str, set[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for key in keys:
        match = _BLOCK.match(key)
        if match and f"{match[1]}.{match[2]}" != "input_blocks.0":
            children[match[1]][int(match[2])][match[3]].add(match[4])
    ways = []
    for side in ("input_blocks", "output_blocks"):
        levels, blocks, has_attention = [], 0, False
        for _, found in sorted(children[side].items()):
            is_sampler = "op" in found["0"]
            samples = is_sampler or any("conv" in names for child, names in found.items() if child != "0")
            blocks += not is_sampler
            has_attention |= "proj_in" in found.get("1", ())
            if samples:
                levels.append(_UnetLevel(blocks, has_attention, True))
                blocks, has_attention = 0, False
        ways.append([*levels, _UnetLevel(blocks, has_attention, False)] if blocks else levels)
    return ways[0], ways[1]


def _their_levels(keys: Iterable[str]) -> tuple[list[_UnetLevel], list[_UnetLevel]]:
    found: dict[str, dict[int, dict[str, set[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for key in keys:
        if match := _THEIR_BLOCK.match(key):
            found[match[1]][int(match[2])][match[3]].add(int(match[4]))
    down, up = (
        [
            _UnetLevel(
                len(kinds["resnets"]), bool(kinds["attentions"]), bool(kinds["downsamplers"] | kinds["upsamplers"])
            )
            for _, kinds in sorted(found[side].items())
        ]
        for side in ("down_blocks", "up_blocks")
    )
    return down, up


def vae_names(keys: Iterable[str]) -> Names:
    """Return the table of an autoencoder with these `keys`, of this package or of diffusers."""
    levels = 1 + max(
        (int(n) for key in keys for n in re.findall(r"^decoder\.up(?:_blocks)?\.(\d+)\.", key)), default=-1
    )
    attention = {ours: theirs for ours, (theirs, *_) in VAE_ATTENTION.items()}
    rows = [(name, name, {}) for name in ("quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rows += [(f"{side}.{ours}", f"{side}.{ours}", {}) for ours in ("conv_in", "conv_out")]
        rows.append((f"{side}.norm_out", f"{side}.conv_norm_out", {}))
        for ours, theirs in _VAE_MIDDLE.items():
            inner = attention if ours.startswith("attn") else _VAE_RESIDUAL
            rows.append((f"{side}.mid.{ours}", f"{side}.mid_block.{theirs}", inner))
    for level in range(levels):
        ways = (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", "down"),
            (f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}", "up"),
        )
        for ours, theirs, way in ways:
            for place in range(_MOST_BLOCKS):
                rows.append((f"{ours}.block.{place}", f"{theirs}.resnets.{place}", _VAE_RESIDUAL))
                rows.append((f"{ours}.attn.{place}", f"{theirs}.attentions.{place}", attention))
            rows.append((f"{ours}.{way}sample.conv", f"{theirs}.{way}samplers.0.conv", {}))
    return Names(rows)


def open_clip_names(layers: int) -> Names:
    """Return the table of an OpenCLIP text tower with this number of blocks, except for `_FUSED` and its parameters."""
    rows = [(ours, theirs, {}) for ours, theirs in _OPEN_CLIP_OUTSIDE.items()]
    rows += [(f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}", OPEN_CLIP_BLOCK) for n in range(layers)]
    return Names(rows)


def resblocks(keys: Iterable[str]) -> int:
    """Return the number of blocks of an OpenCLIP tower with these `keys` below its prefix."""
    return 1 + max((int(match[1]) for key in keys if (match := _RESBLOCK.match(key))), default=-1)


def diffusers_origins(keys: Iterable[str]) -> dict[str, Origin]:
    """Return the places in a folder of those `keys` of a release that a folder has.

    It has no EMA weights, no noise schedule, and not what SD 2 does not use of its text tower: the last block, whose
    input is the caption embedding, and the projection.
    """
    keys = list(keys)
    result = {}
    for prefix, part in PART_PREFIXES.items():
        below = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        if part in (UNET_PART, VAE_PART):
            names = unet_names(below) if part == UNET_PART else vae_names(below)
            found = {key: Origin((Place(part, other),)) for key in below if (other := names.of_key(key))}
        elif has_part(below, OPEN_CLIP):
            found = _open_clip_origins([key.removeprefix(OPEN_CLIP) for key in below], part, prefix == COND_STAGE)
            found = {OPEN_CLIP + key: origin for key, origin in found.items()}
        else:
            of_clip = [key for key in below if key.startswith(CLIP) and _is_clip(key.removeprefix(CLIP))]
            found = {key: Origin((Place(part, key.removeprefix(CLIP)),)) for key in of_clip}
        result |= {prefix + key: origin for key, origin in found.items()}
    return result


def _open_clip_origins(keys: list[str], part: str, is_sd2: bool) -> dict[str, Origin]:
    layers = resblocks(keys) - is_sd2
    names = open_clip_names(layers)
    found = {}
    for key in keys:
        if match := _FUSED.fullmatch(key):
            above = f"text_model.encoder.layers.{match[1]}.self_attn"
            if int(match[1]) < layers:
                found[key] = Origin(tuple(Place(part, f"{above}.{letter}_proj.{match[2]}") for letter in "qkv"))
        elif key == _POSITIONS:
            found[key] = Origin((Place(part, _THEIR_POSITIONS),))
        elif key == _PROJECTION and not is_sd2:
            found[key] = Origin((Place(part, f"{_PROJECTION}.weight"),), is_transposed=True)
        elif other := names.of_key(key):
            found[key] = Origin((Place(part, other),))
    return found


def canonical(part: str, key: str) -> str:
    """Return today's name of the weight `key` of a folder's `part`."""
    if part == VAE_PART:
        for today, *older in VAE_ATTENTION.values():
            key = re.sub(rf"(attentions\.\d+\.)(?:{'|'.join(map(re.escape, (*older, today)))})\.(weight|bias)$",
                         rf"\g<1>{today}.\2", key)  # fmt: skip
    elif part in (TEXT_1, TEXT_2):
        key = re.sub(r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1.", key)
    return key


def our_keys(prefix: str, kind: str, keys: Iterable[str]) -> dict[str, str | None]:
    """Return, by canonical key of one part of a folder, the key of this package, or None if it has none.

    Args:
        prefix: of the part's keys in this package.
        kind: `CLIP` or `OPEN_CLIP` of a text tower.
    """
    keys, part = list(keys), PART_PREFIXES[prefix]
    if part in (UNET_PART, VAE_PART):
        names = (unet_names(keys) if part == UNET_PART else vae_names(keys)).reversed()
        return {key: _below(prefix, names.of_key(key)) for key in keys}
    if kind == CLIP:
        return {key: prefix + CLIP + key if _is_clip(key) else None for key in keys}
    layers = len({match[1] for key in keys if (match := _UNFUSED.fullmatch(key))})
    names = open_clip_names(layers).reversed()
    found = {key: _below(prefix + OPEN_CLIP, _our_open_clip(key, names)) for key in keys}
    if prefix == COND_STAGE:  # SD 2 does not use it
        found.pop(f"{_PROJECTION}.weight", None)
    return found


def _our_open_clip(key: str, names: Names) -> str | None:
    if match := _UNFUSED.fullmatch(key):
        return f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"
    whole = {_THEIR_POSITIONS: _POSITIONS, f"{_PROJECTION}.weight": _PROJECTION}
    return whole.get(key) or names.of_key(key)


def _is_clip(key: str) -> bool:
    return key.startswith("text_model.") and not key.endswith(POSITION_IDS)


def _below(prefix: str, key: str | None) -> str | None:
    return None if key is None else prefix + key
