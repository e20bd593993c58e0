"""Cond stages under the names in configs. Each turns a batch entry into the UNet's conditioning."""

from ldm.modules.encoders.bert import BERTEmbedder, TransformerEmbedder
from ldm.modules.encoders.clip_image import (
    ClipImageEmbedder,
    FaceClipEncoder,
    FrozenCLIPImageEmbedder,
    FrozenClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from ldm.modules.encoders.clip_text import FrozenCLIPEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.cond_stages import AbstractEncoder, ClassEmbedder, DummyEncoder, IdentityEncoder
from ldm.modules.encoders.conditioner import ConcatTimestepEmbedderND, GeneralConditioner
from ldm.modules.encoders.embedding_noise import CLIPEmbeddingNoiseAugmentation
from ldm.modules.encoders.face import FaceIdClipEncoder, FrozenFaceEncoder
from ldm.modules.encoders.open_clip import FrozenOpenCLIPEmbedder, FrozenOpenCLIPEmbedder2
from ldm.modules.encoders.spatial import LowScaleEncoder, SpatialRescaler
from ldm.modules.encoders.t5 import FrozenT5Embedder

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "CLIPEmbeddingNoiseAugmentation",
    "ClassEmbedder",
    "ClipImageEmbedder",
    "ConcatTimestepEmbedderND",
    "DummyEncoder",
    "FaceClipEncoder",
    "FaceIdClipEncoder",
    "FrozenCLIPEmbedder",
    "FrozenCLIPImageEmbedder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenFaceEncoder",
    "FrozenOpenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder2",
    "FrozenOpenCLIPImageEmbedder",
    "FrozenT5Embedder",
    "GeneralConditioner",
    "IdentityEncoder",
    "LowScaleEncoder",
    "SpatialRescaler",
    "TransformerEmbedder",
]
