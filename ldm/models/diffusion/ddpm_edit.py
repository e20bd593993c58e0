"""InstructPix2Pix (arXiv:2211.09800): editing of an image by a caption, with dropout of both conditionings.

B: batch. H, W: height and width of an image. C, h, w: channels, height and width of its latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.concat import LatentFinetuneDiffusion, check_map
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.random_streams import RandomStreams
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import check_number


class LatentDiffusion(LatentFinetuneDiffusion):
    """Latent diffusion of an edited image, conditioned on the caption and on the latent of the original image.

    Images are (B, 3, H, W) in [-1, 1]. The entry `cond_stage_key` is a mapping with the original images under
    `c_concat` and the captions under `c_crossattn`. In pre-encoded batches, the first of `concat_keys` is the posterior
    or latent of the original image, and the cond stage reads the caption embeddings; the data module drops both.

    Args:
        dropout: share of samples without their caption; also of those without their image, and of those without both.
    """

    default_concat_keys = ("edit",)

    def __init__(self, dropout: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("dropout", dropout, least=0, most=1 / 3, whole=False)  # the three shares add up to at most 1
        self.dropout = dropout

    def get_input(self, batch: Batch, k: str) -> Tensor:
        """Return the images `batch[k]` (B, 3, H, W), float32."""
        return batch_entry(batch, k).float()

    def _has_pairs(self, batch: Batch) -> bool:
        return isinstance(batch.get(self.cond_stage_key), Mapping)

    def raw_conditioning(self, batch: Batch) -> Any:
        return batch[self.cond_stage_key]["c_crossattn"] if self._has_pairs(batch) else super().raw_conditioning(batch)

    def concatenated(self, batch: Batch) -> list[Tensor]:
        """Return the mode of the original image's latent, unscaled."""
        if self._has_pairs(batch):
            encoded = self.encode_first_stage(batch[self.cond_stage_key]["c_concat"].float())
        else:
            encoded = self.encode_batch({self.first_stage_key: batch_entry(batch, self.concat_keys[0])})
        return [encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded]

    def check_batch_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        # In released configs, `cond_stage_key` names the pair: in stored samples it is the image, not the caption.
        super().check_batch_shapes({key: shape for key, shape in shapes.items() if key not in self.concat_keys})
        check_map(self.concat_keys[0], shapes, (self.channels, 2 * self.channels))
        self.check_input_channels(shapes)

    def encode_conditioning(self, batch: Batch) -> Conditioning:
        """Return the conditioning of a batch, for image pairs without the captions and images of random samples.

        A number r is sampled uniformly per sample. With u = `dropout`, the caption is dropped for r < 2u, and the image
        for u ≤ r < 3u (section 3.2.1). In pre-encoded batches, the data module has dropped them.
        """
        cond = super().encode_conditioning(batch)
        if not self._has_pairs(batch):
            return cond
        (image,), (text,) = cond["c_concat"], cond["c_crossattn"]
        r, u = RandomStreams.of(batch).uniform("edit", image), self.dropout  # (B,)
        drops_text, drops_image = r < 2 * u, (r >= u) & (r < 3 * u)
        image = torch.where(drops_image[:, None, None, None], 0.0, image)
        if self.reads_captions:
            text = torch.where(drops_text[:, None, None], self.get_learned_conditioning([""]), text)
        return {"c_concat": [image], "c_crossattn": [text]}

    def is_pre_encoded(self, x: Tensor) -> bool:
        return x.ndim == 4 and x.shape[1] != 3

    def encode_batch(self, batch: Batch) -> DiagonalGaussianDistribution | Tensor:
        x = batch_entry(batch, self.first_stage_key)
        return super().encode_batch(batch) if self.is_pre_encoded(x) else self.encode_first_stage(x.float())
