"""Tab of the training: the commands from images to a run, their progress, and the runs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ldm.cli.paths import LOGS
from ldm.reporting.run_folder import is_run_folder
from ldm.studio.commands import Step, TrainingRecipe, pipeline, resume_words
from ldm.studio.controls import Page, command_box, gallery, listen
from ldm.studio.fields import RECIPE, read_recipe
from ldm.studio.job_panel import JobPanel, JobView
from ldm.studio.plan_tab import write_recipe
from ldm.studio.runs import list_runs
from ldm.studio.studio import Studio
from ldm.util import refuse_if

_KIND = "train"


def build_train(page: Page) -> None:
    """Add the controls of this tab."""
    studio, fields = page.studio, page.fields
    commands = command_box("Commands, in this order", "train-commands")
    fields["overwrite"].render()
    panel = JobPanel(page, _KIND, "No training yet.", "Start", "train-start", stop="Save and stop", has_run=True)
    with panel.buttons:
        save = gr.Button("Save now", interactive=False, elem_id="train-save")
    previews = gallery("Newest previews", "train-previews", height=320)
    figures = gr.HTML(elem_id="train-figures")
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

    def save_it() -> None:
        job = studio.jobs.running(_KIND)
        refuse_if(job is None, "save now: no training is running")
        studio.jobs.save_now(job)
        gr.Info("The training writes its checkpoint after this step.")

    listen(panel.start.click, begin, inputs)
    listen(resume.click, begin_again, run)
    listen(save.click, save_it)
    page.keep_command(inputs, lambda *values: pipeline(read(values)), commands)
    page.keep_command([run], lambda which: [_resume_step(studio, which)], resumed)
    drawn = gr.State(None)
    panel.watch([drawn, save, previews, figures, run], training_results, [drawn])


def _resume_step(studio: Studio, run: str | None) -> Step:
    return Step("Continue the training", resume_words(studio.run_folder(run), bool(studio.card)))


def training_results(view: JobView, drawn: Any) -> list[Any]:
    """Return the values of what is drawn, save button, previews, figures and runs. Equal figures are not sent again."""
    run, save = view.run, gr.update(interactive=view.state.is_running)
    # A start names its run folder in the log before the folder has the parts by which `list_runs` knows a run.
    listed = run.folder.name if run is not None and is_run_folder(LOGS / run.folder.name) else None
    now = [view.job.name, listed, run and run.signature]
    if now == drawn:
        return [gr.skip(), save, gr.skip(), gr.skip(), gr.skip()]
    runs = list_runs(LOGS)
    # The run is chosen when it is listed; after that, the choice is the user's.
    is_new = listed is not None and (not drawn or drawn[:2] != now[:2])
    chosen = gr.update(choices=runs, value=listed) if is_new else gr.update(choices=runs)
    return [now, save, *([run.previews(), run.figures()] if run else [[], ""]), chosen]
