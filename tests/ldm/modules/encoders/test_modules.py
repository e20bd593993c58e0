"""The names of cond stages that configs give."""

from __future__ import annotations

import pytest

from ldm.modules.encoders import modules
from ldm.util import get_obj_from_str


@pytest.mark.parametrize(
    "name",
    [
        "BERTEmbedder",
        "ClassEmbedder",
        "ConcatTimestepEmbedderND",
        "DummyEncoder",
        "FrozenCLIPEmbedder",
        "FrozenCLIPImageEmbedder",
        "FrozenCLIPTextEmbedder",
        "FrozenClipImageEmbedder",
        "FrozenOpenCLIPEmbedder",
        "FrozenOpenCLIPEmbedder2",
        "GeneralConditioner",
        "LowScaleEncoder",
        "SpatialRescaler",
        "TransformerEmbedder",
    ],
)
def test_modules_names_what_configs_name(name: str) -> None:
    found = get_obj_from_str(f"ldm.modules.encoders.modules.{name}")
    assert issubclass(found, modules.AbstractEncoder) or name == "LowScaleEncoder"
    assert name in modules.__all__
