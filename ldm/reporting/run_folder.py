"""Content of a run folder, as far as it is there and undamaged. Imports no torch."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from ldm.events import END, FAULT, FORECAST, START, STOP, read_events
from ldm.locks import LOCK, is_held
from ldm.reporting.evaluations import Evaluation, read_evaluations
from ldm.reporting.metrics import Metrics, read_metrics
from ldm.reporting.settings import RunSettings, read_settings
from ldm.reporting.strips import Strip, read_strips
from ldm.reporting.training_sets import Contents, TrainingSet, read_training_sets
from ldm.training.arguments import parse_arguments
from ldm.util import UserError, refuse_if

PARTS = ("configs", "csv", "checkpoints", "images")  # a run folder has one of these
_ENDS = {END: "finished", STOP: "stopped", FAULT: "ended by an error"}
_FOUND = "found in the folder"


@dataclass(frozen=True)
class Moment:
    """Row of the time line."""

    time: str
    step: int | None
    kind: str
    text: str


@dataclass
class RunRecord:
    """Everything that a report shows of a run. `problems` has a line for each damaged part."""

    folder: Path
    state: str
    metrics: Metrics
    settings: RunSettings
    events: list[dict[str, Any]]
    moments: list[Moment]
    strips: list[Strip]
    sets: list[TrainingSet]
    evaluations: list[Evaluation]
    problems: list[str]
    contents: Contents = field(default_factory=lambda: Contents([], []))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def configs(self) -> list[Path]:
        return sorted(self.folder.glob("configs/*.yaml"))

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def start(self) -> dict[str, Any]:
        """Values of the newest start, empty for a run that recorded none."""
        return next((event for event in reversed(self.events) if event["kind"] == START), {})

    @property
    def release(self) -> Mapping[str, Any]:
        """Name and SHA-256 of the release that training started from, empty if they are unknown."""
        found = self.start.get("release")
        return found if isinstance(found, dict) else {}

    @property
    def forecast(self) -> dict[str, float]:
        """Predicted memory in GiB by `device` and `host`, of the newest forecast."""
        found = next((event for event in reversed(self.events) if event["kind"] == FORECAST), {})
        return _gib(found)


def is_run_folder(folder: Path) -> bool:
    """Return True if `folder` has a part of a run folder."""
    return any((folder / part).is_dir() for part in PARTS)


def read_run(folder: Path, budget: int) -> RunRecord:
    """Read the run in `folder`. Its images have at most `budget` bytes in a page.

    Raises:
        UserError: the folder is missing, or not of a run.
    """
    refuse_if(not folder.exists(), f"{folder}: no such run folder; give logs/<time>_<name>")
    refuse_if(
        not is_run_folder(folder),
        f"{folder}: not a run folder, which has {', '.join(PARTS)}; give logs/<time>_<name>",
    )
    problems: list[str] = []
    events = _read_events(folder, problems)
    metrics = read_metrics(folder, problems)
    configs = sorted(folder.glob("configs/*.yaml"))
    settings = read_settings(configs, _typed_configs(events), problems)
    return RunRecord(
        folder,
        _state(folder, events),
        metrics,
        settings,
        events,
        _moments(folder, configs, events, metrics),
        read_strips(folder, budget, problems),
        read_training_sets(settings.config, problems),
        read_evaluations(folder, problems),
        problems,
    )


def _read_events(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        events, damaged = read_events(folder)
    except UserError as error:
        problems.append(str(error))
        return []
    if damaged:
        problems.append(f"events.jsonl: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return events


def _typed_configs(events: list[dict[str, Any]]) -> list[str]:
    """Return the configs given with `--base` at the first start."""
    words = next((event.get("command") for event in events if event["kind"] == START), None)
    if not isinstance(words, list):
        return []
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # argparse prints its help and errors
            return parse_arguments([str(word) for word in words[1:]]).base
    except (UserError, SystemExit):  # a command line of another program
        return []


def _state(folder: Path, events: list[dict[str, Any]]) -> str:
    last = next((event["kind"] for event in reversed(events) if event["kind"] in (START, *_ENDS)), None)
    if last in _ENDS:
        return _ENDS[last]
    if is_held(folder / LOCK):
        return "under way"
    return "killed, or under way on another machine" if last == START else "not recorded how it ended"


def _moments(folder: Path, configs: list[Path], events: list[dict[str, Any]], metrics: Metrics) -> list[Moment]:
    """Return the time line: the recorded events; for a run without any, its configs; and its checkpoints.

    Events keep their order, also if the clock was set back between them.
    """
    moments = [Moment(event["time"], event.get("step"), event["kind"], _described(event)) for event in events]
    places = list(accumulate((moment.time for moment in moments), max))
    if not any(event["kind"] == START for event in events):
        starts = [path.name.removesuffix("-project.yaml") for path in configs if path.name.endswith("-project.yaml")]
        moments += [Moment(_readable(start), None, START, _FOUND) for start in starts]
    for path in sorted(folder.glob("checkpoints/**/*.ckpt")):
        try:
            status = path.stat()
        except OSError:
            continue
        written = datetime.fromtimestamp(status.st_mtime).isoformat(timespec="seconds")
        moments.append(Moment(written, None, "checkpoint", f"{path.name}, {status.st_size / 1e6:.1f} MB"))
    for name, steps in metrics.not_finite.items():
        moments.append(Moment("", steps[0], FAULT, f"{name} is not finite at {len(steps)} logged steps"))
    places += [moment.time for moment in moments[len(places) :]]
    return [moment for _, moment in sorted(zip(places, moments, strict=True), key=lambda pair: pair[0])]


def _readable(start: str) -> str:
    """Return the prefix of a config's name as a time: `2026-01-02T03-04-05` → `2026-01-02T03:04:05`."""
    day, _, time = start.partition("T")
    return f"{day}T{time.replace('-', ':')}"


def _described(event: Mapping[str, Any]) -> str:
    if isinstance(event.get("command"), list):
        return shlex.join(["python", *map(str, event["command"])])
    if event["kind"] == FORECAST:
        return ", ".join(f"{place} {size:.2f} GiB" for place, size in _gib(event).items())
    return str(event.get("text", ""))


def _gib(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the memory in GiB by `device` and `host` in a forecast."""
    sizes = {place: count_of(event, f"{place}_bytes") for place in ("device", "host")}
    return {place: size / 2**30 for place, size in sizes.items() if size is not None}


def count_of(event: Mapping[str, Any], key: str) -> int | None:
    """Return the count `key` of an event, or None if there is none."""
    value = event.get(key)
    return value if type(value) is int and 0 <= value < 1 << 63 else None
