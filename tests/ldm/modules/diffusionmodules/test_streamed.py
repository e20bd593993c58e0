"""The UNet with visiting weights computes what the resident one does, and leaves nothing on the device."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.streamed import StreamedUNetModel
from ldm.util import UserError
from tests.golden_data import case, fill_seeded
from tests.ldm.modules.diffusionmodules.test_openaimodel import SDXL, TINY, UNETS, inputs


def streamed(name: str, **kwargs: object) -> StreamedUNetModel:
    return fill_seeded(StreamedUNetModel(**case(name)["params"] | {"use_checkpoint": False} | kwargs))


@pytest.mark.parametrize("name", UNETS)
def test_gradients_and_keys_are_the_resident_models(name: str) -> None:
    plain, ours = fill_seeded(UNetModel(**case(name)["params"])), streamed(name, stream_dtype="fp32")
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    for model in (plain, ours):
        for _ in range(2):  # gradients accumulate
            torch.manual_seed(0)  # of dropout
            model(**inputs(name)).square().sum().backward()
    expected = {key: parameter.grad for key, parameter in plain.named_parameters()}
    assert all(parameter.grad.equal(expected[key]) for key, parameter in ours.named_parameters())
    with torch.no_grad():
        assert ours.eval()(**inputs(name)).equal(plain.eval()(**inputs(name)))


def test_several_transformer_blocks_visit_one_by_one() -> None:
    model = streamed("sdxl_unet_middle")
    parts = model._stream._blocks
    covered = [id(parameter) for part in parts for parameter in part.parameters()]
    assert sorted(covered) == sorted(id(parameter) for parameter in model.parameters())
    blocks = [part for part in parts if isinstance(part, BasicTransformerBlock)]
    deep = [block for block in model.modules() if isinstance(block, SpatialTransformer)]
    assert len(blocks) == sum(len(block.transformer_blocks) for block in deep if len(block.transformer_blocks) > 1)
    assert model.input_blocks[1] in parts  # of depth 1: it visits as a whole
    assert model.label_emb in parts


def test_the_largest_visitor_of_sdxl_is_a_tenth_of_a_gibibyte() -> None:
    with torch.device("meta"):
        model = StreamedUNetModel(**SDXL | {"use_checkpoint": False})
    sizes = [2 * sum(parameter.numel() for parameter in part.parameters()) for part in model._stream._blocks]
    assert max(sizes) < 0.1 * 2**30


def test_weights_that_change_between_passes_are_seen() -> None:
    model = streamed("unet_sd_tiny", stream_dtype="fp32").eval()
    first = model(**inputs("unet_sd_tiny"))
    first.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    plain = UNetModel(**TINY).eval()
    plain.load_state_dict(model.state_dict())
    assert model(**inputs("unet_sd_tiny")).equal(plain(**inputs("unet_sd_tiny")))


def test_bf16_computes_in_bf16_and_leaves_float32_gradients() -> None:
    model = streamed("unet_sd_tiny")
    out = model(**inputs("unet_sd_tiny"))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    resident = fill_seeded(UNetModel(**TINY)).bfloat16()
    assert out.equal(resident(**inputs("unet_sd_tiny")))


def test_the_weights_stay_where_and_what_they_are_when_the_model_is_moved() -> None:
    model = torch.nn.Sequential(streamed("unet_sd_tiny"), torch.nn.Linear(2, 2)).to("meta", torch.bfloat16)
    kept, moved = ({(p.device.type, p.dtype) for p in part.parameters()} for part in model)
    assert kept == {("cpu", torch.float32)}
    assert moved == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stream_dtype": "fp16"}, "stream_dtype 'fp16' is unknown; valid: bf16, fp32"),
        ({"use_checkpoint": True}, "use_checkpoint: set it to false"),
        ({"use_checkpoint": "selective"}, "use_checkpoint: set it to false"),
        ({"compile_mode": "default"}, "compile_mode: leave it out"),
    ],
)
def test_what_it_refuses(params: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StreamedUNetModel(**{**TINY, "use_checkpoint": False, **params})
