#!/usr/bin/env python
"""Forgetting of the tiny base model while it learns a cat.

The benchmark compares plain fine-tuning, each kind of preservation, and textual inversion. It measures the loss on the
cat, and the drift of its neighbours and of other images.

    python benchmarks/forgetting.py --folder forgetting

Training uses seven of the ten cats; the other three expressions are held out. Every second animal belongs to the prior.
No variant trains on the remaining animals or on images of other things.

Variants are compared at equal learning. This is the first evaluated step where the loss on the trained cats is as low
as that of plain fine-tuning, with the same seed, at step --reference. All commands run as a user would type them.

Results of finished runs stay under --folder. A benchmark that was stopped continues with the runs that are missing.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from forgetting_report import report
from forgetting_sets import CONFIG, RELEASE, SAMPLING, shards, write_sets, write_text

from ldm.cli.run import call, run
from ldm.util import UserError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("cats", "new_cats", "near", "near_prior", "animals", "rest")
WATCHED = ("cats", "new_cats", "near", "rest")  # these are measured during training too
SAMPLES = 7  # sampled images per set


@dataclass(frozen=True)
class Variant:
    """A way to train, one row of the tables, given by its additions to the common command."""

    name: str
    overrides: tuple[str, ...] = ()
    prior: str | None = None  # a set of `forgetting_sets`
    configs: tuple[str, ...] = ("demo_tiny.yaml",)
    extract: int | None = None  # rank of a LoRA that is extracted from the result, and judged in its place

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())

    def start(self, folder: Path) -> Path:
        """Return the checkpoint to resume."""
        return folder / f"{Path(self.configs[-1]).stem}.ckpt"


def decay(weight: float) -> tuple[str, ...]:
    """Return overrides that decay weights to the released ones, and switch the optimizer's decay to zero off."""
    return (
        "lightning.callbacks.decay.target=ldm.callbacks.decay_to_start.DecayToStart",
        f"lightning.callbacks.decay.params.start={RELEASE}",
        f"lightning.callbacks.decay.params.weight={weight}",
        "model.params.optimizer_config.target=torch.optim.AdamW",
        "model.params.optimizer_config.params.weight_decay=0.0",
    )


TEACHER = ("model.params.prior_target=teacher",)
INVERSION = (
    "model.params.cond_stage_config.params.token=tom",
    "model.params.cond_stage_config.params.initial_token=tiger",  # the closest word that the base has learnt
    "data.params.batch_size=16",  # all cats in one batch, as in the other variants
    "model.base_learning_rate=6.25e-4",  # times batch_size: 0.01
)
LORA = ("model.base_learning_rate=3.0e-4",)  # ten times that of all weights
VARIANTS = (
    Variant("plain"),
    Variant("prior: real images", prior="real"),
    Variant("prior: generated images", prior="generated"),
    Variant("teacher, real images", TEACHER, prior="real_taught"),
    Variant("teacher, generated images", TEACHER, prior="generated_taught"),
    Variant("decay to start, 10", decay(10)),
    Variant("decay to start, 30", decay(30)),
    Variant("decay to start, 100", decay(100)),
    Variant("LoRA, attention", LORA, configs=("demo_tiny.yaml", "lora.yaml")),
    Variant("LoRA, all layers", (*LORA, "model.params.lora.targets=['*']"), configs=("demo_tiny.yaml", "lora.yaml")),
    Variant("LoRA extracted from plain, rank 32", extract=32),
    Variant("textual inversion", INVERSION, configs=(CONFIG, "textual_inversion.yaml")),
)


def main() -> None:
    options = parse_arguments()
    os.chdir(ROOT)
    write_sets(options.folder)
    for variant in VARIANTS:
        if not variant.start(options.folder).exists():
            bases = ("--base", *variant.configs, "--out", variant.start(options.folder))
            call("tools/hack_weights.py", "--release", RELEASE, *bases)
    results = []
    for seed in options.seeds:
        plain = None
        for variant in VARIANTS:
            result = finished(variant, seed, options) or train_and_judge(variant, seed, plain, options)
            plain = plain or result
            results.append(result)
    text = report(results, options.reference, options.steps)
    write_text(text, options.folder / "table.md")
    write_text(json.dumps(results, indent=1) + "\n", options.folder / "results.json")
    log.info("\n%s\nwrote these tables and results.json to %s", text, options.folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=lambda text: Path(text).resolve(), required=True, help="folder for all files; they are kept")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    add("--steps", type=int, default=300, help="optimizer steps per run (default: 300)")
    add("--every", type=int, default=25, help="steps between evaluations in a run (default: 25)")
    add("--reference", type=int, default=100, help="step of the plain run that sets the loss to reach (default: 100)")
    options = parser.parse_args()
    if options.every < 1 or not 0 < options.reference <= options.steps:
        raise UserError(f"--every {options.every} --reference {options.reference}: give 1 to {options.steps} (--steps)")
    if options.reference % options.every or options.steps % options.every:
        raise UserError(
            f"--reference {options.reference} --steps {options.steps}: give multiples of {options.every} (--every)"
        )
    return options


def result_path(variant: Variant, seed: int, folder: Path) -> Path:
    return folder / "results" / f"{variant.slug}-{seed}.json"


def settings(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a stored result must have to be used again."""
    numbers = {name: getattr(options, name) for name in ("steps", "every", "reference")}
    return {"configs": list(variant.configs), "overrides": list(variant.overrides), "prior": variant.prior, **numbers}


def finished(variant: Variant, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the result of an earlier start of this benchmark, or None.

    Raises:
        UserError: the result was made with other settings.
    """
    path = result_path(variant, seed, options.folder)
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["settings"] != settings(variant, options):
        raise UserError(f"{path}: made with other settings; remove the file, or give another --folder")
    return result


def train_and_judge(
    variant: Variant, seed: int, plain: dict[str, Any] | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Train, merge the checkpoint at equal learning, and evaluate the merged release.

    `plain` is the result of the plain run of this seed; None if this run is the plain one.
    """
    began = time.monotonic()
    logs = options.folder / "runs" / f"{variant.slug}-{seed}"
    shutil.rmtree(logs, ignore_errors=True)
    call(*training_command(variant, seed, logs, options))
    [trained] = logs.iterdir()
    curve = read_curve(trained)
    learning = {point["step"]: point["cats"]["loss_ratio"] for point in curve if point["step"]}
    learnt = plain["learnt"] if plain else learning[options.reference]
    reached = [step for step, ratio in learning.items() if ratio <= learnt]
    step = min(reached, default=options.steps) if plain else options.reference
    [checkpoint] = trained.glob(f"checkpoints/*step={step:09d}.ckpt")
    tuned, found = logs / "tuned.safetensors", logs / "evaluation"
    call("tools/merge_release.py", "--train-ckpt", checkpoint, "--release", RELEASE, "--out", tuned)
    if variant.extract:
        base, lora = ("--base", RELEASE, "--tuned", tuned), logs / "lora.safetensors"
        call("tools/extract_lora.py", *base, "--rank", variant.extract, "--out", lora)
        tuned = logs / "with-lora.safetensors"
        call("tools/merge_release.py", "--release", RELEASE, "--lora", lora, "--out", tuned)
    sets = [word for name in MEASURED for word in ("--set", f"{name}={shards(options.folder, name)}")]
    sampling = ("--sample", SAMPLES, "--seed", 1000 * seed, *SAMPLING)
    call("tools/evaluate.py", "--base", RELEASE, "--ckpt", tuned, "--config", CONFIG, *sets, *sampling, "--out", found)
    result = {
        "variant": variant.name,
        "seed": seed,
        "settings": settings(variant, options),
        "learnt": learnt,
        "reached": bool(reached),
        "step": step,
        "sets": json.loads((found / "evaluation.json").read_text(encoding="utf-8"))["sets"],
        "curve": curve,
        "seconds": round(time.monotonic() - began),
    }
    write_text(json.dumps(result, indent=1) + "\n", result_path(variant, seed, options.folder))
    shutil.rmtree(logs)  # the checkpoints take gigabytes
    return result


def training_command(variant: Variant, seed: int, logs: Path, options: argparse.Namespace) -> list[object]:
    """Return the `main.py` command with an evaluation and a checkpoint every `--every` steps."""
    callback, kept = "lightning.callbacks.forgetting", "lightning.modelcheckpoint.params"
    overrides = [
        f"data.params.training_urls={shards(options.folder, 'cats')}",
        "data.params.num_workers=0",
        "lightning.callbacks.image_logger.params.disabled=true",
        f"{callback}.target=ldm.callbacks.forgetting.Forgetting",
        f"{callback}.params.every_n_train_steps={options.every}",
        f"{callback}.params.batch_size=16",
        *(f"{callback}.params.sets.{name}={shards(options.folder, name)}" for name in WATCHED),
        f"{kept}.monitor=null",
        f"{kept}.save_top_k=-1",
        f"{kept}.every_n_train_steps={options.every}",
        *variant.overrides,
    ]
    if variant.prior:  # about one prior image per cat
        overrides += [f"data.params.prior_urls={shards(options.folder, variant.prior)}", "data.params.prior_ratio=0.5"]
    flags = ("-t", "--no-test", "-s", seed, "--logdir", logs, "--max_steps", options.steps)
    return ["main.py", "--resume", variant.start(options.folder), "--base", *variant.configs, *flags, *overrides]


def read_curve(trained: Path) -> list[dict[str, Any]]:
    """Return the logged metrics of the run in `trained`: per `step`, `loss_ratio` and `drift` of each watched set."""
    [path] = trained.glob("csv/*/metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[f"eval/{WATCHED[0]}/drift"]]
    keys = ("loss_ratio", "drift")
    return [
        {
            "step": int(row["step"]),
            **{name: {key: float(row[f"eval/{name}/{key}"]) for key in keys} for name in WATCHED},
        }
        for row in rows
    ]


if __name__ == "__main__":
    run(main)
