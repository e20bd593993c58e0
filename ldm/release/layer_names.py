"""Names of the layers of UNets and text towers in this package, in diffusers, and in the LoRA files of kohya.

The names follow from the keys and shapes of a release alone, for any number of levels and blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ldm.checkpoint.diffusers_keys import OPEN_CLIP_BLOCK, TEXT_1, TEXT_2, UNET_OUTSIDE, UNET_PART, unet_names
from ldm.checkpoint.keys import COND_STAGE, CONDITIONER, TOWERS, UNET, has_part
from ldm.release.recognition import Shapes

# Prefixes of kohya's names, by part: for releases with one text tower, and for SDXL.
_ONE_TOWER = {UNET_PART: "lora_unet_", TEXT_1: "lora_te_"}
_TWO_TOWERS = {UNET_PART: "lora_unet_", TEXT_1: "lora_te1_", TEXT_2: "lora_te2_"}
PREFIXES = {prefix: part for table in (_ONE_TOWER, _TWO_TOWERS) for part, prefix in table.items()}

# Layers of a text tower: of CLIP, whose names diffusers has, and of OpenCLIP.
_CLIP = re.compile(r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")
_OPEN_CLIP = re.compile(r"transformer\.resblocks\.(\d+)\.(attn\.in_proj_weight|(?:attn|mlp)\.\w+\.weight)")


@dataclass(frozen=True)
class Layer:
    """Matrix of a release that a LoRA can change.

    Args:
        key: key of the weight.
        shape: shape of the layer: the whole weight, or the rows of `rows`.
        part: `unet`, `text_encoder` or `text_encoder_2`.
        paths: path of the module in its part, in this package and in diffusers. A text encoder has the same path twice.
        rows: for a weight that holds several layers, the layer's first row and the row after its last.
    """

    key: str
    shape: tuple[int, ...]
    part: str
    paths: tuple[str, str]
    rows: tuple[int, int] | None = None

    @property
    def flat_names(self) -> set[str]:
        """Names by which files tell the layer from others of its part, with underscores for dots."""
        return {flat(path) for path in self.paths}

    @property
    def is_outside(self) -> bool:
        """True for the UNet's first and last convolution and its embeddings, which kohya's files do not hold."""
        return self.part == UNET_PART and self.paths[0] in UNET_OUTSIDE

    @property
    def block(self) -> str:
        """Name of the block for a report: of the UNet's blocks, or the part."""
        if self.part != UNET_PART:
            return self.part
        first, second = self.paths[0].split(".")[:2]
        return f"{first}.{second}" if first.endswith("_blocks") else first


def flat(path: str) -> str:
    """Return `path` with underscores for dots."""
    return path.replace(".", "_")


def layers_of(shapes: Shapes) -> list[Layer]:
    """Return the layers of a release whose keys have these `shapes`: matrices and convolutions, without embeddings."""
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    return [*_unet_layers(shapes), *_text_layers(shapes)]


def kohya_names(layers: Iterable[Layer], keys: Iterable[str]) -> dict[Layer, str]:
    """Return the names of `layers` in kohya's files, for a release with these `keys`.

    UNets of SDXL have the names of this package there, and all others those of diffusers.
    """
    keys = list(keys)
    has_vector = has_part(keys, f"{UNET}label_emb.0.") and not has_part(keys, COND_STAGE)
    is_xl = has_part(keys, CONDITIONER) or has_vector
    prefixes = _TWO_TOWERS if is_xl else _ONE_TOWER
    return {layer: prefixes[layer.part] + flat(layer.paths[0 if is_xl else 1]) for layer in layers}


def _unet_layers(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layer]:
    paths = {
        key: key.removeprefix(UNET).removesuffix(".weight")
        for key, shape in shapes.items()
        if key.startswith(UNET) and key.endswith(".weight") and len(shape) in (2, 4)
    }
    theirs = diffusers_paths([key.removeprefix(UNET) for key in shapes if key.startswith(UNET)])
    for key, path in paths.items():
        yield Layer(key, shapes[key], UNET_PART, (path, theirs(path)))


def diffusers_paths(keys: Iterable[str]) -> Callable[[str], str]:
    """Return a function from the path of a module to diffusers' path, for a UNet with these `keys` below its prefix."""
    names = unet_names(keys)
    return lambda path: names(path) or path


def _text_layers(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layer]:
    for prefix, part in ((COND_STAGE, TEXT_1), (TOWERS[0], TEXT_1), (TOWERS[1], TEXT_2)):
        for key, shape in shapes.items():
            if not key.startswith(prefix):
                continue
            path = key.removeprefix(prefix)
            if path.endswith(".weight") and _CLIP.fullmatch(clip := path[:-7].removeprefix("transformer.")):
                yield Layer(key, shape, part, (clip, clip))
            elif match := _OPEN_CLIP.fullmatch(path.removeprefix("model.")):
                yield from _open_clip_layers(key, shape, part, int(match[1]), match[2])


def _open_clip_layers(key: str, shape: tuple[int, ...], part: str, number: int, name: str) -> Iterator[Layer]:
    """Yield the layers in a weight of OpenCLIP. The first projection holds those of q, k and v."""
    above = f"text_model.encoder.layers.{number}"
    if name == "attn.in_proj_weight":
        size = shape[0] // 3
        for place, letter in enumerate("qkv"):
            path = f"{above}.self_attn.{letter}_proj"
            yield Layer(key, (size, *shape[1:]), part, (path, path), (place * size, (place + 1) * size))
    elif (own := name.removesuffix(".weight")) in OPEN_CLIP_BLOCK:
        path = f"{above}.{OPEN_CLIP_BLOCK[own]}"
        yield Layer(key, shape, part, (path, path))
