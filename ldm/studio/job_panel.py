"""Part of a tab that shows the newest job of its kind, and stops it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from ldm.studio.controls import Page, listen
from ldm.studio.html_parts import job_status, last_error, note
from ldm.studio.job_progress import bar_progress, elapsed, run_folder
from ldm.studio.job_store import FAILED, Job, JobState, read_log
from ldm.studio.runs import RunView, view_run
from ldm.util import refuse_if

Variant = Literal["primary", "secondary"]


@dataclass(frozen=True)
class JobView:
    """View of a job: its state, the end of the log of its present command, and its run, if any."""

    job: Job
    state: JobState
    log: str
    run: RunView | None = None

    @property
    def signature(self) -> list[Any]:
        """Value that changes with the view."""
        run = self.run.signature if self.run else None
        seconds = int(elapsed(self.state))
        state = [self.state.status, self.state.step, self.state.is_stopping]
        return [self.job.name, *state, len(self.log), self.log[-200:], seconds, run]


# Values of further outputs for the newest job.
Results = Callable[..., list[Any]]


class JobPanel:
    """Start and stop buttons, state and log of the newest job of `kind`, looked at again and again.

    Args:
        kind: kind of the jobs, and the beginning of the names of the controls.
        none: text if there is no job yet.
        text, name, variant: text, `elem_id` and style of the button that starts a job.
        stop: text of the button that stops it.
        has_run: whether the last command of a job is a training, whose run is shown too.
    """

    def __init__(
        self,
        page: Page,
        kind: str,
        none: str,
        text: str,
        name: str,
        variant: Variant = "primary",
        stop: str = "Stop",
        has_run: bool = False,
    ) -> None:
        self.page, self.studio = page, page.studio
        self.kind, self.none, self.has_run = kind, none, has_run
        with gr.Row() as self.buttons:
            self.start = gr.Button(text, variant=variant, elem_id=name)
            self.stop = gr.Button(stop, variant="stop", interactive=False, elem_id=f"{kind}-stop")
        self.status = gr.HTML(note(none), elem_id=f"{kind}-status")
        with gr.Accordion("Output of the command", open=False, elem_id=f"{kind}-output"):
            self.log = gr.Textbox(show_label=False, lines=8, max_lines=16, elem_id=f"{kind}-log", interactive=False)
        listen(self.stop.click, self._stop)

    def watch(self, outputs: list[Any], results: Results, inputs: Sequence[Any] = ()) -> None:
        """Show the newest job from now on, and the `results` of its view and `inputs` in `outputs`."""

        def signature() -> list[Any] | None:
            view = self._view()
            return None if view is None else view.signature

        def show(*values: Any) -> Any:
            view = self._view()
            if view is None:
                return gr.skip()
            try:
                found = results(view, *values)
            except (OSError, LookupError, TypeError, ValueError):  # of another version, or files are gone
                found = [gr.skip() for _ in outputs]
            return [*self._shown(view), *found]

        self.page.watch(signature, show, inputs, [self.status, self.start, self.stop, self.log, *outputs])

    def _view(self) -> JobView | None:
        """Return the view of the newest job, None if there is none."""
        job = self.studio.jobs.newest(self.kind)
        if job is None:
            return None
        state = self.studio.jobs.state(job)
        folder = run_folder(job) if self.has_run else None
        run = view_run(self.studio.thumbnails, folder) if folder is not None else None
        return JobView(job, state, read_log(job, state.step), run)

    def _shown(self, view: JobView) -> list[Any]:
        """Return the values of status, start and stop buttons, and log."""
        job, state, log, run = view.job, view.state, view.log, view.run
        status = job_status(job, state, bar_progress(log) if run is None else run.progress(log), self.none)
        if state.status == FAILED:
            status += note(last_error(log), "bad")
        if run is not None:
            status += run.about
        start, stop = gr.update(interactive=not state.is_running), gr.update(interactive=state.is_running)
        return [status, start, stop, f"$ {job.steps[state.step]}\n{log}"]

    def _stop(self) -> None:
        job = self.studio.jobs.running(self.kind)
        refuse_if(job is None, "stop: nothing runs here")
        self.studio.jobs.stop(job)
