"""Tab of the training: the commands from images to a run, their progress, and the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ldm.cli.paths import LOGS
from ldm.studio.commands import Step, TrainingRecipe, pipeline, resume_words
from ldm.studio.controls import Page, command_box, gallery, listen
from ldm.studio.fields import RECIPE, read_recipe
from ldm.studio.html_parts import file_link, job_status, last_error, note
from ldm.studio.job_panel import SECONDS
from ldm.studio.job_progress import Progress, bar_progress, elapsed, most_steps, run_folder, training_progress
from ldm.studio.job_store import FAILED, Job, JobState, read_log
from ldm.studio.plan_tab import write_recipe
from ldm.studio.runs import RunView, list_runs, view_run
from ldm.studio.studio import Studio
from ldm.util import UserError

_KIND = "train"
_NONE = "No training yet."


def build_train(page: Page) -> None:
    """Add the controls of this tab."""
    studio, fields = page.studio, page.fields
    commands = command_box("Commands, in this order", "train-commands")
    fields["overwrite"].render()
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id="train-start")
        stop = gr.Button("Save and stop", variant="stop", interactive=False, elem_id="train-stop")
        save = gr.Button("Save now", interactive=False, elem_id="train-save")
    status = gr.HTML(note(_NONE), elem_id="train-status")
    previews = gallery("Newest previews", "train-previews", height=260)
    figures = gr.HTML(elem_id="train-figures")
    with gr.Accordion("Output of the command", open=False, elem_id="train-output"):
        log = gr.Textbox(show_label=False, lines=8, max_lines=16, elem_id="train-log", interactive=False)
    run = page.run_list("train-run", "train-refresh")
    resume = gr.Button("Resume this run", elem_id="train-resume")
    resumed = command_box("Command to resume", "train-resume-command")
    inputs = [fields[name] for name in RECIPE]

    def read(values: tuple[Any, ...]) -> TrainingRecipe:
        return read_recipe(dict(zip(RECIPE, values, strict=True)), studio.allowed, studio.work, bool(studio.card))

    def begin(*values: Any) -> None:
        recipe = read(values)
        studio.jobs.check_none_runs(_KIND)
        studio.save(dict(zip(RECIPE, values, strict=True)))
        write_recipe(recipe)
        studio.jobs.start(_KIND, f"Train {recipe.name}", pipeline(recipe), {"name": recipe.name})

    def begin_again(which: str | None) -> None:
        studio.jobs.check_none_runs(_KIND)
        studio.jobs.start(_KIND, f"Resume {which}", [_resume_step(studio, which)])

    def stop_it() -> None:
        studio.jobs.stop(_running(studio))

    def save_it() -> None:
        studio.jobs.save_now(_running(studio))
        gr.Info("The training writes its checkpoint after this step.")

    listen(start.click, begin, inputs)
    listen(resume.click, begin_again, run)
    listen(stop.click, stop_it)
    listen(save.click, save_it)
    page.keep_command(inputs, lambda *values: pipeline(read(values)), commands)
    page.keep_command([run], lambda which: [_resume_step(studio, which)], resumed)
    _watch(studio, [status, start, stop, save, log, previews, figures, run])


def _running(studio: Studio) -> Job:
    job = studio.jobs.running(_KIND)
    if job is None:
        raise UserError("no training is running")
    return job


def _resume_step(studio: Studio, run: str | None) -> Step:
    return Step("Continue the training", resume_words(studio.run_folder(run), bool(studio.card)))


def _watch(studio: Studio, outputs: list[Any]) -> None:
    """Look at the newest training again and again."""
    seen = gr.State(None)

    def look(before: Any) -> Any:
        job = studio.jobs.newest(_KIND)
        if job is None:
            return gr.skip()
        state = studio.jobs.state(job)
        text = read_log(job, state.step)
        folder = run_folder(job)
        view = view_run(studio.thumbnails, folder) if folder is not None else None
        seconds = int(elapsed(state))
        now = [job.name, state.status, state.step, len(text), text[-200:], seconds, view.signature if view else None]
        if now == before:
            return gr.skip()
        drawn = gr.skip() if before and before[-1] == now[-1] and before[0] == now[0] else None
        return [now, *_shown(job, state, text, folder, view, drawn)]

    listen(gr.Timer(SECONDS).tick, look, seen, [seen, *outputs])


def _shown(job: Job, state: JobState, text: str, folder: Path | None, view: RunView | None, drawn: Any) -> list[Any]:
    """Return the values of status, start, stop, save, log, previews, figures and runs. `drawn` replaces the figures."""
    progress: Progress = bar_progress(text)
    if folder is not None and view is not None:
        progress = training_progress(text, most_steps(folder), view.metrics)
    status = job_status(job, state, progress, _NONE)
    if state.status == FAILED:
        status += note(last_error(text), "bad")
    if folder is not None:
        status += note(f"run folder: {folder}") + (view.memory if view else "")
        report = folder / "report.html"
        if report.is_file():
            status += f"<p>{file_link(report, 'Open the report')}</p>"
    running = gr.update(interactive=state.is_running)
    previews, figures = (view.previews(), view.figures()) if view and drawn is None else (drawn, drawn)
    if view is None:
        previews, figures = [], ""
    runs = list_runs(LOGS)
    chosen = gr.update(choices=runs, value=folder.name) if folder and folder.name in runs else gr.update(choices=runs)
    return [status, gr.update(interactive=not state.is_running), running, running,
            f"$ {job.steps[state.step]}\n{text}", previews, figures, chosen]  # fmt: skip
