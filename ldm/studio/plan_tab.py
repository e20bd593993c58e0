"""Tab of the plan: release, card and settings; the tiers that fit; and the config of the training."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import gradio as gr
import yaml

from ldm.cli.paths import LOGS
from ldm.files import atomic_write
from ldm.planning import TIERS
from ldm.studio.commands import Step, TrainingRecipe, path_word, plan_words, recipe_values
from ldm.studio.controls import Page, command_box, listen
from ldm.studio.fields import BASE_CONFIG, RECIPE, read_recipe, recognise_release
from ldm.studio.html_parts import note
from ldm.studio.job_panel import JobPanel, JobView
from ldm.studio.job_store import FINISHED
from ldm.studio.plan_table import advice, measured_speeds, tier_rows, tiers_html
from ldm.util import UserError, check_number

_TIERS = [("none: as the config says", ""), *((name, name) for name in TIERS)]
_KIND = "plan"


def build_plan(page: Page) -> None:
    """Add the controls of this tab, and the fields of the recipe besides the folder of images."""
    studio, fields = page.studio, page.fields
    add_model_fields(page)
    with gr.Row():
        fields["card"] = gr.Number(label=f"Memory of the card in GB ({studio.card or 'no NVIDIA card found'})",
                                   minimum=0, elem_id="plan-card")  # fmt: skip
        fields["ram"] = gr.Number(label="Memory of this machine in GB; 0 for any amount", minimum=0, elem_id="plan-ram")
        fields["minutes"] = gr.Number(label="Time budget in minutes; 0 for none", minimum=0, elem_id="plan-minutes")
    command = command_box("Command", "plan-command")
    panel = JobPanel(page, _KIND, "No plan yet.", "What fits?", "plan-compute")
    table = gr.HTML(elem_id="plan-table")
    add_training_fields(fields)
    write = gr.Button("Write the YAML", variant="primary", elem_id="plan-write")
    written = command_box("Config of this training", "plan-yaml")
    names = (*RECIPE, "card", "ram")
    fields["overwrite"] = gr.Checkbox(label="Replace the shards of an earlier run of this name", render=False,
                                      elem_id="train-overwrite")  # fmt: skip
    inputs = [fields[name] for name in names]

    def read(*values: Any) -> tuple[TrainingRecipe, dict[str, Any]]:
        given = dict(zip(names, values, strict=True))
        check_number("memory of the card", given["card"], above=0, whole=False, unit="GB")
        return read_recipe(given, studio.allowed, studio.work, bool(studio.card)), given

    def steps_of(recipe: TrainingRecipe, given: dict[str, Any]) -> list[Step]:
        return [Step("Predict the memory", plan_words(recipe, given["card"], given["ram"] or 0))]

    def start(*values: Any) -> None:
        recipe, given = read(*values)
        studio.save(given)
        about = {"base": recipe.base, "minutes": recipe.minutes}
        studio.jobs.start(_KIND, f"Plan for {given['card']:g} GB", steps_of(recipe, given), about)

    def write_yaml(*values: Any) -> str:
        recipe, given = read(*values)
        studio.save(given)
        return write_recipe(recipe)

    panel.watch([table], plan_results)
    listen(panel.start.click, start, inputs)
    listen(write.click, write_yaml, inputs, written)
    page.keep_command(inputs, lambda *values: steps_of(*read(*values)), command)


def plan_results(view: JobView) -> list[Any]:
    """Return the table of a plan that is finished, and what to choose."""
    if view.state.status != FINISHED:
        return [""]
    with suppress(ValueError, KeyError, TypeError, IndexError):
        found = json.loads(view.log.strip().splitlines()[-1])
        rows = tier_rows(found, measured_speeds(LOGS, view.job.about["base"]))
        text = advice(rows, found["use"], view.job.about["minutes"])
        return [tiers_html(rows, found["use"]) + note(text, "good" if found["use"] else "bad")]
    return [note("the planner's answer cannot be read", "bad")]


def add_model_fields(page: Page) -> None:
    """Add the fields of the release and its configs, and tell its family."""
    studio, fields = page.studio, page.fields
    with gr.Row():
        fields["name"] = gr.Textbox(label="Name of the run", elem_id="plan-name")
        fields["release"] = gr.Textbox(label="Release to fine-tune", elem_id="plan-release", scale=3)
    recognised = gr.HTML(elem_id="plan-recognised")
    with gr.Row():
        fields["config"] = gr.Textbox(label="Config of the release; empty for its family's", elem_id="plan-config")
        fields["base"] = gr.Textbox(label="Config of the training; empty for its family's", elem_id="plan-base")
        fields["predicts"] = gr.Dropdown([("as the file says", ""), "eps", "v"], label="Prediction",
                                         elem_id="plan-predicts")  # fmt: skip
    with gr.Row():
        fields["size"].render()
        fields["flip"] = gr.Checkbox(label="Also train on mirror images", elem_id="plan-flip")
    asked = [fields[name] for name in ("release", "base", "predicts", "size")]

    def recognise(release: str, base: str, predicts: str, size: float) -> str:
        try:
            path = studio.allowed.check_existing(release, "release")
            studio.allowed.check_config(base, BASE_CONFIG)
            found = recognise_release(path, base, predicts, int(size or 0))
        except UserError as error:
            return note(str(error), "bad")
        return note(f"recognised: {found.text}; trained with {found.base}", "good")

    page.keep_shown(asked, recognise, recognised)


def add_training_fields(fields: dict[str, Any]) -> None:
    """Add the fields of the training and its previews."""
    with gr.Row():
        fields["tier"] = gr.Dropdown(_TIERS, label="Tier", elem_id="plan-tier", min_width=260)
        fields["batch"] = gr.Number(label="Images per step; 0 for the config's", precision=0, minimum=0,
                                    elem_id="plan-batch")  # fmt: skip
        fields["steps"] = gr.Number(label="Steps; 0 for the config's", precision=0, minimum=0, elem_id="plan-steps")
        fields["rate"] = gr.Number(label="Learning rate per image; 0 for the config's", minimum=0, elem_id="plan-rate")
    with gr.Row():
        fields["prompts"] = gr.Textbox(
            label="Prompts of previews, one per line", lines=3, elem_id="plan-prompts", scale=3
        )
        fields["preview_steps"] = gr.Number(label="Steps between previews; 0 for 500", precision=0, minimum=0,
                                            elem_id="plan-preview-steps")  # fmt: skip


def write_recipe(recipe: TrainingRecipe) -> str:
    """Write the config of the training of `recipe`, and return its text."""
    text = yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True)
    with atomic_write(recipe.yaml) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return f"# {path_word(recipe.yaml)}\n{text}"
