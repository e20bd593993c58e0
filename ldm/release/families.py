"""Table of the families of released checkpoints.

To add a family, add an entry to `_ROWS`, a release config and a finetune config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ldm.checkpoint.keys import COND_STAGE, CONDITIONER, TOWERS, UNET

Shape = tuple[int, ...]

PARAMETERIZATIONS = ("eps", "v")
_WORDS = {"eps": "predicts the noise", "v": "predicts v"}
FIRST = "input_blocks.0.0.weight"
_CONTEXT = "attn2.to_k.weight"
_MIDDLE = "middle_block.1.proj_in.weight"
_LABELS = "label_emb."
_TOKENS = "token_embedding.weight"
# Keys that distinguish the families.
DISTINGUISHING = re.compile(
    rf"{re.escape(UNET)}(?:{re.escape(FIRST)}|{re.escape(_MIDDLE)}|.*\.{re.escape(_CONTEXT)}"
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
        shapes = {UNET + FIRST: (width, in_channels, 3, 3)}
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
    towers={TOWERS[0] + _CLIP: 768, TOWERS[1] + _OPEN_CLIP: 1280},
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Row of the table of families.

    Args:
        key: identifier for files and programs.
        name: name for messages.
        layout: sizes of the networks.
        size: side of the training images in pixels.
        config, finetune_config: file names in `configs/latent-diffusion/`.
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
    finetune_config: str
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
           "finetune_stable_diffusion_v1_inpainting.yaml", in_channels=9, **_HYBRID),
    Family("instruct_pix2pix", "InstructPix2Pix", _V1, 512, "instruct_pix2pix.yaml", "finetune_instruct_pix2pix.yaml",
           in_channels=8, **_HYBRID),
    # Of rows with the same keys, the first is the default.
    Family("sd2_768_v", "Stable Diffusion 2 768-v", _V2, 768, "stable_diffusion_v2_768_v.yaml",
           "finetune_stable_diffusion_v2_768_v.yaml", parameterization="v"),
    Family("sd2_base", "Stable Diffusion 2 base", _V2, 512, "stable_diffusion_v2_base.yaml",
           "finetune_stable_diffusion_v2_base.yaml"),
    Family("sd2_inpainting", "Stable Diffusion 2 inpainting", _V2, 512, "stable_diffusion_v2_inpainting.yaml",
           "finetune_stable_diffusion_v2_inpainting.yaml", in_channels=9, **_HYBRID),
    Family("sd2_depth", "Stable Diffusion 2 depth", _V2, 512, "stable_diffusion_v2_depth.yaml",
           "finetune_stable_diffusion_v2_depth.yaml", in_channels=5, **_HYBRID),
    Family("sdxl", "Stable Diffusion XL", _XL, 1024, "stable_diffusion_xl.yaml", "finetune_stable_diffusion_xl.yaml",
           conditioning_key="crossattn-adm", **_OF_XL),
    Family("sdxl_inpainting", "Stable Diffusion XL inpainting", _XL, 1024, "stable_diffusion_xl_inpainting.yaml",
           "finetune_stable_diffusion_xl_inpainting.yaml", in_channels=9, conditioning_key="hybrid-adm", **_OF_XL),
]  # fmt: skip
FAMILIES = {family.key: family for family in _ROWS}
