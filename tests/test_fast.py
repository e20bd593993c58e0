"""Tests of the fast tier through main.py: compiled blocks do not change keys, checkpoints, resuming or images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.exc import TritonMissing

from ldm.config.load import build_model, load_config
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import UserError
from tests.golden_data import fill_seeded, seeded_tensor
from tests.training_runs import (  # noqa: F401
    CONFIG,
    assert_same_training,
    fixture_one_thread,
    run_main,
    state,
    the_run,
    write_inputs,
)

FAST = {"use_checkpoint": "selective", "channels_last": True, "compile_mode": "default"}


@pytest.fixture(name="compiled")
def fixture_compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Replace the code generator of `torch.compile`, which takes minutes; return the list of its graphs."""
    graphs: list[torch.fx.GraphModule] = []
    compile_ = torch.compile

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    def without_generator(function: Callable[..., Any], *, mode: str, **options: Any) -> Callable[..., Any]:
        return compile_(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", without_generator)
    return graphs


@pytest.fixture(name="fast")
def fixture_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Callable[[str], None]:
    """Return a function that trains the tiny model with fast.yaml."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> None:
        base = "" if "--resume" in line else "-b tiny.yaml fast.yaml data.params.batch_size=4 "
        run_main(monkeypatch, f"{base}-t --no-test {line}")

    return call


def tiny(**changes: object) -> UNetModel:
    return fill_seeded(UNetModel(**CONFIG["model"]["params"]["unet_config"]["params"] | changes))


def outcome(unet: UNetModel, batch: int = 2) -> list[torch.Tensor]:
    """Return the output and the gradient of every parameter."""
    x, context = seeded_tensor("fast/x", (batch, 4, 4, 4)), seeded_tensor("fast/context", (batch, 5, 8))
    out = unet(x, torch.arange(batch), context)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in unet.parameters())]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Assert closeness relative to the largest gradient, because some gradients are zero up to rounding."""
    largest = max(float(value.detach().norm()) for value in expected)
    for value, correct in zip(found, expected, strict=True):
        torch.testing.assert_close(value, correct, atol=1e-5 * largest, rtol=1e-4)


def test_compiled_blocks_compute_the_same(compiled: list[torch.fx.GraphModule]) -> None:
    plain, fast = tiny(), tiny(**FAST)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert_close(outcome(fast), outcome(plain))
    assert len(compiled) == len(fast.input_blocks) + 1 + len(fast.output_blocks)


def test_every_size_of_image_is_compiled_once(compiled: list[torch.fx.GraphModule]) -> None:
    fast, sizes = tiny(**FAST), range(4, 13)  # as many as `tools/preencode.py --buckets` makes at 512 pixels
    for width in (*sizes, *sizes):
        fast.run(fast.input_blocks[0], torch.ones(1, 4, 4, width), torch.ones(1, 128), torch.ones(1, 5, 8))
    assert len(compiled) == len(sizes)


def test_without_gradients_nothing_is_compiled(compiled: list[torch.fx.GraphModule]) -> None:
    given = torch.ones(3, 4, 4, 4), torch.ones(3), torch.ones(3, 5, 8)
    with torch.no_grad():
        fast, plain = tiny(**FAST)(*given), tiny()(*given)
    assert not compiled
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


def test_a_resumed_fast_run_equals_an_uninterrupted_one(
    fast: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    fast("-l straight --max_steps 3")
    assert len(asked) == 5 and asked[0]["mode"] == "default"
    fast("-l resumed --max_steps 1 lightning.callbacks.image_logger.params.disabled=False")
    resumed = the_run(tmp_path / "resumed")
    fast(f"--resume {resumed} --max_steps 3")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    assert list((resumed / "images" / "train").glob("*.png"))
    keys = state(resumed / "checkpoints" / "last.ckpt")["state_dict"].keys()
    assert keys == build_model(load_config([tmp_path / "tiny.yaml"])).state_dict().keys()


def test_before_torch_2_13_the_blocks_share_a_larger_cache_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo.config as limits

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    monkeypatch.setattr("ldm.modules.diffusionmodules.openaimodel._ISOLATES", False)
    with limits.patch(recompile_limit=8, accumulated_recompile_limit=256):
        tiny(**FAST)
        assert limits.recompile_limit == limits.accumulated_recompile_limit == 5 * 64
    assert len(asked) == 5 and not any("isolate_recompiles" in options for options in asked)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_restart_at_every_step_and_do_not_accumulate(
    mode: str, fast: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(len(steps)))
    setting = f"model.params.unet_config.params.compile_mode={mode}"
    fast(f"-l one --max_steps 2 {setting} data.params.val_urls=shards/s-000000.tar")
    assert len(steps) == 2  # nor for validation
    with pytest.raises(UserError, match=r"accumulate_grad_batches=2 .*compile_mode=default"):
        fast(f"-l two --max_steps 2 {setting} --accumulate_grad_batches 2")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("no compiler here"), "no compiler here"), (TritonMissing(None), "Cannot find a working triton")],
    ids=["compiler", "triton"],
)
def test_a_machine_that_cannot_compile_gets_advice(
    error: Exception, reason: str, fast: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        raise error

    monkeypatch.setattr(
        torch, "compile", lambda function, mode, **options: compile_(function, backend=backend, **options)
    )
    with pytest.raises(UserError, match=rf"{reason}.*, or set model\.params\.unet_config\.params\.compile_mode=null"):
        fast("--max_steps 1")


def test_the_code_generator_takes_a_block() -> None:
    """Through torch's own code generator, which needs a C++ compiler, as training on a CPU with it does."""
    plain, fast = tiny(), tiny(**FAST)
    given = seeded_tensor("fast/h", (2, 32, 4, 4)), seeded_tensor("fast/emb", (2, 128))
    results = []
    for unet in (plain, fast):
        block = unet.output_blocks[0][0]
        if unet is fast:
            block.compile(mode="default", dynamic=False, fullgraph=True)
        h = torch.cat([given[0]] * 2, 1).contiguous(memory_format=unet.memory_format).requires_grad_()
        out = block(h, given[1])
        results.append([out, *torch.autograd.grad(out.square().sum(), [h, *block.parameters()])])
    assert_close(*reversed(results))
