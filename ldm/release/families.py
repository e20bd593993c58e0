"""Families of released checkpoints: a table, and recognition of a file's family from its keys and shapes.

To add a family, add an entry to `_ROWS` and a release config.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.checkpoint.keys import COND_STAGE, CONDITIONER, UNET, V_PREDICTION, ZERO_SNR, has_part, with_ema_as_weights
from ldm.util import UserError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[int]]
Difference = tuple[Shape | None, Shape | None]  # shape in the file, and in the family; None if the key is missing

PARAMETERIZATIONS = ("eps", "v")
_WORDS = {"eps": "predicts the noise", "v": "predicts v"}
_FIRST = "input_blocks.0.0.weight"
_CONTEXT = "attn2.to_k.weight"
_MIDDLE = "middle_block.1.proj_in.weight"
_LABELS = "label_emb."
_TOKENS = "token_embedding.weight"
_SHOWN = 3  # number of keys in a message
# Keys that distinguish the families.
_DISTINGUISHING = re.compile(
    rf"{re.escape(UNET)}(?:{re.escape(_FIRST)}|{re.escape(_MIDDLE)}|.*\.{re.escape(_CONTEXT)}"
    rf"|{re.escape(_LABELS)}(?:.*\.)?weight)"
    rf"|(?:{re.escape(COND_STAGE)}|{re.escape(CONDITIONER)}).*{re.escape(_TOKENS)}"
)


@dataclass(frozen=True)
class Layout:
    """Sizes of a UNet and of its text towers. They determine the keys and shapes that distinguish the families.

    `widths` and `depths` have one entry per level: the channels, and the transformer blocks after each residual block.
    `towers` maps the key of each text tower's token embedding to its width.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    context: int  # features of the caption embedding
    linear: bool  # the projections around transformer blocks are linear layers, else convolutions
    towers: Mapping[str, int]
    vector: int = 0  # features of the vector conditioning; 0 for none
    res_blocks: int = 2

    def transformers(self) -> Iterator[tuple[str, int, int]]:
        """Yield the place, the channels and the depth of each spatial transformer."""
        number = 0
        for level, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for _ in range(self.res_blocks):
                number += 1
                yield f"input_blocks.{number}.1", width, depth
            number += level < len(self.widths) - 1  # the downsampling block
        yield "middle_block.1", self.widths[-1], self.middle_depth
        number = 0
        for width, depth in zip(reversed(self.widths), reversed(self.depths), strict=True):
            for _ in range(self.res_blocks + 1):
                yield f"output_blocks.{number}.1", width, depth
                number += 1

    def unet_shapes(self, in_channels: int) -> dict[str, Shape]:
        """Return the shapes of the UNet's tensors that distinguish the families, by key."""
        width, middle, embedding = self.widths[0], self.widths[-1], 4 * self.widths[0]
        shapes = {UNET + _FIRST: (width, in_channels, 3, 3)}
        for place, channels, depth in self.transformers():
            for block in range(depth):
                shapes[f"{UNET}{place}.transformer_blocks.{block}.{_CONTEXT}"] = (channels, self.context)
        shapes[UNET + _MIDDLE] = (middle, middle) if self.linear else (middle, middle, 1, 1)
        if self.vector:
            shapes[f"{UNET}{_LABELS}0.0.weight"] = (embedding, self.vector)
            shapes[f"{UNET}{_LABELS}0.2.weight"] = (embedding, embedding)
        return shapes


_CLIP = f"transformer.text_model.embeddings.{_TOKENS}"
_OPEN_CLIP = f"model.{_TOKENS}"
_VOCABULARY = 49_408
_FOUR_LEVELS = {"widths": (320, 640, 1280, 1280), "depths": (1, 1, 1, 0), "middle_depth": 1}
_V1 = Layout(**_FOUR_LEVELS, context=768, linear=False, towers={COND_STAGE + _CLIP: 768})
_V2 = Layout(**_FOUR_LEVELS, context=1024, linear=True, towers={COND_STAGE + _OPEN_CLIP: 1024})
_XL = Layout(
    widths=(320, 640, 1280), depths=(0, 2, 10), middle_depth=10, context=2048, linear=True, vector=2816,
    towers={f"{CONDITIONER}embedders.0.{_CLIP}": 768, f"{CONDITIONER}embedders.1.{_OPEN_CLIP}": 1280},
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Row of the table of families.

    Args:
        key: identifier for files and programs.
        name: name for messages.
        layout: sizes of the networks.
        size: side of the training images in pixels.
        config, finetune_config: file names in `configs/latent-diffusion/`; None if there is no such file.
        in_channels: input channels of the UNet: the noisy latent and the concatenated maps.
        encoders: key prefix of the text encoders.
        conditioning_key: as for `DiffusionWrapper`.
        parameterization: prediction of the UNet, `eps` or `v`.
        zero_snr: True if the schedule has zero terminal SNR.
        scale: factor of the latents.
        factor: pixels per latent cell along each side.
        channels: channels of a latent.
    """

    key: str
    name: str
    layout: Layout
    size: int
    config: str
    finetune_config: str | None = None
    in_channels: int = 4
    encoders: str = COND_STAGE
    conditioning_key: str = "crossattn"
    parameterization: str = "eps"
    zero_snr: bool = False
    scale: float = 0.18215
    factor: int = 8
    channels: int = 4

    @property
    def has_vector(self) -> bool:
        """True if the UNet also takes a conditioning vector, such as SDXL's pooled caption embedding and sizes."""
        return self.layout.vector > 0

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by which the family is recognised, by key."""
        towers = {key: (_VOCABULARY, width) for key, width in self.layout.towers.items()}
        return {**self.layout.unet_shapes(self.in_channels), **towers}

    @property
    def overrides(self) -> list[str]:
        """Config values `a.b.c=value` in which a recognised checkpoint differs from `config`."""
        row, values = FAMILIES[self.key], []
        if self.parameterization != row.parameterization:
            values.append(f"model.params.parameterization={self.parameterization}")
        if self.zero_snr != row.zero_snr:
            values.append(f"model.params.rescale_betas_zero_snr={str(self.zero_snr).lower()}")
        return values

    def described(self) -> str:
        """Return the name, the image size and the parameterization for a log line."""
        ending = ", with zero terminal SNR" if self.zero_snr else ""
        return f"{self.name} ({self.size} pixels, {_WORDS[self.parameterization]}{ending})"


_HYBRID = {"conditioning_key": "hybrid"}
_OF_XL = {"encoders": CONDITIONER, "scale": 0.13025}
_ROWS = [
    Family("sd1", "Stable Diffusion 1", _V1, 512, "stable_diffusion_v1.yaml", "finetune_stable_diffusion.yaml"),
    Family("sd1_inpainting", "Stable Diffusion 1 inpainting", _V1, 512, "stable_diffusion_v1_inpainting.yaml",
           in_channels=9, **_HYBRID),
    Family("instruct_pix2pix", "InstructPix2Pix", _V1, 512, "instruct_pix2pix.yaml", in_channels=8, **_HYBRID),
    # Of rows with the same keys, the first is the default.
    Family("sd2_768_v", "Stable Diffusion 2 768-v", _V2, 768, "stable_diffusion_v2_768_v.yaml",
           "finetune_stable_diffusion_v2_768_v.yaml", parameterization="v"),
    Family("sd2_base", "Stable Diffusion 2 base", _V2, 512, "stable_diffusion_v2_base.yaml",
           "finetune_stable_diffusion_v2_base.yaml"),
    Family("sd2_inpainting", "Stable Diffusion 2 inpainting", _V2, 512, "stable_diffusion_v2_inpainting.yaml",
           in_channels=9, **_HYBRID),
    Family("sd2_depth", "Stable Diffusion 2 depth", _V2, 512, "stable_diffusion_v2_depth.yaml", in_channels=5,
           **_HYBRID),
    Family("sdxl", "Stable Diffusion XL", _XL, 1024, "stable_diffusion_xl.yaml", conditioning_key="crossattn-adm",
           **_OF_XL),
    Family("sdxl_inpainting", "Stable Diffusion XL inpainting", _XL, 1024, "stable_diffusion_xl_inpainting.yaml",
           in_channels=9, conditioning_key="hybrid-adm", **_OF_XL),
]  # fmt: skip
FAMILIES = {family.key: family for family in _ROWS}


def shapes_of(weights: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape of each value that has one, by key."""
    return {key: tuple(value.shape) for key, value in weights.items() if hasattr(value, "shape")}


def recognise(
    shapes: Shapes,
    *,
    source: str = "the checkpoint",
    parameterization: str | None = None,
    size: int | None = None,
) -> Family:
    """Return the family of a checkpoint whose keys have these `shapes`, and log it.

    All keys may have one additional prefix. A UNet alone, EMA weights alone, and a model without text encoders are
    recognised as well.

    Families that differ only in parameterization have the same keys. Among them, the choice is made by
    `parameterization` first, then by the marker keys of v-prediction and zero terminal SNR, then by the size nearest to
    `size`. Without any of these, it is the family with the largest images.

    Args:
        source: name of the checkpoint in messages.
        parameterization: prediction of the UNet, `eps` or `v`.
        size: side in pixels of the images to sample or to train on.

    Raises:
        UserError: no family has these keys and shapes, or `parameterization` is neither `eps` nor `v`.
    """
    if parameterization not in (None, *PARAMETERIZATIONS):
        raise UserError(f"parameterization {parameterization!r}: choose {' or '.join(PARAMETERIZATIONS)}")
    differing = _differences(_by_whole_keys(shapes))
    matching = [family for family in _ROWS if not differing[family.key]]
    if not matching:
        nearest = min(_ROWS, key=lambda family: _distance(differing[family.key]))
        raise UserError(
            f"{source}: no family matches these weights; the nearest is {nearest.name}, which differs in "
            f"{_listed(differing[nearest.key])}; name a matching config with --config"
        )
    chosen = _with_prediction(matching, shapes, parameterization, size)
    log.info("%s: %s", source, chosen.described())
    others = [family.described() for family in matching if family.key != chosen.key]
    if others and parameterization is None and V_PREDICTION not in shapes:
        log.info(
            "%s: %s has the same keys; if the file is of that family, give --config %s",
            source,
            " and ".join(others),
            next(family.config for family in matching if family.key != chosen.key),
        )
    return chosen


def _with_prediction(
    matching: Sequence[Family], shapes: Shapes, parameterization: str | None, size: int | None
) -> Family:
    """Return the family of `matching` that `recognise` chooses by parameterization, markers or size."""
    wanted = parameterization or ("v" if V_PREDICTION in shapes else None)
    if wanted is None:
        return matching[0] if size is None else min(matching, key=lambda family: abs(family.size - size))
    chosen = next((family for family in matching if family.parameterization == wanted), matching[0])
    return replace(chosen, parameterization=wanted, zero_snr=wanted == "v" and ZERO_SNR in shapes)


def _by_whole_keys(shapes: Shapes) -> dict[str, Sequence[int]]:
    """Return `shapes` under the keys of a whole model. EMA weights replace missing weights.

    A common outer prefix is removed. The keys of a UNet alone get the prefix `model.diffusion_model.`.
    """
    firsts = [key.removesuffix(_FIRST) for key in shapes if key.endswith(_FIRST)]
    outer = next((prefix.removesuffix(UNET) for prefix in firsts if prefix.endswith(UNET)), None)
    alone = next((prefix for prefix in firsts if prefix in ("", UNET.split(".", 1)[1])), None)
    if outer is not None:
        return {key.removeprefix(outer): shape for key, shape in shapes.items()}
    if alone is not None:
        return {UNET + key.removeprefix(alone): shape for key, shape in shapes.items() if key.startswith(alone)}
    return with_ema_as_weights(shapes, dict.fromkeys(key for family in _ROWS for key in family.shapes))


def _differences(shapes: Shapes) -> dict[str, dict[str, Difference]]:
    """Return, for each family, the distinguishing keys at which `shapes` differ.

    Text encoders are compared only if `shapes` has any.
    """
    has_encoders = has_part(shapes, COND_STAGE) or has_part(shapes, CONDITIONER)
    found = {key: tuple(shape) for key, shape in shapes.items() if _DISTINGUISHING.fullmatch(key)}
    result = {}
    for family in _ROWS:
        expected = {key: shape for key, shape in family.shapes.items() if has_encoders or key.startswith(UNET)}
        keys = dict.fromkeys((*expected, *found))
        pairs = {key: (found.get(key), expected.get(key)) for key in keys}
        result[family.key] = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return result


def _distance(differences: Mapping[str, Difference]) -> float:
    """Return the number of differing keys. A key of another shape counts as the share of its dimensions that differ."""
    return sum(_share(found, expected) for found, expected in differences.values())


def _share(found: Shape | None, expected: Shape | None) -> float:
    if found is None or expected is None or len(found) != len(expected):
        return 1.0
    return sum(one != other for one, other in zip(found, expected, strict=True)) / len(found)


def _listed(differences: Mapping[str, Difference]) -> str:
    """Return the first differing keys and their shapes as text."""
    shown = [
        f"{key} (found {found or 'none'}, expected {expected or 'none'})"
        for key, (found, expected) in list(differences.items())[:_SHOWN]
    ]
    more = f", … ({len(differences)} keys)" if len(differences) > _SHOWN else ""
    return ", ".join(shown) + more
