"""The page: its tabs, and the names of its controls.

Each control has a fixed `elem_id`. A part that runs commands has four more: `KIND-status`, whose element with
`data-state` tells the state of the newest job (`running`, `finished`, `stopped`, `failed`, `killed`), `KIND-stop`,
`KIND-output` and, in it, `KIND-log`.

- `tabs`, with the tabs `images`, `plan`, `train`, `compare` and `release`
- images: `images-folder`, `images-open`, `images-summary`, `images-gallery`, `images-page`, `images-name`,
  `images-caption`, `images-save`, `images-undo`, `images-find`, `images-replace`, `images-replace-all`,
  `images-tags-part`, `images-tags`, `images-problems`, `images-check-command`, `images-check` (also a kind),
  `images-problem`
- plan: `plan-name`, `plan-release`, `plan-recognised`, `plan-config`, `plan-base`, `plan-predicts`, `plan-size`,
  `plan-flip`, `plan-card`, `plan-ram`, `plan-minutes`, `plan-command`, `plan-compute`, kind `plan`, `plan-table`,
  `plan-tier`, `plan-batch`, `plan-steps`, `plan-rate`, `plan-prompts`, `plan-preview-steps`, `plan-write`, `plan-yaml`
- train: `train-commands`, `train-overwrite`, `train-start`, `train-save`, kind `train`, `train-previews`,
  `train-figures`, `train-run`, `train-refresh`, `train-resume`, `train-resume-command`
- compare: `compare-base`, `compare-tuned`, `compare-prompts`, `compare-seed`, `compare-n`, `compare-steps`,
  `compare-scale`, `compare-sampler`, `compare-command`, `compare-start`, kind `compare`, `compare-pair`,
  `compare-slider`; `strength-run`, `strength-refresh`, `strength-command`, `strength-start`, kind `strength`,
  `strength-slider`, `strength-images`; `evaluate-sets`, `evaluate-command`, `evaluate-start`, kind `evaluate`,
  `evaluate-table`, `evaluate-figure`
- release: `release-run`, `release-refresh`, `release-out`, `release-weights`, `release-half`, `release-strength`,
  `release-merge-command`, `release-merge`, kind `release`, `release-links`; `lora-part`, `lora-tuned`, `lora-out`,
  `lora-rank`, `lora-half`, `lora-command`, `lora-start`, kind `lora`, `lora-links`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ldm.studio.compare_tab import build_compare
from ldm.studio.controls import Page
from ldm.studio.images_tab import ImagesTab
from ldm.studio.plan_tab import build_plan
from ldm.studio.release_tab import build_release
from ldm.studio.studio import Studio
from ldm.studio.train_tab import build_train

_FONTS = ["system-ui", "sans-serif"]
_CODE_FONTS = ["ui-monospace", "monospace"]


def build_page(studio: Studio) -> gr.Blocks:
    """Return the page of `studio`."""
    page = Page(studio)
    with gr.Blocks(analytics_enabled=False, title="latent-finetune studio", delete_cache=(3600, 86400)) as blocks:
        page.fields["size"] = gr.Number(label="Size in pixels; 0 for the model's", precision=0, minimum=0,
                                        elem_id="plan-size", render=False)  # fmt: skip
        gr.HTML("<h1>latent-finetune studio</h1>", elem_id="title")
        with gr.Tabs(elem_id="tabs"):
            for title, build in (("Images", ImagesTab), ("Plan", build_plan), ("Train", build_train),
                                 ("Compare", build_compare), ("Release", build_release)):  # fmt: skip
                with gr.Tab(title, id=title.lower(), elem_id=title.lower()):
                    build(page)
        page.fill(blocks)
    return blocks


def page_options() -> dict[str, Any]:
    """Return the theme, with fonts of the system, the style sheet and the script."""
    theme = gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=_CODE_FONTS).set(
        # Shades with enough contrast, in both schemes.
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_cancel_background_fill="#b00020",
        button_cancel_background_fill_hover="#8c0019",
        button_cancel_background_fill_dark="#b00020",
        button_cancel_background_fill_hover_dark="#8c0019",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        slider_color="*primary_700",
        slider_color_dark="*primary_400",
    )
    css, js = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("studio.css", "studio.js"))
    return {"theme": theme, "css": css, "js": js}
