"""Page about one or several runs: one HTML file that opens without a network. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ldm.files import atomic_write
from ldm.printable import escaped
from ldm.reporting.curves import draw_comparison, draw_evaluation, draw_run, held_out_losses, training_loss
from ldm.reporting.evaluations import Evaluation
from ldm.reporting.run_folder import RunRecord, count_of
from ldm.reporting.settings import differences, flat, params_of
from ldm.reporting.training_sets import TrainingSet

_HERE = Path(__file__).parent
_MOST_MOMENTS = 300


def write_page(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page about `runs` to `path`. Several runs are compared first."""
    templates = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = templates.get_template("page.html").render(
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        written=datetime.now().isoformat(sep=" ", timespec="seconds"),
        css=Markup(_read("page.css")),
        js=Markup(_read("page.js")),
        comparison=_compare(runs) if len(runs) > 1 else None,
        runs=[_run(run, f"r{number}") for number, run in enumerate(runs)],
    )
    # Names and captions of other people can hold control characters, which are not valid in HTML.
    with atomic_write(path) as temporary:
        temporary.write_text(escaped(html, keep="\n\t"), encoding="utf-8")


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _run(run: RunRecord, prefix: str) -> dict[str, Any]:
    """Return the values of the template for one run."""
    moments = run.moments
    if len(moments) > _MOST_MOMENTS:
        moments = moments[: _MOST_MOMENTS // 2] + moments[-_MOST_MOMENTS // 2 :]
    return {
        "name": run.name,
        "about": list(_about(run).items()),
        "problems": run.problems,
        "base": " + ".join(run.settings.base),
        "settings": [(row.key, *row.values) for row in run.settings.differences],
        "figures": draw_run(run.metrics, run.forecast, prefix),
        "metrics": _metrics(run),
        "strips": run.strips,
        "sets": [_set(part) for part in run.sets],
        "sheet": run.contents.images,
        "lines": run.contents.lines,
        "evaluations": [_evaluation(part, f"{prefix}e{number}") for number, part in enumerate(run.evaluations)],
        "moments": moments,
        "commands": _commands(run),
    }


def _about(run: RunRecord) -> dict[str, str]:
    """Return the rows of the first table; unknown values are left out."""
    start, params = run.start, params_of(run.settings.config, "model")
    families = dict.fromkeys(part.family for part in run.sets if part.family)
    seconds = run.metrics.series.get("device/step_seconds")
    memory = run.metrics.series.get("device/peak_memory_gib")
    images, trained = count_of(start, "images_per_step"), count_of(start, "trained")
    rows = {
        "run": str(run.folder),
        "state": run.state,
        "steps": str(run.metrics.steps) if run.metrics.series else None,
        "release": run.release.get("name"),
        "release, SHA-256": run.release.get("sha256"),
        "started from": start.get("resume"),
        "family of the shards": ", ".join(families) or None,
        "config": " + ".join(run.settings.base) or None,
        "model": run.settings.config.get("model", {}).get("target"),
        "parameterization": params.get("parameterization", "eps") if params.get("unet_config") else None,
        "trained parameters": None if trained is None else f"{trained:,}",
        "device": start.get("device"),
        "processes": start.get("processes"),
        "images per step": images,
        "images per second, median of epochs": f"{images / median(seconds.values):.3g}"
        if images is not None and seconds and median(seconds.values) > 0
        else None,
        "peak memory, measured": f"{max(memory.values):.2f} GiB" if memory else None,
        **{f"peak memory of the {place}, forecast": f"{size:.2f} GiB" for place, size in run.forecast.items()},
        "seed": start.get("seed"),
        "software": start.get("software"),
    }
    return {label: str(value) for label, value in rows.items() if value is not None}


def _metrics(run: RunRecord) -> list[tuple[str, ...]]:
    rows = []
    for name, series in run.metrics.series.items():
        (step, last), (at, least) = series.last, series.least
        rows.append((name, f"{series.values[0]:.6g}", f"{last:.6g}", str(step), f"{least:.6g}", str(at)))
    return rows


def _set(part: TrainingSet) -> tuple[str, ...]:
    notes = [] if part.complete else ["unfinished"]
    if part.failed:
        notes.append(f"{len(part.failed)} images could not be read, such as {part.failed[0]}")
    samples = "" if part.samples is None else str(part.samples)
    return (
        part.name,
        str(part.shards),
        samples,
        f"{part.size / 1e6:.1f}",
        part.family or "",
        "; ".join(notes),
        part.urls,
    )


def _evaluation(part: Evaluation, prefix: str) -> dict[str, Any]:
    return {
        "base": part.base,
        "tuned": part.tuned,
        "path": part.path,
        "rows": [
            (row.name, str(row.images), f"{row.loss_base:.5f}", f"{row.loss_tuned:.5f}", row.ratio, row.drift)
            for row in part.sets
        ],
        "figures": draw_evaluation(part, prefix),
        "image": part.figure,
    }


def _commands(run: RunRecord) -> list[tuple[str, str]]:
    """Return the purpose and the text of the commands that use the run's last checkpoint."""
    if not run.last.is_file():
        return []
    go_on = ["python", "main.py", "--resume", str(run.folder), "-t"]
    words = run.start.get("command")
    if isinstance(words, list) and "--trust-config" in words:
        go_on.append("--trust-config")
    release = ["--release", str(run.release["name"])] if run.release.get("name") else []
    merge = ["python", "tools/merge_release.py", "--train-ckpt", str(run.last), *release, "--out", "mine.safetensors"]
    report = ["python", "tools/report.py", str(run.folder)]
    return [
        ("Continue the training; add the options of the first start, such as --gpus 0,", shlex.join(go_on)),
        ("Merge the newest checkpoint into a release:", shlex.join(merge)),
        ("Write this page again:", shlex.join(report)),
    ]


def _compare(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the values of the template for the comparison of `runs`."""
    labels = [f"{number}: {run.name}" for number, run in enumerate(runs, start=1)]
    metrics = [run.metrics for run in runs]
    losses = [
        ("training loss", *(_last(run, training_loss(run.metrics)) for run in runs)),
        ("held-out loss", *(_last(run, next(iter(held_out_losses(run.metrics)), None)) for run in runs)),
    ]
    names = sorted({name for one in metrics for name in one.series})
    return {
        "names": labels,
        "runs": [(label, run.state, str(run.metrics.steps)) for label, run in zip(labels, runs, strict=True)],
        "figures": draw_comparison(list(zip(labels, metrics, strict=True))),
        "losses": [row for row in losses if any(row[1:])],
        "metrics": [(name, *(_last(run, name) for run in runs)) for name in names],
        "columns": list(range(1, len(runs) + 1)),
        "settings": [(row.key, *row.values) for row in differences([flat(run.settings.config) for run in runs])],
    }


def _last(run: RunRecord, name: str | None) -> str:
    series = run.metrics.series.get(name or "")
    return "" if series is None else f"{series.last[1]:.6g}"
