#!/usr/bin/env python
"""Speed of the whole training loop compared with the bare step, and speed of the shard loader on one core.

    python benchmarks/loop.py --channels 64 --size 128 --batch 4
    python benchmarks/loop.py --channels 320 --size 512 --batch 64 --tier fast.yaml --workers 8    # on a GPU
    python benchmarks/loop.py --config finetune_stable_diffusion_xl.yaml --channels 320 --size 1024 --batch 1

The bare step is forward, backward, optimizer and moving average on one batch in memory. The loop is `main.py` with its
loader, callbacks and loggers, but without preview images and checkpoints. Both use the same config. They run in turn,
each in its own process, and are timed after `--warm-up` steps. Shards hold random posteriors and text embeddings.

On a CPU the unit is processor time, which other load on the machine does not change; leave `--workers` at 0 there. On a
GPU the benchmark prints the loop's peak memory, the peak that tools/plan_memory.py predicts, and the driver's figure,
and the same of the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RECIPE = "finetune_stable_diffusion.yaml"
SIDES = ("bare", "loop")
APPETITE = 20 * 135  # samples per second: 20 times the rate of the fastest training step that we aim for


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64, help="model_channels of the UNet (default 64)")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels (default 128)")
    parser.add_argument("--batch", type=int, default=4, help="images per step (default 4)")
    parser.add_argument("--config", default=RECIPE, help=f"config of the recipe (default {RECIPE})")
    parser.add_argument("--tier", default="", help="config on top of the recipe, such as fast.yaml")
    parser.add_argument("--ema", action="store_true", help="keep a moving average")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the loader (default 0)")
    parser.add_argument("--steps", type=int, default=60, help="timed steps (default 60)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before the timed ones (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides (default 3)")
    parser.add_argument("--profile", action="store_true", help="print a profile of the loop and nothing else")
    parser.add_argument("--side", choices=(*SIDES, "reader"), help=argparse.SUPPRESS)  # for a worker process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # for a worker process
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.side:
        print(json.dumps({"bare": bare, "loop": loop, "reader": reader}[options.side](options)))
        return
    with tempfile.TemporaryDirectory() as name:
        from benchmarks.recipe_full_size import write_shard

        samples = max(256, 16 * options.batch)  # at least 16 steps per epoch: each epoch starts with an empty loader
        write_shard(Path(name) / "shards", samples, options.size // 8, *widths(config_of(options)))
        if options.profile:
            worker("loop", name)
            return
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                rounds[side].append(worker(side, name))
                print(f"round {number + 1}  {side:<5} {rounds[side][-1]['rate']:9.2f} img/s", flush=True)
        ratios = [one["rate"] / other["rate"] for one, other in zip(rounds["loop"], rounds["bare"], strict=True)]
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"loop / bare per round: {shown}; median {statistics.median(ratios):.3f}")
        compare_memory(rounds["loop"], options)
        read = worker("reader", name)
        share = read["rate"] / APPETITE
        print(f"reader, one core: {read['rate']:.0f} samples/s of processor time, "
              f"{read['rate_by_wall']:.0f} samples/s of wall time; "
              f"{share:.2f} of the required {APPETITE}")  # fmt: skip


def widths(config: Any) -> tuple[int, int]:
    """Return the features of a sample's text embedding, and of its pooled one, 0 if it has none."""
    unet, stage = config.model.params.unet_config.params, config.model.params.cond_stage_config.params
    sizes = sum(2 * embedder.params.outdim for embedder in stage.get("emb_models", ()) if "params" in embedder)
    return unet.context_dim, unet.get("adm_in_channels", 0) - sizes


def compare_memory(figures: list[dict[str, float]], options: argparse.Namespace) -> None:
    """Print the loop's peak memory on a GPU and the predicted peak."""
    peak, driver, rss = (max(entry[key] for entry in figures) for key in ("gib", "driver_gib", "rss_gib"))
    if not peak:
        return
    from ldm.planning.ledger import HOST
    from ldm.planning.step import on_device, peak_of_step

    forecast = peak_of_step(config_of(options), options.batch, options.size)
    predicted, host = on_device(forecast) / 2**30, forecast[HOST] / 2**30
    print(f"peak of the loop {peak:.2f} GiB, predicted {predicted:.2f} ({peak / predicted - 1:+.1%}); "
          f"reported by the driver {driver:.2f}")  # fmt: skip
    print(f"peak of the process on the host {rss:.2f} GiB, tensors predicted {host:.2f}")


def worker(side: str, folder: str) -> dict[str, float]:
    """Run one side in its own process; return images or samples per second, and GiB on a GPU."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
    if "--profile" in sys.argv:
        print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def overrides(options: argparse.Namespace) -> list[str]:
    return [
        f"data.params.batch_size={options.batch}",
        f"data.params.num_workers={options.workers}",
        f"model.params.unet_config.params.model_channels={options.channels}",
        f"model.params.use_ema={options.ema}",
        "lightning.callbacks.image_logger.params.disabled=True",
    ]


def arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments of main.py for the warm-up and the timed steps."""
    data = f"data.params.training_urls={options.folder / 'shards/shard.tar'}"
    flags = "-t --no-test --enable_checkpointing False --gpus 0, --max_steps"
    steps = options.warm_up + options.steps
    return [
        "--base",
        *configs(options),
        *flags.split(),
        str(steps),
        "--logdir",
        str(options.folder / "logs"),
        data,
        *overrides(options),
    ]


def configs(options: argparse.Namespace) -> list[str]:
    return [options.config, *([options.tier] if options.tier else [])]


def config_of(options: argparse.Namespace) -> Any:
    """Return the config of both sides."""
    from ldm.config.load import load_config

    return load_config(configs(options), overrides(options))


def loop(options: argparse.Namespace) -> dict[str, float]:
    """Run `main.py`; return images per second and its memory."""
    import cProfile
    import pstats

    import torch

    import main as entry
    from ldm.callbacks.device import peak_memory
    from ldm.models.diffusion.ddpm import LatentDiffusion

    edges: list[float] = []
    seen, peak = 0, 0
    begin, profile = LatentDiffusion.on_train_batch_start, cProfile.Profile()

    def noting(model: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal seen, peak
        if torch.cuda.is_available():  # CUDACallback resets the peak in each epoch
            peak = max(peak, torch.cuda.max_memory_allocated())
        if options.profile and seen == options.warm_up:
            profile.enable()
        if seen in (options.warm_up, options.warm_up + options.steps - 1):
            edges.append(clock(torch))
        seen += 1
        return begin(model, batch, batch_idx)

    LatentDiffusion.on_train_batch_start = noting
    sys.argv = ["main.py", *arguments(options)]
    entry.main()
    if options.profile:
        profile.disable()
        pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(90)
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    rate = options.batch * (options.steps - 1) / (edges[1] - edges[0])
    rss = peak_memory(torch.device("cpu"))
    return {"rate": rate, "gib": peak / 2**30, "driver_gib": (total - free) / 2**30, "rss_gib": rss / 2**30}


def bare(options: argparse.Namespace) -> dict[str, float]:
    """Run steps on one batch with the settings of `main.py`; return images per second."""
    import torch

    from ldm.config.load import build_model
    from ldm.host_memory import keep_freed_memory
    from ldm.planning.fake_batch import make_batch
    from ldm.training.fit import use_tensor_cores

    config = config_of(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as main.py does
    precision = config.lightning.trainer.get("precision")
    use_tensor_cores(device)
    torch.backends.cudnn.benchmark = bool(config.lightning.trainer.get("benchmark"))
    model = build_model(config).to(device, torch.bfloat16 if precision == "bf16-true" else torch.float32).train()
    model.learning_rate = 1e-6
    optimizer = model.configure_optimizers()
    batch = {key: torch.randn_like(value.float()).to(device) for key, value in
             make_batch(model, config, options.batch, options.size).items()}  # fmt: skip

    def closure() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            loss, _ = model.shared_step(batch)
        optimizer.zero_grad()
        loss.backward()
        return loss

    for number in range(options.warm_up + options.steps):
        if number == options.warm_up:
            start = clock(torch)
        optimizer.step(closure)
        optimizer.zero_grad()
        if model.use_ema:
            model.model_ema(model.model)
    return {"rate": options.batch * options.steps / (clock(torch) - start)}


def reader(options: argparse.Namespace) -> dict[str, float]:
    """Read, decode and batch shards from files in memory; return samples per second of one core's time."""
    import torch

    from ldm.data.datamodule import WebDataNpyModuleFromConfig

    torch.set_num_threads(1)
    data = WebDataNpyModuleFromConfig(
        batch_size=64, training_urls=str(options.folder / "shards/shard.tar"), null_cond_dropout=0.1
    )
    data.setup("fit")
    loader, rates, by_wall = data.train_dataloader(), [], []
    for _ in range(5):
        start, start_by_wall = time.process_time(), time.perf_counter()
        count = sum(len(batch["f8"]) for batch in loader)
        rates.append(count / (time.process_time() - start))
        by_wall.append(count / (time.perf_counter() - start_by_wall))
    return {"rate": max(rates), "rate_by_wall": max(by_wall)}


def clock(torch: Any) -> float:
    """Return seconds: on CUDA wall time after the device has finished, else processor time of this process."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
