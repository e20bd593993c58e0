"""Part of a tab: loss and drift of a tuned release and its base on sets of shards."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.reporting.evaluations import NAME, read_evaluations
from ldm.shards.urls import expand_urls, is_stream
from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.commands import Step, evaluate_words, shown
from ldm.studio.controls import Page, command_box, listen
from ldm.studio.fields import RELEASE_CONFIG
from ldm.studio.html_parts import html_table, note
from ldm.studio.job_panel import JobPanel, JobView
from ldm.studio.job_store import FINISHED
from ldm.studio.sampled_images import new_folder
from ldm.util import UserError, refuse_if

_KIND = "evaluate"


def build_evaluation(page: Page) -> None:
    """Add the controls of this part."""
    studio, fields = page.studio, page.fields
    fields["sets"] = gr.Textbox(label="Sets of shards, NAME=SHARDS, one per line", lines=2, elem_id="evaluate-sets")
    command = command_box("Command", "evaluate-command")
    text = "Evaluate the right release against the left"
    panel = JobPanel(page, _KIND, "No evaluation yet.", text, "evaluate-start", "secondary")
    table = gr.HTML(elem_id="evaluate-table")
    figure = gr.Image(label="Evaluation", interactive=False, elem_id="evaluate-figure", type="filepath", buttons=[])
    names = ("compare_base", "compare_tuned", "config", "predicts", "sets")
    inputs = [fields[name] for name in names]

    def read(base: str, tuned: str, config: str, predicts: str, sets: str) -> tuple[list[Step], Path]:
        paths = [studio.allowed.check_existing(path, what) for path, what in
                 ((base, "release on the left"), (tuned, "release on the right"))]  # fmt: skip
        studio.allowed.check_config(config, RELEASE_CONFIG)
        chosen = read_sets(sets, studio.allowed)
        out = new_folder(studio.work / "evaluation")
        return [Step("Evaluate", evaluate_words(*paths, config, predicts, chosen, out))], out

    def begin(*values: str) -> str:
        steps, out = read(*values)
        studio.jobs.check_none_runs(_KIND)
        studio.save(dict(zip(names, values, strict=True)))
        studio.jobs.start(_KIND, "Evaluation", steps, {"out": str(out)})
        return shown(steps)

    def results(view: JobView) -> list[Any]:
        if view.state.status != FINISHED:
            return ["", None]
        folder, image = Path(view.job.about["out"]), None
        with suppress(UserError):
            image = str(studio.thumbnails.of_png((folder / NAME).with_suffix(".png")))
        return [evaluation_html(folder), image]

    listen(panel.start.click, begin, inputs, command)
    panel.watch([table, figure], results)
    page.keep_command(inputs, lambda *values: read(*values)[0], command)


def read_sets(text: str, allowed: AllowedFolders) -> list[str]:
    """Return the sets of a field, each `NAME=SHARDS`, whose shards lie in the allowed folders.

    Raises:
        UserError: a line has no name, or names shards that are missing or elsewhere.
    """
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    refuse_if(not lines, "sets of shards: are empty; give NAME=SHARDS, one per line")
    for line in lines:
        name, equals, shards = line.partition("=")
        refuse_if(
            not (name and equals and shards),
            f"set {line!r:.100}: give NAME=SHARDS, such as cats=outputs/studio/cats/shards/*.tar",
        )
        refuse_if(is_stream(shards), f"set {line!r:.100}: names a stream; give files")
        for path in expand_urls(shards):
            allowed.check_existing(path, "shard")
    return lines


def evaluation_html(folder: Path) -> str:
    """Return the table of the evaluation in `folder`."""
    problems: list[str] = []
    found = next((part for part in read_evaluations(folder, problems) if Path(part.path).parent == folder), None)
    if found is None:
        return note(problems[0] if problems else f"{folder}: has no evaluation", "bad")
    head = ["set", "images", "loss of the left", "loss of the right", "right / left", "drift"]
    rows = [[part.name, part.images, f"{part.loss_base:.5f}", f"{part.loss_tuned:.5f}", part.ratio, part.drift]
            for part in found.sets]  # fmt: skip
    return html_table(head, rows)
