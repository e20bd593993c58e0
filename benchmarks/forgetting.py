#!/usr/bin/env python
"""Forgetting of the tiny base model while it learns a subject that it has never seen: cats, and clock faces.

The benchmark compares plain fine-tuning, each kind of preservation and combinations, and textual inversion. It measures
the loss on the subject, and loss and drift of its neighbours and of other images.

    python benchmarks/forgetting.py --folder forgetting
    python benchmarks/forgetting.py --folder forgetting --families clocks --seeds 0 --only "pull, 600"

Training uses seven of the ten cats, or eight of the twelve clock faces; the others are held out. No training has real
images of the neighbours or of the rest that are measured. The priors "kin" and "others" do not have their captions
either. The settings were chosen on the cats.

Methods are compared at equal learning: the loss on the trained images is as low as that of plain fine-tuning, with the
same seed, at step --reference. After --steps steps, a method takes the lowest strength of a merge with that loss; if
none has it, the first evaluated step. All commands run as a user would type them.

Results of finished runs stay under --folder. A benchmark that was stopped continues with the runs that are missing.
The tables and forgetting.json hold all finished runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from forgetting_methods import VARIANTS, Variant
from forgetting_report import report, summary
from forgetting_sets import CONFIG, FAMILIES, RELEASE, count_samples, shards, write_sets, write_text

from ldm.cli.run import Lines, call, run
from ldm.util import UserError, check_choice

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("subject", "new", "near", "rest")
LIMIT = 16  # images per set
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def main() -> None:
    options = parse_arguments()
    os.chdir(ROOT)
    of_family = {name: argparse.Namespace(**vars(options) | {"folder": options.folder / name}) for name in FAMILIES}
    for name in options.families:
        variants = [variant for variant in VARIANTS if name in variant.families and is_chosen(variant, options)]
        write_sets(of_family[name].folder, FAMILIES[name], {variant.prior or variant.training for variant in variants})
        train_and_judge_all(variants, of_family[name])
    families = {name: stored_results(of_family[name]) for name in FAMILIES}
    families = {name: results for name, results in families.items() if results}
    text = "\n".join(report(name, results, options.reference, options.steps) for name, results in families.items())
    write_text(text, options.folder / "table.md")
    write_text(json.dumps(summary(families), indent=1) + "\n", options.json)
    log.info("\n%s\nwrote table.md to %s, and %s", Lines(text), options.folder, options.json)


def train_and_judge_all(variants: Sequence[Variant], options: argparse.Namespace) -> None:
    """Run `variants`, of which the first is plain fine-tuning, unless their results are stored."""
    for variant in variants:
        if not variant.start(options.folder).exists():
            bases = ("--base", *variant.configs, "--out", variant.start(options.folder))
            call("tools/hack_weights.py", "--release", RELEASE, *bases)
    for seed in options.seeds:
        plain = finished(variants[0], seed, options) or train_and_judge(variants[0], seed, None, options)
        for variant in variants[1:]:
            if not finished(variant, seed, options):
                train_and_judge(variant, seed, plain, options)


def is_chosen(variant: Variant, options: argparse.Namespace) -> bool:
    """Return True if `options` ask for a method. Plain fine-tuning is always run, for comparison."""
    return variant is VARIANTS[0] or not options.only or variant.name in options.only


def stored_results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the results of this and earlier starts for the seeds of `options`."""
    found = (finished(variant, seed, options) for variant in VARIANTS for seed in options.seeds)
    return [result for result in found if result is not None]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=lambda text: Path(text).resolve(), required=True, help="folder for all files; they are kept")
    families = list(FAMILIES)
    add("--families", nargs="+", choices=families, default=families, help="subjects to learn (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    add("--only", nargs="+", metavar="METHOD", help="methods to run, beside plain (default: all)")
    add("--steps", type=int, default=200, help="optimizer steps per run (default: 200)")
    add("--every", type=int, default=25, help="steps between evaluations in a run (default: 25)")
    add("--reference", type=int, default=100, help="step of the plain run that sets the loss to reach (default: 100)")
    default = ROOT / "benchmarks/forgetting.json"
    add("--json", type=Path, default=default, help="file for the summary (default: benchmarks/forgetting.json)")
    options = parser.parse_args()
    for name in options.only or []:
        check_choice("--only", name, [variant.name for variant in VARIANTS])
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
    own = {"configs": list(variant.configs), "overrides": list(variant.overrides), "training": variant.training}
    return {**own, "prior": variant.prior, "ratio": variant.ratio, **numbers}


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
    """Train, merge, and evaluate the strengths of the merge. Store the result and return it.

    `plain` is the result of the plain run of this seed; None if this run is the plain one, whose strengths are those
    of the step --reference.
    """
    began = time.monotonic()
    logs = options.folder / "runs" / f"{variant.slug}-{seed}"
    shutil.rmtree(logs, ignore_errors=True)
    call(*training_command(variant, seed, logs, options))
    [trained] = logs.iterdir()
    step = options.steps if plain else options.reference
    [checkpoint] = trained.glob(f"checkpoints/*step={step:09d}.ckpt")
    tuned, found = logs / "tuned.safetensors", logs / "strengths"
    call("tools/merge_release.py", "--train-ckpt", checkpoint, "--release", RELEASE, "--out", tuned)
    if variant.extract:
        base, lora = ("--base", RELEASE, "--tuned", tuned), logs / "lora.safetensors"
        call("tools/extract_lora.py", *base, "--rank", variant.extract, "--out", lora)
        tuned = logs / "with-lora.safetensors"
        call("tools/merge_release.py", "--release", RELEASE, "--lora", lora, "--out", tuned)
    sets = [word for name in MEASURED for word in ("--set", f"{name}={shards(options.folder, name)}")]
    sweep = ("--limit", LIMIT, "--batch-size", 16, "--sweep-strength", *STRENGTHS, "--subject", "subject", "new")
    call("tools/evaluate.py", "--base", RELEASE, "--ckpt", tuned, "--config", CONFIG, *sets, *sweep, "--out", found)
    swept = json.loads((found / "strengths.json").read_text(encoding="utf-8"))["strengths"]
    curve = read_curve(trained)
    [reference] = [point for point in curve if point["step"] == options.reference]
    result = {
        "variant": variant.name,
        "seed": seed,
        "commit": commit(),
        "settings": settings(variant, options),
        "prior_samples": count_samples(options.folder, variant.prior) if variant.prior else 0,
        "learnt": {name: (plain["learnt"] if plain else reference)[name] for name in MEASURED},
        "curve": curve,
        "swept": [
            {"step": step, "strength": at["strength"], **{name: values_of(at["sets"][name]) for name in MEASURED}}
            for at in swept
        ],
        "seconds": round(time.monotonic() - began),
    }
    write_text(json.dumps(result, indent=1) + "\n", result_path(variant, seed, options.folder))
    shutil.rmtree(logs)  # the checkpoints take gigabytes
    return result


def values_of(statistics: dict[str, Any]) -> dict[str, float]:
    """Return loss ratio and drift of one set at one strength."""
    return {key: statistics[key]["value"] for key in ("loss_ratio", "drift")}


def commit() -> str:
    """Return the commit of the checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def training_command(variant: Variant, seed: int, logs: Path, options: argparse.Namespace) -> list[object]:
    """Return the `main.py` command with an evaluation and a checkpoint every `--every` steps."""
    callback, kept = "lightning.callbacks.forgetting", "lightning.modelcheckpoint.params"
    overrides = [
        f"data.params.training_urls={shards(options.folder, variant.training)}",
        "data.params.num_workers=0",
        "lightning.callbacks.image_logger.params.disabled=true",
        f"{callback}.target=ldm.callbacks.forgetting.Forgetting",
        f"{callback}.params.every_n_train_steps={options.every}",
        f"{callback}.params.batch_size=16",
        f"{callback}.params.limit={LIMIT}",
        *(f"{callback}.params.sets.{name}={shards(options.folder, name)}" for name in MEASURED),
        f"{kept}.monitor=null",
        f"{kept}.save_top_k=-1",
        f"{kept}.every_n_train_steps={options.every}",
        *variant.overrides,
    ]
    if variant.prior:
        prior = shards(options.folder, variant.prior)
        overrides += [f"data.params.prior_urls={prior}", f"data.params.prior_ratio={variant.ratio}"]
    flags = ("-t", "--no-test", "-s", seed, "--logdir", logs, "--max_steps", options.steps)
    return ["main.py", "--resume", variant.start(options.folder), "--base", *variant.configs, *flags, *overrides]


def read_curve(trained: Path) -> list[dict[str, Any]]:
    """Return the logged metrics of the run in `trained`: per `step`, `loss_ratio` and `drift` of each set."""
    [path] = trained.glob("csv/*/metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[f"eval/{MEASURED[0]}/drift"]]
    keys = ("loss_ratio", "drift")
    return [
        {
            "step": int(row["step"]),
            "strength": 1.0,
            **{name: {key: float(row[f"eval/{name}/{key}"]) for key in keys} for name in MEASURED},
        }
        for row in rows
    ]


if __name__ == "__main__":
    run(main)
