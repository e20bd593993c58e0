"""The UNet with visiting weights computes what the resident one does, and leaves nothing on the device."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.streamed import StreamedUNetModel
from ldm.optim import InBackward
from ldm.util import UserError
from tests.golden_data import case, fill_seeded
from tests.ldm.modules.diffusionmodules.test_openaimodel import SDXL, TINY, UNETS, inputs


def streamed(name: str, **kwargs: object) -> StreamedUNetModel:
    return fill_seeded(StreamedUNetModel(**case(name)["params"] | {"use_checkpoint": False} | kwargs))


@pytest.mark.slow
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
    assert all(layer in parts for layer in model.input_blocks[1])  # of depth 1: its transformer visits as a whole
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


def test_the_weights_stay_where_they_are_when_the_model_is_moved_and_cast() -> None:
    unet = streamed("unet_sd_tiny")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    model = torch.nn.Sequential(unet, torch.nn.Linear(2, 2)).to("meta")
    kept, moved = ({(p.device.type, p.dtype) for p in part.parameters()} for part in model)
    assert kept == {("cpu", torch.float32)} and moved == {("meta", torch.float32)}
    model.to("meta", torch.bfloat16)
    kept, moved = ({(p.device.type, p.dtype) for p in part.parameters()} for part in model)
    assert kept == {("cpu", torch.bfloat16)} and moved == {("meta", torch.bfloat16)}
    assert all(value.equal(before[key].bfloat16()) for key, value in unet.state_dict().items())


@pytest.mark.parametrize("home", [torch.float32, torch.bfloat16])
def test_a_gradient_arrives_before_backward_goes_on(home: torch.dtype) -> None:
    """With the parameter's hooks, which step the optimizer and free it: one part of gradients exists at a time."""
    model, arrived, held = streamed("unet_sd_tiny").to(home), [], []

    def free(parameter: torch.nn.Parameter) -> None:
        arrived.append(id(parameter))
        held.append(sum(p.grad is not None for p in model.parameters()))
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(free)
    model(**inputs("unet_sd_tiny")).float().sum().backward()
    assert sorted(arrived) == sorted(id(parameter) for parameter in model.parameters())
    assert set(held) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet_sd_tiny", "sdxl_unet_middle"])
def test_stepping_in_backward_trains_as_resident_weights_do(name: str) -> None:
    """bfloat16 weights, 8-bit moments, and stochastic rounding that the order of the gradients does not change."""
    inner = {"target": "ldm.optim.low_bit.AdamW8bit", "params": {"keyed_rounding": True}}
    trained = []
    for model, bucket in ((fill_seeded(UNetModel(**case(name)["params"])), 0.3), (streamed(name), 0.05)):
        model.bfloat16()
        optimizer = InBackward(model.parameters(), lr=1e-3, optimizer=inner, bucket_mb=bucket)

        def closure(model: torch.nn.Module = model) -> torch.Tensor:
            loss = model(**inputs(name)).float().square().mean()
            loss.backward()
            return loss

        losses = []
        for number in range(3):
            torch.manual_seed(number)
            losses.append(optimizer.step(closure).item())
        trained.append((losses, [parameter.clone() for parameter in model.parameters()]))
    (losses, weights), (streamed_losses, streamed_weights) = trained
    assert losses == streamed_losses and len(set(losses)) == 3
    assert all(one.equal(other) for one, other in zip(weights, streamed_weights, strict=True))


def test_pinned_memory_is_for_weights_of_another_type_than_the_copies() -> None:
    model = streamed("unet_sd_tiny")
    sizes = [2 * parameter.numel() for parameter in model.parameters()]
    landing = 1 << (max(sizes) - 1).bit_length()  # for one gradient
    assert sum(sizes) <= model.pinned_bytes - landing < 2 * sum(sizes)
    assert model.bfloat16().pinned_bytes == landing


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stream_dtype": "fp16"}, "stream_dtype 'fp16' is unknown"),
        ({"use_checkpoint": True}, "use_checkpoint: set it to false"),
        ({"use_checkpoint": "selective"}, "use_checkpoint: set it to false"),
        ({"compile_mode": "default"}, "compile_mode: leave it out"),
    ],
)
def test_what_it_refuses(params: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StreamedUNetModel(**{**TINY, "use_checkpoint": False, **params})
