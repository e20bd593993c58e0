"""Pieces of HTML of the page. All text that is not of the program itself is escaped. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from markupsafe import Markup

from ldm.printable import escaped
from ldm.studio.job_progress import Progress, duration, elapsed
from ldm.studio.job_store import FAILED, FINISHED, KILLED, RUNNING, STOPPED, Job, JobState

FILE_ROUTE = "/studio/file"  # of `ldm.studio.server`
_WORDS = {
    RUNNING: "running",
    FINISHED: "finished",
    STOPPED: "stopped",
    FAILED: "failed",
    KILLED: "ended without a word: killed, or the machine went down",
}


def note(text: str, kind: str = "note") -> str:
    """Return a line of text in the style `kind`: `note`, `good` or `bad`."""
    return str(Markup('<p class="studio-{}">{}</p>').format(kind, escaped(text)))


def file_link(path: Path, text: str) -> Markup:
    """Return a link to a file of an allowed folder."""
    return Markup('<a href="{}?{}" target="_blank" rel="noopener">{}</a>').format(
        FILE_ROUTE, urlencode({"path": str(path)}), escaped(text)
    )


def image_slider(left: Path, right: Path, text: str) -> str:
    """Return two copies of images, which the page may show, one over the other. A slider moves the border of both."""
    images = Markup("").join(
        Markup('<img src="/gradio_api/file={}" alt="{}: {}">').format(quote(str(path)), side, escaped(text))
        for side, path in (("left", left), ("right", right))
    )
    slider = '<input type="range" value="50" aria-label="Border between the left and the right image, in percent">'
    return str(Markup('<div class="studio-slider">{}{}</div>').format(images, Markup(slider)))


def job_status(job: Job | None, state: JobState | None, progress: Progress | None, none: str) -> str:
    """Return the commands of a job with their states, and the progress of the running one; `none` without a job."""
    if job is None or state is None:
        return note(none)
    lines = [Markup('<li class="studio-{}">{} <span>{}</span></li>').format(*_step_word(state, number), step.title)
             for number, step in enumerate(job.steps)]  # fmt: skip
    bar = Markup("")
    if progress is not None and state.is_running:
        value = Markup("") if progress.part is None else Markup(' value="{:.4f}"').format(progress.part)
        bar = Markup('<progress max="1"{} aria-label="progress"></progress><p>{}</p>').format(
            value, escaped(progress.text)
        )
    word = "stopping" if state.is_stopping else _WORDS[state.status]
    head = Markup('<p class="studio-state studio-{}" data-state="{}"><b>{}</b>: {}, {}</p>').format(
        state.status, state.status, escaped(job.title), word, duration(elapsed(state))
    )
    return str(head + Markup("<ol>{}</ol>").format(Markup("").join(lines)) + bar)


def _step_word(state: JobState, number: int) -> tuple[str, str]:
    """Return the style and the mark of a command."""
    if number < len(state.codes):
        return ("good", "✓") if state.codes[number] == 0 else ("bad", "✗")
    if state.is_running and number == state.step:
        return "now", "▶"
    return "later", "·"


def last_error(log: str) -> str:
    """Return the error line at the end of a command's log, or its last line."""
    lines = [line for line in log.strip().splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]], marked: Container[int] = ()) -> str:
    """Return a table. The first cell of a row is its heading, numbers are aligned right, and `marked` rows coloured."""
    columns = Markup("").join(Markup('<th scope="col">{}</th>').format(escaped(name)) for name in head)
    lines = [
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="studio-good"') if number in marked else "",
            Markup("").join(_cell(value, is_first=place == 0) for place, value in enumerate(row)),
        )
        for number, row in enumerate(rows)
    ]
    table = '<div class="studio-scroll" tabindex="0"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    return str(Markup(table).format(columns, Markup("").join(lines)))


def _cell(value: object, is_first: bool) -> Markup:
    if is_first:
        return Markup('<th scope="row">{}</th>').format(escaped(str(value)))
    if isinstance(value, (int, float)):
        return Markup('<td class="number">{}</td>').format(value if isinstance(value, int) else f"{value:.2f}")
    return Markup("<td>{}</td>").format(escaped(str(value)))
