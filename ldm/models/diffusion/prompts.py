"""Conditioning of sampling: encoded prompts, with the maps that the inputs make.

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


class PromptConditioning:
    """Conditioning of a model for prompts, and for the negative prompts that guidance moves away from.

    Args:
        maps: (1, C', h, w), concatenated to the UNet's input in every sample.
        drops_image: the maps are 0 in the conditioning of negative prompts (arXiv:2211.09800, section 3.2.1).

    Raises:
        UserError: the model does not read captions.
    """

    def __init__(self, model: LatentDiffusion, maps: Sequence[Tensor], drops_image: bool) -> None:
        check_reads_captions(model)
        self.model = model
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
        return self.model.get_learned_conditioning(list(prompts))


def _with_maps(encoded: Conditioning, maps: Sequence[Tensor], count: int) -> Conditioning:
    if not maps:
        return encoded
    parts: Mapping[str, Any] = encoded if isinstance(encoded, Mapping) else {"c_crossattn": [encoded]}
    return {"c_concat": [part.expand(count, -1, -1, -1) for part in maps], **parts}
