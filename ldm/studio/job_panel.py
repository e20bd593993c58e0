"""Part of a tab that shows the newest job of its kind, and stops it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import gradio as gr

from ldm.studio.controls import listen
from ldm.studio.html_parts import job_status, last_error, note
from ldm.studio.job_progress import bar_progress, elapsed
from ldm.studio.job_store import FAILED, Job, JobState, read_log
from ldm.studio.studio import Studio
from ldm.util import UserError

SECONDS = 1.5  # between two looks at the jobs

Variant = Literal["primary", "secondary"]
# Values of further outputs for the newest job.
Results = Callable[..., list[Any]]


class JobPanel:
    """State, log and stop button of the newest job of `kind`, looked at again and again.

    Args:
        kind: kind of the jobs, and the beginning of the names of the controls.
        none: text if there is no job yet.
        text, name, variant: text, `elem_id` and style of the button that starts a job.
    """

    def __init__(
        self, studio: Studio, kind: str, none: str, text: str, name: str, variant: Variant = "primary"
    ) -> None:
        self.studio, self.kind, self.none = studio, kind, none
        with gr.Row():
            self.start = gr.Button(text, variant=variant, elem_id=name)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{kind}-stop")
        self.status = gr.HTML(note(none), elem_id=f"{kind}-status")
        with gr.Accordion("Output of the command", open=False, elem_id=f"{kind}-output"):
            self.log = gr.Textbox(show_label=False, lines=8, max_lines=16, elem_id=f"{kind}-log", interactive=False)
        self._seen = gr.State(None)
        listen(self.stop.click, self._stop)

    def watch(self, outputs: list[Any], results: Results, inputs: Sequence[Any] = ()) -> None:
        """Show the newest job from now on, and the `results` of job, state and `inputs` in `outputs`."""
        every = gr.Timer(SECONDS)

        def look(seen: Any, *values: Any) -> Any:
            job = self.studio.jobs.newest(self.kind)
            if job is None:
                return gr.skip()
            state = self.studio.jobs.state(job)
            log = read_log(job, state.step)
            now = [job.name, state.status, state.step, len(log), log[-200:], int(elapsed(state))]
            if now == seen:
                return gr.skip()
            try:
                found = results(job, state, *values)
            except (OSError, LookupError, TypeError, ValueError):  # of another version, or files are gone
                found = [gr.skip() for _ in outputs]
            return [now, *self._shown(job, state, log), *found]

        listen(every.tick, look, [self._seen, *inputs], [self._seen, self.status, self.stop, self.log, *outputs])

    def _shown(self, job: Job, state: JobState, log: str) -> list[Any]:
        """Return the values of status, stop button and log."""
        status = job_status(job, state, bar_progress(log), self.none)
        if state.status == FAILED:
            status += note(last_error(log), "bad")
        return [status, gr.update(interactive=state.is_running), f"$ {job.steps[state.step]}\n{log}"]

    def _stop(self) -> None:
        job = self.studio.jobs.running(self.kind)
        if job is None:
            raise UserError("stop: nothing runs here")
        self.studio.jobs.stop(job)
