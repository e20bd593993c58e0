"""Part of a tab: images at several strengths of a training, from the release to the training."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.studio.commands import Step, merge_words, sample_words, shown
from ldm.studio.controls import Page, command_box, gallery, listen
from ldm.studio.fields import RELEASE_CONFIG
from ldm.studio.job_panel import JobPanel, JobView
from ldm.studio.sampled_images import about_samples, new_folder, read_sampling, sampled_files
from ldm.studio.studio import Studio
from ldm.util import UserError

_KIND = "strength"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def build_strength(page: Page, sampling: list[Any]) -> None:
    """Add the controls of this part. `sampling` are the fields of `read_sampling`."""
    studio, fields = page.studio, page.fields
    run = page.run_list("strength-run", "strength-refresh")
    command = command_box("Commands", "strength-command")
    panel = JobPanel(page, _KIND, "No strengths yet.", "Sample at five strengths", "strength-start", "secondary")
    strength = gr.Slider(0, 1, 1, step=0.25, label="Strength: 0 is the release, 1 the training",
                         elem_id="strength-slider")  # fmt: skip
    images = gallery("Images at this strength", "strength-images", height=320)
    inputs = [run, fields["release"], fields["config"], fields["predicts"], *sampling]

    def read(which: str | None, release: str, config: str, predicts: str, *values: Any) -> tuple[list[Step], dict]:
        folder = studio.run_folder(which)
        base = studio.allowed.check_existing(release, "release")
        studio.allowed.check_config(config, RELEASE_CONFIG)
        settings = read_sampling(*values)
        out = new_folder(studio.work / "strength")
        merged = studio.work / "strength" / "merged.safetensors"
        steps, folders = [], {}
        for value in STRENGTHS:
            source = merged if value else base
            if value:
                words = merge_words(folder, base, str(merged), config, "", False, value)
                steps.append(Step(f"Merge at strength {value:g}", words))
            folders[f"{value:g}"] = out / f"{value:g}"
            words = sample_words(source, config, predicts, settings, out / f"{value:g}")
            steps.append(Step(f"Sample at strength {value:g}", words))
        return steps, about_samples(settings, folders)

    def begin(*values: Any) -> str:
        steps, about = read(*values)
        studio.jobs.start(_KIND, f"Strengths of {values[0]}", steps, about)
        return shown(steps)

    def results(view: JobView, value: float) -> list[Any]:
        return [at_strength(studio, value)]

    listen(panel.start.click, begin, inputs, command)
    listen(strength.change, lambda value: at_strength(studio, value), strength, images, trigger_mode="always_last")
    panel.watch([images], results, [strength])
    page.keep_command(inputs, lambda *values: read(*values)[0], command)


def at_strength(studio: Studio, value: float) -> list[tuple[str, str]]:
    """Return the samples of the newest job at a strength, as far as they are there."""
    job = studio.jobs.newest(_KIND)
    folder = job.about["folders"].get(f"{value:g}") if job else None
    found = []
    files = sampled_files(Path(folder)) if folder else []
    for path, label in zip(files, job.about["labels"] if job else [], strict=False):  # the last may not be there yet
        with suppress(UserError):
            found.append((str(studio.thumbnails.of_png(path)), label))
    return found
