"""Tab of comparisons: two releases side by side, the strength of a training, and an evaluation."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.models.diffusion.samplers import SAMPLERS
from ldm.studio.commands import SampleSettings, Step, sample_words, shown
from ldm.studio.controls import Page, command_box, listen
from ldm.studio.evaluation_part import build_evaluation
from ldm.studio.fields import RELEASE_CONFIG
from ldm.studio.html_parts import image_slider
from ldm.studio.job_panel import JobPanel, JobView
from ldm.studio.sampled_images import about_samples, new_folder, read_sampling, sampled_files
from ldm.studio.strength_part import build_strength
from ldm.studio.studio import Studio
from ldm.util import UserError

_KIND = "compare"
SAMPLING = ("compare_prompts", "seed", "count", "sample_steps", "scale", "sampler")


def build_compare(page: Page) -> None:
    """Add the controls of this tab."""
    fields = page.fields
    with gr.Row():
        fields["compare_base"] = gr.Textbox(label="Release on the left", elem_id="compare-base")
        fields["compare_tuned"] = gr.Textbox(label="Release on the right", elem_id="compare-tuned")
    fields["compare_prompts"] = gr.Textbox(label="Prompts, one per line", lines=3, elem_id="compare-prompts")
    with gr.Row():
        fields["seed"] = gr.Number(label="First seed", precision=0, minimum=0, elem_id="compare-seed")
        fields["count"] = gr.Number(label="Images per prompt", precision=0, minimum=1, elem_id="compare-n")
        fields["sample_steps"] = gr.Number(label="Sampling steps", precision=0, minimum=1, elem_id="compare-steps")
        fields["scale"] = gr.Number(label="Scale of guidance", elem_id="compare-scale")
        fields["sampler"] = gr.Dropdown(list(SAMPLERS), label="Sampler", elem_id="compare-sampler")
    with gr.Accordion("Side by side", open=True):
        _build_sides(page)
    with gr.Accordion("Strength of a training", open=True):
        build_strength(page, [fields[name] for name in SAMPLING])
    with gr.Accordion("Evaluation", open=True):
        build_evaluation(page)


def _build_sides(page: Page) -> None:
    studio, fields = page.studio, page.fields
    command = command_box("Commands", "compare-command")
    panel = JobPanel(page, _KIND, "No comparison yet.", "Sample from both", "compare-start")
    pair = gr.Dropdown([], label="Prompt and seed", elem_id="compare-pair")
    slider = gr.HTML(elem_id="compare-slider")
    inputs = [fields[name] for name in ("compare_base", "compare_tuned", "config", "predicts", *SAMPLING)]

    def read(
        base: str, tuned: str, config: str, predicts: str, *values: Any
    ) -> tuple[list[Step], SampleSettings, list[Path]]:
        paths = [studio.allowed.check_existing(path, what) for path, what in
                 ((base, "release on the left"), (tuned, "release on the right"))]  # fmt: skip
        studio.allowed.check_config(config, RELEASE_CONFIG)
        sampling = read_sampling(*values)
        folder = new_folder(studio.work / "compare")
        outs = [folder / side for side in ("left", "right")]
        steps = [Step(f"Sample from {path.name}", sample_words(path, config, predicts, sampling, out))
                 for path, out in zip(paths, outs, strict=True)]  # fmt: skip
        return steps, sampling, outs

    def begin(*values: Any) -> str:
        steps, sampling, outs = read(*values)
        studio.jobs.check_none_runs(_KIND)
        names = ("compare_base", "compare_tuned", "config", "predicts", *SAMPLING)
        studio.save(dict(zip(names, values, strict=True)))
        about = about_samples(sampling, dict(zip(("left", "right"), outs, strict=True)))
        studio.jobs.start(_KIND, "Compare", steps, about)
        return shown(steps)  # the folder may be another than when the fields changed

    def results(view: JobView, chosen: str | None) -> list[Any]:
        names = view.job.about["labels"]
        name = chosen if chosen in names else names[0]
        return [gr.update(choices=names, value=name), side_by_side(studio, name)]

    listen(panel.start.click, begin, inputs, command)
    listen(pair.input, lambda name: side_by_side(studio, name), pair, slider)
    panel.watch([pair, slider], results, [pair])
    page.keep_command(inputs, lambda *values: read(*values)[0], command)


def side_by_side(studio: Studio, label: str | None) -> str:
    """Return the two samples of the newest comparison with this label under a slider, empty until both are there."""
    job = studio.jobs.newest(_KIND)
    if job is None or label not in job.about["labels"]:
        return ""
    number = job.about["labels"].index(label)
    pair = []
    for side in ("left", "right"):
        files = sampled_files(Path(job.about["folders"][side]))
        if number >= len(files):
            return ""
        with suppress(UserError):
            pair.append(studio.thumbnails.of_png(files[number]))
    return image_slider(*pair, label) if len(pair) == 2 else ""
