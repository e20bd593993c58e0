"""Encoder of images to posteriors and depth maps, and of captions to hidden states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint import USED_AUTOENCODER, USED_TOWER, encoder_digests
from ldm.host_copy import HostCopy
from ldm.images.buckets import Size
from ldm.images.transforms import to_range
from ldm.models.diffusion.concat import for_depth_network
from ldm.models.diffusion.latent import LatentDiffusion, check_reads_captions
from ldm.modules.encoders.caption_length import cut_captions
from ldm.modules.encoders.caption_settings import CaptionSettings, caption_settings, follow
from ldm.release.model_family import family_of_model
from ldm.shards.index import EMPTY_CAPTION, ENCODED, FAMILY, ZEROS
from ldm.shards.sample import LEAST_LOGVAR, MOST_LOGVAR
from ldm.util import UserError, refuse_if

_CACHED_CAPTIONS = 2048  # 118 KB per caption and chunk at (77, 768) float16, 318 KB for SDXL


@dataclass(frozen=True)
class CaptionEncoding:
    """Encodings of one caption, float16, by member. `cut_tokens` is its full length if it is truncated, else 0."""

    arrays: dict[str, np.ndarray]
    cut_tokens: int = 0


class _Caption:
    """Encoding of one caption, copied from its batch on first use."""

    def __init__(self, text: str, batch: Mapping[str, HostCopy], index: int, cut_tokens: int) -> None:
        self._text = text
        self._copy: tuple[Mapping[str, HostCopy], int] | None = batch, index
        self._cut_tokens = cut_tokens
        self._encoding: CaptionEncoding | None = None

    def get(self) -> CaptionEncoding:
        copy = self._copy
        if copy is not None:
            batch, index = copy
            # A view would keep the memory of the whole batch.
            arrays = {key: part.get()[index].numpy().copy() for key, part in batch.items()}
            self._encoding = CaptionEncoding(arrays, self._cut_tokens)
            self._copy = None
            refuse_if(
                not all(np.isfinite(array).all() for array in arrays.values()),
                f"caption {self._text!r}: encodes to NaN or infinity; try --precision fp32",
            )
        return self._encoding


class SampleEncoder:
    """Autoencoder, text encoder and depth network, if any, of a `LatentDiffusion`, moved to `device` and `dtype`.

    The UNet is not moved.

    `digests` identifies the weights at their original precision.

    Raises:
        UserError: the model has no text encoder.
    """

    def __init__(self, model: Any, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        check_reads_captions(model)
        self.digests = encoder_digests(model.state_dict())  # before the weights are rounded to `dtype`
        if getattr(model.cond_stage_model, "layer", None) != "penultimate":  # the last block is used
            self.digests.pop(USED_TOWER, None)
        model.first_stage_model.to(device, dtype)
        model.cond_stage_model.to(device, dtype)
        if getattr(model, "depth_model", None) is not None:
            model.depth_model.to(device, dtype)
        self.model = model
        self.device = torch.device(device)
        self.dtype = dtype
        self._captions: OrderedDict[str, _Caption] = OrderedDict()

    @property
    def encoding_identity(self) -> dict[str, Any]:
        """Digests of the whole encoders, and settings of captions. Equal ones encode equally, to resume a set."""
        whole = {name: digest for name, digest in self.digests.items() if name not in (USED_AUTOENCODER, USED_TOWER)}
        return {**whole, **self.caption_settings.entries()}

    @property
    def caption_settings(self) -> CaptionSettings:
        return caption_settings(self.model.cond_stage_model)

    def follow(self, settings: CaptionSettings, whose: str) -> None:
        """Encode captions as those of `whose` set; see `caption_settings.follow`."""
        follow(self.model.cond_stage_model, settings, whose)
        self.forget_captions()

    @property
    def described(self) -> dict[str, Any]:
        """Return the entries of an index for the model: family, encoders, and the encoding of captions."""
        family = family_of_model(self.model) if isinstance(self.model, LatentDiffusion) else None
        zeros = getattr(self.model.cond_stage_model, "empties_to_zeros", False)
        return {
            FAMILY: family and family.key,
            EMPTY_CAPTION: ZEROS if zeros else ENCODED,
            "scale_factor": float(self.model.scale_factor),
            **self.digests,
            **self.caption_settings.entries(),
        }

    def check_sizes(self, sizes: Iterable[Size]) -> None:
        """Raise `UserError` if a size (height, width) is not a multiple of the model's total downsampling."""
        unet = getattr(self.model.model.diffusion_model, "downsampling", 1)
        multiple = self.model.first_stage_model.downsampling * unet
        for height, width in sizes:
            if height % multiple or width % multiple:
                size = f"--size {height}" if height == width else f"--buckets, {height}x{width}"
                raise UserError(f"{size}: height and width must be multiples of {multiple} pixels for this model")

    @torch.inference_mode()
    def images(self, batch: Tensor, masks: Tensor | None = None) -> Tensor:
        """Encode images, uint8 (B, 3, H, W). In [-1, 1], they are set to 0 where `masks` (B, 1, H, W) is 1.

        Returns:
            Posterior parameters (B, 2C, h, w), or latents (B, C, h, w), float16, unscaled, on the device. On a GPU the
            computation may still be running.
        """
        pixels = to_range(self._on_device(batch)).to(self.dtype)
        if masks is not None:
            pixels = pixels.masked_fill(self._on_device(masks).bool(), 0.0)
        encoded = self.model.first_stage_model.encode(pixels)
        values = encoded if isinstance(encoded, Tensor) else encoded.parameters
        values = values.float()
        if not isinstance(encoded, Tensor):
            mean, logvar = values.chunk(2, dim=1)
            # The reader clamps the log-variance in the same way. Without it, a value may not fit in float16.
            values = torch.cat([mean, logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR)], dim=1)
        return values.half()

    def masks(self, masks: Tensor) -> Tensor:
        """Return masks (B, 1, H, W) at the latent's size (B, 1, h, w), float16: the upper left pixel of each cell."""
        step = self.model.first_stage_model.downsampling
        return masks[:, :, ::step, ::step].half()

    @torch.inference_mode()
    def depths(self, batch: Tensor) -> Tensor:
        """Estimate the depth of images, uint8 (B, 3, H, W): (B, 1, h, w) at the latent's size, float16."""
        step = self.model.first_stage_model.downsampling
        pixels = for_depth_network(to_range(self._on_device(batch)))
        return self.model.estimated_depth(pixels, (batch.shape[2] // step, batch.shape[3] // step)).half()

    def _on_device(self, batch: Tensor) -> Tensor:
        """Return the batch on the device."""
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # makes the copy asynchronous
        return batch.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def captions(self, texts: Sequence[str]) -> list[CaptionEncoding]:
        """Return the encodings of `texts`. Recent texts are taken from a cache."""
        return self.captions_later(texts)()

    @torch.inference_mode()
    def captions_later(self, texts: Sequence[str]) -> Callable[[], list[CaptionEncoding]]:
        """Start encoding `texts`. Return a function that any thread may call for the result."""
        new = [text for text in dict.fromkeys(texts) if text not in self._captions]
        if new:
            encodings = self.model.encode_captions(new)
            batch = {key: HostCopy(value.float().half()) for key, value in encodings.items()}
            cut = cut_captions(self.model.cond_stage_model, new)
            self._captions |= {text: _Caption(text, batch, i, cut.get(text, 0)) for i, text in enumerate(new)}
        for text in texts:
            self._captions.move_to_end(text)
        found = [self._captions[text] for text in texts]
        while len(self._captions) > _CACHED_CAPTIONS:
            self._captions.popitem(last=False)
        return lambda: [caption.get() for caption in found]

    def forget_captions(self) -> None:
        """Empty the cache. A batch's rounding depends on its other texts, so results would depend on earlier shards."""
        self._captions.clear()
