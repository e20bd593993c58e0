"""Tests that weights sharded between two processes give the losses, checkpoints and images of one process."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import distributed
from torch.optim import Optimizer

from benchmarks.child_runs import read_losses
from ldm.config.load import load_config
from ldm.distributed.dtensor import local_tensor
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.training.strategies import partition_unet, units
from ldm.util import UserError
from tests.golden_data import fill_seeded, seeded_tensor
from tests.test_several_processes import Runs
from tests.training_runs import (  # noqa: F401
    CONFIG,
    assert_equal,
    fixture_one_thread,
    fixture_train,
    logged,
    state,
    the_run,
    write_release,
)
from tests.waiting import collect, join, wait_for

ALONE = "model.params.use_ema=False"
CLIPPED = "--gradient_clip_val 0.1"  # by the norm of all gradients
SHARDED = f"--strategy fsdp {ALONE}"
OPTIMIZER = "model.params.optimizer_config"
UNET = "model.params.unet_config.params"
DEEP = f"{UNET}.transformer_depth=3 {UNET}.use_linear_in_transformer=True"
CALLBACKS = "lightning.callbacks"


class Holdings(Callback):
    """Callback that records the numbers of elements of weights, gradients and optimizer state in this process."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = [value for kept in optimizer.state.values() for value in kept.values() if value.ndim]
        tensors = {"weights": parameters, "gradients": [parameter.grad for parameter in parameters], "state": state}
        held = {name: sum(local_tensor(tensor).numel() for tensor in some) for name, some in tensors.items()}
        held |= {"all": sum(parameter.numel() for parameter in parameters)}
        folder = Path(trainer.default_root_dir).parents[1]
        (folder / f"held-{trainer.global_rank}.json").write_text(json.dumps(held))


@pytest.fixture(name="runs")
def fixture_runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def described(value: Any) -> Any:
    """Return `value` with tensors replaced by their class, dtype and shape."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, tuple(value.shape)
    if isinstance(value, dict):
        return {key: described(part) for key, part in value.items()}
    return [described(part) for part in value] if isinstance(value, (list, tuple)) else type(value)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        # A step of SGD is proportional to the gradient, and would differ if gradients were summed.
        (f"{OPTIMIZER}.target=torch.optim.SGD {OPTIMIZER}.params.lr=0.3 {DEEP}", 1e-5),
        (f"{UNET}.use_checkpoint=selective {UNET}.channels_last=True --precision bf16-mixed", 1e-3),
        ("--precision bf16-true", 1e-3),
    ],
    ids=["sgd-deep", "mixed", "bfloat16"],
)
def test_losses_are_those_of_one_process(runs: Runs, options: str, tolerance: float) -> None:
    runs("two", f"{SHARDED} --max_steps 3 {options}", ranks=2)
    runs("one", f"{ALONE} --max_steps 3 data.params.batch_size=4 {options}")
    assert runs.losses("two") == pytest.approx(runs.losses("one"), rel=tolerance)


def test_each_process_holds_its_half_also_of_what_accumulates(runs: Runs) -> None:
    note = f"{CALLBACKS}.note.target=tests.ldm.training.test_strategies.Holdings"
    twice = "--max_steps 2 data.params.batch_size=1 --accumulate_grad_batches 2"
    runs("two", f"{SHARDED} {twice} {CLIPPED} {note}", ranks=2)
    runs("one", f"{ALONE} --max_steps 2 data.params.batch_size=4 {CLIPPED}")
    assert runs.losses("two") == pytest.approx(runs.losses("one"), rel=1e-5)
    for rank in range(2):
        held = json.loads((runs.folder / f"held-{rank}.json").read_text())
        half = held.pop("all") / 2
        assert held == pytest.approx({"weights": half, "gradients": half, "state": 2 * half}, rel=0.01)


@pytest.mark.parametrize(
    ("name", "share"),
    [("stable_diffusion_v1.yaml", 0.06), ("stable_diffusion_v2_base.yaml", 0.06), ("stable_diffusion_xl.yaml", 0.025)],
)
def test_units_of_a_stable_diffusion_unet_are_small(name: str, share: float) -> None:
    config = load_config([name])
    with torch.device("meta"):
        unet = UNetModel(**config.model.params.unet_config.params)
    sizes, taken = [], set()
    for unit in units(unet):  # one within another comes first, and takes its own
        own = set(unit.parameters()) - taken
        taken |= own
        sizes.append(sum(parameter.numel() for parameter in own))
    total = sum(parameter.numel() for parameter in unet.parameters())
    assert min(sizes) > 0 and max(sizes) < share * total
    assert 0.99 * total < sum(sizes) < total


def test_checkpoints_are_those_of_one_process_and_go_both_ways(runs: Runs) -> None:
    one = runs("one", f"{ALONE} --max_steps 2 data.params.batch_size=4")
    two = runs("two", f"{SHARDED} --max_steps 2", ranks=2)
    files = {path.relative_to(one) for path in one.glob("checkpoints/*")}
    assert {path.relative_to(two) for path in two.glob("checkpoints/*")} == files
    plain, gathered = (state(run / "checkpoints" / "last.ckpt") for run in (one, two))
    for part in ("state_dict", "optimizer_states"):
        assert described(gathered[part]) == described(plain[part])
    assert gathered.keys() == plain.keys()
    numbers = plain["optimizer_states"][0]["state"], gathered["optimizer_states"][0]["state"]
    for expected, found in zip(*(side.values() for side in numbers), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    # The same step, taken up each in the other way; the epoch begins again, since the batches were of another size.
    runs("one", f"--resume {one} {SHARDED} data.params.batch_size=2 --devices 2", ranks=2)
    runs("two", f"--resume {two} data.params.batch_size=4 --devices 1")
    assert set(runs.losses("one")) == {0, 1, 2, 3, 4}
    assert runs.losses("one") == pytest.approx(runs.losses("two"), rel=1e-5)


def test_a_run_that_is_killed_goes_on_exactly(runs: Runs) -> None:
    """Resume from a checkpoint written between steps; tests/test_several_processes.py stops a sharded run."""
    often = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    processes = runs.start("stopped", f"{SHARDED} {often} --max_steps 100000", ranks=2)
    wait_for(lambda: len(read_losses(runs.folder / "stopped-1.losses")) >= 4, *processes)
    for process in processes:
        process.kill()
    join(*processes)
    stopped = the_run(runs.folder / "stopped")
    step = state(stopped / "checkpoints" / "last.ckpt")["global_step"]
    assert step >= 3
    runs("stopped", f"--resume {stopped} --max_steps {step + 2}", ranks=2)
    straight = runs("straight", f"{SHARDED} {often} --max_steps {step + 2}", ranks=2)
    assert runs.losses("stopped") == runs.losses("straight")
    one, other = (state(run / "checkpoints" / "last.ckpt") for run in (straight, stopped))
    assert_equal(one["state_dict"], other["state_dict"])
    assert_equal(one["optimizer_states"][0], other["optimizer_states"][0])


def test_what_looks_at_the_weights_sees_them_whole(runs: Runs) -> None:
    start = runs("start", f"{ALONE} --max_steps 1") / "checkpoints" / "last.ckpt"
    write_release(runs.folder)
    (runs.folder / "prompts.txt").write_text("a --s 2\nb --s 2")
    options = " ".join(
        [
            "data.params.val_urls=shards/s-000000.tar --val_check_interval 2",
            "data.params.test_urls=shards/s-000001.tar --no-test False",
            f"{CALLBACKS}.image_logger.params.disabled=False {CALLBACKS}.image_logger.params.batch_frequency=2",
            f"{CALLBACKS}.image_logger.params.log_images_kwargs.ddim_steps=3",
            "--previews prompts.txt lightning.previews.train_time_interval=1e-6",
            "lightning.previews.release=release.safetensors lightning.previews.config=release.yaml",
            f"{CALLBACKS}.numerical_faults.params.on_fault=skip",
            f"{CALLBACKS}.numerical_faults.params.grad_norm_factor=10 {CALLBACKS}.numerical_faults.params.window=2",
            f"{CALLBACKS}.decay.target=ldm.callbacks.decay_to_start.DecayToStart",
            f"{CALLBACKS}.decay.params.start={start} {CALLBACKS}.decay.params.weight=100",
            f"{CALLBACKS}.pull.target=ldm.callbacks.pull_to_start.PullToStart",
            f"{CALLBACKS}.pull.params.start={start} {CALLBACKS}.pull.params.weight=1000",
            f"{CALLBACKS}.forgetting.target=ldm.callbacks.forgetting.Forgetting",
            f"{CALLBACKS}.forgetting.params.sets.rest=shards/s-000001.tar",
            f"{CALLBACKS}.forgetting.params.every_n_train_steps=2",
            f"{CALLBACKS}.norms.target=ldm.callbacks.block_norms.BlockNorms {CALLBACKS}.norms.params.values=100000",
            f"{CALLBACKS}.norms.params.every_n_train_steps=2",
            "--enable_model_summary True --max_steps 3",
        ]
    )
    two = runs("two", f"{SHARDED} {options}", ranks=2)
    ddp = runs("ddp", f"{ALONE} {options}", ranks=2)
    assert runs.losses("two") == pytest.approx(runs.losses("ddp"), rel=1e-5)
    norms = ("gradient_norm/input_blocks", "update_ratio/output_blocks")
    for metric in ("val/loss", "val/gap", "test/loss", "eval/rest/loss", *norms):
        found, expected = ({step: float(value) for step, value in logged(run, metric).items()} for run in (two, ddp))
        assert expected and found == pytest.approx(expected, rel=1e-4)
    norms = [state(run / "checkpoints" / "last.ckpt")["callbacks"]["NumericalFaults"]["norms"] for run in (two, ddp)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    images = [{path.relative_to(run) for path in run.glob("images/**/*.png")} for run in (two, ddp)]
    assert images[0] == images[1] and len(images[0]) > 8
    places = [sorted(run.glob("previews/*_gs-*.png")) for run in (two, ddp)]
    shown = [{path.name: np.asarray(Image.open(path), int) for path in paths} for paths in places]
    assert shown[0].keys() == shown[1].keys() and len(shown[0]) == 2 * 4  # before the first step and after each
    assert all(abs(image - shown[1][name]).max() <= 1 for name, image in shown[0].items())


def _compiled_process(rank: int, address: str, found: Any) -> None:
    """Train a tiny UNet with compiled blocks, without the code generator, as one of two processes."""
    compile_ = torch.compile
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    torch.compile = lambda function, *, mode, **options: compile_(function, backend=backend, **options)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    params = CONFIG["model"]["params"]["unet_config"]["params"]
    unet = fill_seeded(UNetModel(**params, compile_mode="default", use_checkpoint="selective"))
    partition_unet(unet, torch.device("cpu"))
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    losses = [_step(unet, optimizer, slice(rank, rank + 1)) for _ in range(2)]
    found.put((rank, losses, len(graphs)))
    found.close()
    found.join_thread()
    distributed.destroy_process_group()


def _step(unet: UNetModel, optimizer: Optimizer, part: slice) -> float:
    """Run a step on a `part` of two samples; return the loss of both, without gradients."""
    given = seeded_tensor("x", (2, 4, 4, 4)), torch.tensor([3, 7]), seeded_tensor("context", (2, 5, 8))
    with torch.no_grad():
        loss = unet(*given).square().mean().item()
    unet(*(tensor[part] for tensor in given)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def test_compiled_blocks_are_gathered_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    found = context.Queue()
    address = f"file://{tmp_path}/address"
    processes = [context.Process(target=_compiled_process, args=(rank, address, found)) for rank in range(2)]
    for process in processes:
        process.start()
    results = collect(found, processes)
    join(*processes)
    plain = fill_seeded(UNetModel(**CONFIG["model"]["params"]["unet_config"]["params"]))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = [_step(plain, optimizer, slice(0, 2)) for _ in range(2)]
    blocks = len(plain.input_blocks) + 1 + len(plain.output_blocks)
    for _, losses, graphs in results:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert 0 < graphs <= blocks, "nothing was compiled anew"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("model.params.use_ema=True", "cannot shard the EMA; set model.params.use_ema=False"),
        (
            f"{OPTIMIZER}.target=ldm.optim.InBackward {OPTIMIZER}.params.optimizer.target=torch.optim.AdamW",
            "InBackward",
        ),
        (
            f"{OPTIMIZER}.target=torch.optim.Muon",
            "Muon cannot update weights partitioned by strategy fsdp; use .*AdamW",
        ),
        ("--precision 64-true", "precision=64-true does not work with strategy fsdp; use one of"),
        (
            f"{UNET}.compile_mode=reduce-overhead",
            "compile_mode=reduce-overhead makes CUDA graphs.*compile_mode=default",
        ),
        ("model.params.learn_logvar=True", "fsdp trains the UNet only; with .*learn_logvar, use --strategy ddp"),
        (
            "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel",
            "weights that stay on the host need one device",
        ),
        ("--strategy fsdp_cpu_offload", "strategy fsdp_cpu_offload: .*give --strategy fsdp without settings"),
    ],
)
def test_refusals(
    train: Callable[[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(UserError, match=message) as caught:
        train(f"--max_steps 1 --accelerator cpu --devices 2 {SHARDED} {options}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("logs/*"))


def test_fsdp_with_one_process_trains_unsharded(train: Callable[[str], int], tmp_path: Path) -> None:
    assert train("--max_steps 1 --strategy fsdp") == 0
    weights = state(the_run(tmp_path / "logs") / "checkpoints" / "last.ckpt")["state_dict"]
    assert any(key.startswith("model_ema.") for key in weights)
