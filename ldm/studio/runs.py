"""Runs under `logs/`: their list, and what the page shows of one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ldm.events import START, read_events
from ldm.images.logged_names import PREVIEWS, parse_logged_name
from ldm.reporting.curves import draw_run
from ldm.reporting.metrics import Metrics, read_metrics
from ldm.reporting.run_folder import count_of, is_run_folder
from ldm.studio.html_parts import file_link, note
from ldm.studio.job_progress import Progress, most_steps, training_progress
from ldm.studio.thumbnails import Thumbnails
from ldm.util import UserError


def list_runs(logs: Path) -> list[str]:
    """Return the names of the runs in the folder `logs`, the newest first."""
    if not logs.is_dir():
        return []
    runs = [path for path in logs.iterdir() if is_run_folder(path)]
    return [path.name for path in sorted(runs, reverse=True)]


@dataclass(frozen=True)
class RunView:
    """Metrics and newest images of the run in `folder`. `signature` changes with them."""

    thumbnails: Thumbnails
    folder: Path
    metrics: Metrics
    images: list[Path]
    signature: list[Any]

    def progress(self, log: str) -> Progress:
        """Return the progress of the training with this `log`."""
        return training_progress(log, most_steps(self.folder), self.metrics, _images_per_step(self.folder))

    @property
    def about(self) -> str:
        """Lines with the folder, the newest peak memory and a link to the report, as far as they are known."""
        series, report = self.metrics.series.get("device/peak_memory_gib"), self.folder / "report.html"
        lines = [note(f"run folder: {self.folder}")]
        if series:
            lines.append(note(f"peak memory of the last epoch: {series.last[1]:.2f} GiB"))
        if report.is_file():
            lines.append(f"<p>{file_link(report, 'Open the report')}</p>")
        return "".join(lines)

    def figures(self) -> str:
        """Return the figures of the metrics as HTML."""
        drawn = draw_run(self.metrics, {}, "live")
        figure = Markup('<figure tabindex="0"><figcaption>{}</figcaption>{}</figure>')  # scrolls on a phone
        parts = [figure.format(*one) for one in drawn]
        return str(Markup('<div class="studio-figures">{}</div>').format(Markup("").join(parts)))

    def previews(self) -> list[tuple[str, str]]:
        """Return copies of the newest images, with their prompts and steps."""
        found = []
        for path in self.images:
            name = parse_logged_name(path.name)
            try:
                found.append((str(self.thumbnails.of_png(path)), f"step {name.step}: {name.key}" if name else ""))
            except (OSError, UserError):  # it is being written, or is damaged, or there is no place for the copy
                continue
        return found


def view_run(thumbnails: Thumbnails, folder: Path) -> RunView:
    """Return the view of the run in `folder`: its metrics, and its newest previews or else logged images."""
    metrics = read_metrics(folder, [])
    places = (folder / PREVIEWS, folder / "images" / "train")
    images = next((found for place in places if (found := _newest(place))), [])
    return RunView(
        thumbnails, folder, metrics, images, [metrics.steps, len(metrics.series), [path.name for path in images]]
    )


def _images_per_step(folder: Path) -> int | None:
    """Return the images per step of the newest start of a run, None if they are unknown."""
    with suppress(UserError):
        events, _ = read_events(folder)
        start = next((event for event in reversed(events) if event["kind"] == START), {})
        return count_of(start, "images_per_step")
    return None


def _newest(place: Path) -> list[Path]:
    """Return the images of the last step in a folder of logged images."""
    named = [(name.step, path) for path in sorted(place.glob("*.png")) if (name := parse_logged_name(path.name))]
    last = max((step for step, _ in named), default=0)
    return [path for step, path in named if step == last]
