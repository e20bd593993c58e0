"""A model for tests of pre-encoding that costs nothing, and images for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from ldm.data.image_sources import find_images
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.image_stream import open_images
from ldm.encoding.preencode import preencode


class FirstStage(nn.Module):
    """Eight channels of eighth-size means; counts its images."""

    downsampling = 8

    def __init__(self, scale: float = 1.0, posterior: bool = True) -> None:
        super().__init__()
        self.scale, self.posterior, self.calls = scale, posterior, []

    def encode(self, x):
        self.calls.append(len(x))
        pooled = nn.functional.avg_pool2d(x, 8) * self.scale
        if not self.posterior:
            return torch.cat([pooled, pooled[:, :1]], 1)
        return SimpleNamespace(parameters=torch.cat([pooled, pooled[:, :1], pooled - 100, pooled[:, :1] + 50], 1))


class Model:
    """What `Encoder` uses of a LatentDiffusion."""

    scale_factor = 0.5

    def __init__(self, **options) -> None:
        self.first_stage_model = FirstStage(**options)
        self.cond_stage_model = nn.Identity()
        self.model = SimpleNamespace(diffusion_model=SimpleNamespace(downsampling=2))
        self.texts = []

    def state_dict(self):
        return self.first_stage_model.state_dict(prefix="first_stage_model.")

    def get_learned_conditioning(self, texts):
        self.texts += texts
        return torch.stack([torch.full((7, 6), float(len(text) + 1)) for text in texts])

    def encode_captions(self, texts):
        return {"t5": self.get_learned_conditioning(texts)}


def image(path, size=(20, 16), colour=(255, 0, 0), caption="a cat"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = colour  # left and right differ, so that a mirror image shows
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def run(folder, out, model=None, caption=None, pairs=False, stream=False, **options):
    model = model or Model()
    options = {"size": 16, "batch_size": 2, "shard_size": 3, **options}
    chosen = [folder] if stream else folder, caption, pairs, False, options.get("loss_masks", False)
    items = open_images(list(map(str, chosen[0])), *chosen[1:]) if stream else find_images(*chosen)
    return preencode(SampleEncoder(model), items, str(out), **options), model
