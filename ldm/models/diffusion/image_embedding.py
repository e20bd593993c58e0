"""Latent diffusion conditioned on the embedding of an image beside the caption (Stable unCLIP, arXiv:2204.06125).

B: batch. C, H, W: channels, height and width of an image. E: features of its embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.random_streams import RandomStreams
from ldm.util import UserError, check_number, instantiate_from_config, refuse_if


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """Model of image variations. Its vector `c_adm` is the image's embedding, with noise and the level of the noise.

    Args:
        embedder_config: `target` and `params` of the image tower, (B, 3, H, W) in [-1, 1] → (B, E).
        embedding_key: batch entry of the images (B, H, W, 3) in [-1, 1].
        embedding_dropout: share of vectors that training sets to 0.
        freeze_embedder: do not train the image tower; must be true.
        noise_aug_config: `target` and `params` of the stage that adds noise, (B, E) → (noisy (B, E), level (B, L)).
            None adds no noise and no level.
    """

    def __init__(
        self,
        embedder_config: Mapping[str, Any],
        embedding_key: str = "jpg",
        embedding_dropout: float = 0.5,
        freeze_embedder: bool = True,
        noise_aug_config: Mapping[str, Any] | None = None,
        conditioning_key: str | None = "crossattn-adm",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        check_number("embedding_dropout", embedding_dropout, least=0, most=1, whole=False)
        refuse_if(not freeze_embedder, "freeze_embedder false: the image tower is not trained here; set it to true")
        refuse_if(
            conditioning_key != "crossattn-adm",
            f"conditioning_key {conditioning_key!r}: must be 'crossattn-adm' for {type(self).__name__}",
        )
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.embedding_key, self.embedding_dropout = embedding_key, embedding_dropout
        self.embedder = instantiate_from_config(embedder_config).requires_grad_(False).eval()
        self.noise_augmentor = None
        if noise_aug_config is not None:
            self.noise_augmentor = instantiate_from_config(noise_aug_config).requires_grad_(False).eval()
        if ckpt_path is not None:  # after both stages, so that their weights are loaded too
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def train(self, mode: bool = True) -> ImageEmbeddingConditionedLatentDiffusion:
        super().train(mode)
        for name in ("embedder", "noise_augmentor"):
            stage = getattr(self, name, None)  # the base constructor calls `train` first
            if stage is not None:
                stage.eval()
        return self

    @torch.no_grad()
    def image_vector(self, batch: Batch) -> Tensor:
        """Return the vector `c_adm` (B, E + L) of the images in a batch. Training sets some to 0."""
        images = batch_entry(batch, self.embedding_key)
        if self.is_pre_encoded(images):
            raise UserError(
                f"embedding_key {self.embedding_key!r}: has shape {tuple(images.shape)}, but the image tower needs "
                "images (B, H, W, 3); train from images, or name another entry"
            )
        streams = RandomStreams.of(batch)
        vector = self.embedder(self.get_input(batch, self.embedding_key))
        if self.noise_augmentor is not None:
            levels = streams.integers("embedding/level", self.noise_augmentor.max_noise_level, vector)
            noise = streams.normal("embedding/noise", vector)
            vector = torch.cat(self.noise_augmentor(vector, levels, noise), dim=1)
        if self.training and self.embedding_dropout:
            kept = streams.uniform("embedding/dropout", vector) >= self.embedding_dropout
            vector = vector * kept[:, None]
        return vector

    def _with_maps(self, encoded: Conditioning, batch: Batch) -> Conditioning:
        return {"c_crossattn": [encoded], "c_adm": self.image_vector(batch)}
