"""Tab of the release: merging of a run, and links to the result and the report."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import escape

from ldm.studio.commands import Step, lora_words, merge_words, report_words
from ldm.studio.controls import Page, command_box, listen
from ldm.studio.fields import RELEASE_CONFIG, whole_number
from ldm.studio.html_parts import file_link, note
from ldm.studio.job_panel import JobPanel, JobView
from ldm.studio.job_store import FINISHED, Job
from ldm.studio.studio import Studio

_KIND, _LORA = "release", "lora"


def build_release(page: Page) -> None:
    """Add the controls of this tab."""
    studio, fields = page.studio, page.fields
    run = page.run_list("release-run", "release-refresh")
    fields["out"] = gr.Textbox(label="File to write, .safetensors or .ckpt; or a folder with / at its end",
                               elem_id="release-out")  # fmt: skip
    with gr.Row():
        weights = gr.Dropdown([("averaged if there are any", ""), ("averaged", "ema"), ("raw", "raw")], value="",
                              label="Weights", elem_id="release-weights", min_width=260)  # fmt: skip
        half = gr.Checkbox(label="Half precision (float16)", elem_id="release-half")
        strength = gr.Slider(0, 1, 1, step=0.05, label="Strength: share of the training's change",
                             elem_id="release-strength")  # fmt: skip
    command = command_box("Commands", "release-merge-command")
    panel = JobPanel(page, _KIND, "No release yet.", "Merge", "release-merge")
    links = gr.HTML(elem_id="release-links")
    with gr.Accordion("Extract a LoRA", open=False, elem_id="lora-part"):
        build_lora(page)
    inputs = [run, fields["release"], fields["config"], fields["out"], weights, half, strength]

    def read(which: str | None, release: str, config: str, out: str, *options: Any) -> tuple[list[Step], str, str]:
        folder = studio.run_folder(which)
        start = studio.allowed.check_existing(release, "release")
        studio.allowed.check_config(config, RELEASE_CONFIG)
        studio.allowed.check(out, "file to write")
        steps = [Step("Merge", merge_words(folder, start, out, config, *options)), Step("Report", report_words(folder))]
        return steps, str(folder), out

    def start(*values: Any) -> None:
        steps, folder, out = read(*values)
        studio.jobs.check_none_runs(_KIND)
        studio.save({"out": out})
        studio.jobs.start(_KIND, f"Release {out}", steps, {"out": out, "report": f"{folder}/report.html"})

    def results(view: JobView) -> list[Any]:
        return [_links(studio, view.job) if view.state.status == FINISHED else ""]

    listen(panel.start.click, start, inputs)
    panel.watch([links], results)
    page.keep_command(inputs, lambda *values: read(*values)[0], command)


def build_lora(page: Page) -> None:
    """Add the controls that extract the difference of two releases as a LoRA."""
    studio, fields = page.studio, page.fields
    with gr.Row():
        fields["lora_tuned"] = gr.Textbox(label="Tuned release", elem_id="lora-tuned")
        fields["lora"] = gr.Textbox(label="File to write, .safetensors", elem_id="lora-out")
    with gr.Row():
        rank = gr.Number(0, label="Rank; 0 for the tool's", precision=0, minimum=0, elem_id="lora-rank")
        half = gr.Checkbox(label="Half precision (float16)", elem_id="lora-half")
    command = command_box("Command", "lora-command")
    panel = JobPanel(page, _LORA, "No LoRA yet.", "Extract", "lora-start", "secondary")
    links = gr.HTML(elem_id="lora-links")
    inputs = [fields["release"], fields["lora_tuned"], fields["lora"], rank, half]

    def read(base: str, tuned: str, out: str, size: float, is_half: bool) -> list[Step]:
        paths = [studio.allowed.check_existing(path, what) for path, what in
                 ((base, "release"), (tuned, "tuned release"))]  # fmt: skip
        studio.allowed.check(out, "file to write")
        return [Step("Extract a LoRA", lora_words(*paths, out, whole_number(size, "rank"), is_half))]

    def start(*values: Any) -> None:
        steps = read(*values)
        studio.jobs.check_none_runs(_LORA)
        studio.save({"lora_tuned": values[1], "lora": values[2]})
        studio.jobs.start(_LORA, f"LoRA {values[2]}", steps, {"out": values[2]})

    def results(view: JobView) -> list[Any]:
        return [_links(studio, view.job) if view.state.status == FINISHED else ""]

    listen(panel.start.click, start, inputs)
    panel.watch([links], results)
    page.keep_command(inputs, read, command)


def _links(studio: Studio, job: Job) -> str:
    """Return links to the files that a job has written."""
    lines = []
    for key, text in (("out", "Download"), ("report", "Open the report")):
        if key not in job.about:
            continue
        path = studio.allowed.check(job.about[key], "file")
        if path.is_file():
            lines.append(f"<p>{file_link(path, text)} {escape(path)} ({path.stat().st_size / 1e6:.1f} MB)</p>")
        else:
            lines.append(note(f"{path}"))
    return "".join(lines)
