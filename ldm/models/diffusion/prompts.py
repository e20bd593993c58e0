"""Conditioning of sampling: encoded prompts, with the maps and image sizes that the inputs make.

B: batch. C', h, w: channels, height and width of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import check_reads_captions
from ldm.models.diffusion.guidance import Conditioning, concatenate
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.shards.sample import CROP, ORIGINAL_SIZE, SIZE_ENTRIES, TARGET_SIZE
from ldm.util import refuse_if


class PromptConditioning:
    """Conditioning of a model for prompts, and for the negative prompts that guidance moves away from.

    Args:
        sizes: of images, by their names in a sample; see `image_sizes`.
        maps: (1, C', h, w), concatenated to the UNet's input in every sample.
        drops_image: the maps are 0 in the conditioning of negative prompts (arXiv:2211.09800, section 3.2.1).
        captions: encodings of the prompts by prompt and member of a sample, in place of the model's text encoder.

    Raises:
        UserError: the model does not read captions.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        sizes: Mapping[str, Sequence[int]] | None = None,
        maps: Sequence[Tensor] = (),
        drops_image: bool = False,
        captions: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        if captions is None:
            check_reads_captions(model)
        self.model = model
        self.captions = captions
        self.sizes = sizes or {}
        self.maps = list(maps)
        self.negative_maps = [torch.zeros_like(part) for part in maps] if drops_image else self.maps
        self._negatives: dict[str, Conditioning] = {}  # by prompt, for a batch of one

    def of(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of a batch of prompts."""
        return _with_maps(self._encoded(prompts), self.maps, len(prompts))

    def of_negatives(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of a batch of negative prompts. Each prompt is encoded once."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._negatives:
                self._negatives[prompt] = self._encoded([prompt])
        encoded = concatenate(*(self._negatives[prompt] for prompt in prompts))
        return _with_maps(encoded, self.negative_maps, len(prompts))

    def _encoded(self, prompts: Sequence[str]) -> Conditioning:
        sizes = {
            entry: torch.tensor([self.sizes[name]] * len(prompts))
            for entry, name in SIZE_ENTRIES.items()
            if name in self.sizes
        }
        encodings = self.model.encode_captions(prompts) if self.captions is None else self._stored(prompts)
        return self.model.stored_conditioning({**encodings, **sizes})

    def _stored(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the encodings of `captions` for a batch of prompts, by member."""
        rows = [self.captions[prompt] for prompt in prompts]
        return {member: torch.stack([row[member] for row in rows]).to(self.model.device) for member in rows[0]}


def image_sizes(model: LatentDiffusion, given: Mapping[str, Sequence[int]], height: int, width: int) -> dict[str, Any]:
    """Return the sizes that condition a model like SDXL (arXiv:2307.01952, section 2.2), by name in a sample.

    By default, the original and the target size are the `height` and `width` of the sampled image, and the crop begins
    at its corner. Other models have no sizes.

    Raises:
        UserError: sizes are given, but the model is not conditioned on them.
    """
    entries = getattr(model.cond_stage_model, "other_keys", ())
    if not any(entry in SIZE_ENTRIES for entry in entries):
        refuse_if(
            given, "--original-size, --crop and --target-size: this model is not conditioned on sizes; leave them out"
        )
        return {}
    defaults = {ORIGINAL_SIZE: (height, width), CROP: (0, 0), TARGET_SIZE: (height, width)}
    return {name: tuple(given.get(name, default)) for name, default in defaults.items()}


def _with_maps(encoded: Conditioning, maps: Sequence[Tensor], count: int) -> Conditioning:
    if not maps:
        return encoded
    parts: Mapping[str, Any] = encoded if isinstance(encoded, Mapping) else {"c_crossattn": [encoded]}
    return {"c_concat": [part.expand(count, -1, -1, -1) for part in maps], **parts}
