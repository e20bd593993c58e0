"""Tab of the release: merging of a run, and links to the result and the report."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ldm.cli.paths import LOGS
from ldm.studio.commands import Step, merge_words, report_words, shown
from ldm.studio.html_parts import file_link, note
from ldm.studio.job_panel import JobPanel
from ldm.studio.jobs import FINISHED, Job, JobState
from ldm.studio.runs import list_runs
from ldm.studio.studio import Page, Studio, listen
from ldm.util import UserError

_KIND = "release"


def build_release(page: Page) -> None:
    """Add the controls of this tab."""
    studio, fields = page.studio, page.fields
    with gr.Row():
        run = gr.Dropdown(list_runs(LOGS), label="Run", elem_id="release-run", scale=3)
        refresh = gr.Button("List runs again", elem_id="release-refresh")
    fields["out"] = gr.Textbox(label="File to write, .safetensors or .ckpt; or a folder with / at its end",
                               elem_id="release-out")  # fmt: skip
    with gr.Row():
        weights = gr.Dropdown([("averaged if there are any", ""), ("averaged", "ema"), ("raw", "raw")], value="",
                              label="Weights", elem_id="release-weights")  # fmt: skip
        half = gr.Checkbox(label="Half precision (float16)", elem_id="release-half")
        strength = gr.Slider(0, 1, 1, step=0.05, label="Strength: share of the training's change",
                             elem_id="release-strength")  # fmt: skip
    command = gr.Code(label="Commands", language="shell", interactive=False, elem_id="release-merge-command",
                      buttons=["copy"])  # fmt: skip
    merge = gr.Button("Merge", variant="primary", elem_id="release-merge")
    panel = JobPanel(studio, _KIND, "No release yet.")
    links = gr.HTML(elem_id="release-links")
    inputs = [run, fields["release"], fields["config"], fields["out"], weights, half, strength]

    def read(which: str | None, release: str, config: str, out: str, *options: Any) -> tuple[list[Step], str, str]:
        if not which:
            raise UserError("no run is chosen; choose one in the list")
        folder = studio.allowed.check_folder(LOGS / which, "run")
        start = studio.allowed.check_existing(release, "release")
        studio.allowed.check(out, "file to write")
        steps = [Step("Merge", merge_words(folder, start, out, config, *options)), Step("Report", report_words(folder))]
        return steps, str(folder), out

    def show_command(*values: Any) -> str:
        try:
            return shown(read(*values)[0])
        except UserError as error:
            return f"# {error}"

    def start(*values: Any) -> None:
        steps, folder, out = read(*values)
        if studio.jobs.running(_KIND):
            raise UserError("a release is being written; wait for it, or stop it")
        studio.save({"out": out})
        studio.jobs.start(_KIND, f"Release {out}", steps, {"out": out, "report": f"{folder}/report.html"})

    def results(job: Job, state: JobState) -> list[Any]:
        if state.status != FINISHED:
            return [""]
        return [_links(studio, job)]

    def refreshed() -> Any:
        runs = list_runs(LOGS)
        return gr.update(choices=runs, value=runs[0] if runs else None)

    listen(refresh.click, refreshed, None, run)
    listen(merge.click, start, inputs)
    panel.watch([links], results)
    page.keep_shown(inputs, show_command, command)


def _links(studio: Studio, job: Job) -> str:
    """Return links to the files that a job has written."""
    lines = []
    for key, text in (("out", "Download"), ("report", "Open the report of")):
        path = studio.allowed.check(job.about.get(key, ""), "file")
        if path.is_file():
            lines.append(f"<p>{file_link(path, f'{text} {path}')} ({path.stat().st_size / 1e6:.1f} MB)</p>")
        else:
            lines.append(note(f"{path}"))
    return "".join(lines)
