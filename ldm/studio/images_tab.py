"""Tab of the images: a gallery with captions, editing, counts of tags, and problems."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import gradio as gr

from ldm.files import read_at_most
from ldm.images.find import ImageItem
from ldm.studio.caption_editing import CaptionEdits, read_images, replace_text, tag_counts
from ldm.studio.commands import Step, inspect_words
from ldm.studio.controls import Page, command_box, gallery, listen
from ldm.studio.html_parts import html_table, note
from ldm.studio.job_panel import JobPanel, JobView
from ldm.studio.job_store import FINISHED
from ldm.util import UserError, refuse_if

_ON_PAGE = 60  # images
_MOST_TAGS, _MOST_PROBLEMS = 200, 300
_MOST_BYTES = 1 << 26
_CHECK = "images-check"
_NONE_CHOSEN = "Choose an image to edit its caption."


class ImagesTab:
    """Controls of the tab of images, and the field of the folder. The methods answer events of the page."""

    def __init__(self, page: Page) -> None:
        self.studio = page.studio
        self.edits = CaptionEdits(self.studio.work / "undo")
        with gr.Row():
            self.folder = gr.Textbox(label="Folder of images", elem_id="images-folder", scale=4)
            self.opens = gr.Button("Open", variant="primary", elem_id="images-open", scale=1)
        page.fields["images"] = self.folder
        self.summary = gr.HTML(note("Open a folder of images with captions."), elem_id="images-summary")
        self.opened, self.chosen, self.names = gr.State(""), gr.State(""), gr.State([])
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.gallery = gallery("Images", "images-gallery", height=480)
                self.number = gr.Number(1, label="Page", minimum=1, precision=0, elem_id="images-page")
            with gr.Column(scale=2, min_width=300):
                self._add_editing()
        with gr.Accordion("Problems", open=True, elem_id="images-problems"):
            self._add_problems(page)
        self.shown = [self.summary, self.gallery, self.number, self.tags, self.names]
        self._connect()

    def _add_editing(self) -> None:
        self.name = gr.HTML(note(_NONE_CHOSEN), elem_id="images-name")
        self.caption = gr.Textbox(label="Caption", lines=4, elem_id="images-caption")
        with gr.Row():
            self.save = gr.Button("Save caption", elem_id="images-save")
            self.undo = gr.Button("Undo last change", elem_id="images-undo")
        with gr.Accordion("Find and replace in all captions", open=True):
            self.find = gr.Textbox(label="Find", elem_id="images-find")
            self.replacement = gr.Textbox(label="Replace with", elem_id="images-replace")
            self.replace = gr.Button("Replace in all captions", elem_id="images-replace-all")
        with gr.Accordion("Tags: parts of captions between commas", open=False, elem_id="images-tags-part"):
            self.tags = gr.HTML(elem_id="images-tags")

    def _add_problems(self, page: Page) -> None:
        command = command_box("Command", "images-check-command")
        self.panel = JobPanel(page, _CHECK, "Not looked at yet.", "Look for problems", "images-check", "secondary")
        self.problem = gr.Radio([], label="Problems; choose one to see its image", elem_id="images-problem")
        self.size = page.fields["size"]
        page.keep_command([self.folder, self.size], self.check_steps, command)

    def _connect(self) -> None:
        first = [self.opened, self.chosen, self.name, self.caption, *self.shown]
        chosen = [self.chosen, self.name, self.caption]
        listen(self.opens.click, self.open_folder, self.folder, first)
        listen(self.folder.submit, self.open_folder, self.folder, first)
        listen(self.number.submit, self.show, [self.opened, self.number], self.shown)
        listen(self.gallery.select, self.select, [self.opened, self.names], chosen)
        listen(self.save.click, self.save_caption, [self.opened, self.number, self.chosen, self.caption], self.shown)
        listen(
            self.replace.click, self.replace_all, [self.opened, self.number, self.find, self.replacement], self.shown
        )
        listen(self.undo.click, self.undo_last, [self.opened, self.number, self.chosen], [self.caption, *self.shown])
        listen(self.panel.start.click, self.start_check, [self.folder, self.size])
        listen(self.problem.input, self.show_problem, [self.opened, self.problem], [*first, self.problem])
        self.panel.watch([self.problem], self.problems)

    def items(self, path: str) -> list[ImageItem]:
        refuse_if(not path, "no folder is open; give a folder of images and open it")
        return read_images(self.studio.allowed.check_folder(path, "folder of images"), self.studio.allowed)

    def show(self, path: str, page: float, text: str = "") -> list[Any]:
        return self.values(self.items(path), int(page or 1), text)

    def open_folder(self, path: str) -> list[Any]:
        return [path, "", note(_NONE_CHOSEN), "", *self.show(path, 1)]

    def select(self, path: str, names: list[str], event: gr.SelectData) -> list[Any]:
        return self.chosen_values(self.items(path), names[event.index])

    def save_caption(self, path: str, page: float, name: str, text: str) -> list[Any]:
        refuse_if(not name, "no image is chosen; choose one in the gallery")
        self.edits.write(self.studio.allowed.check_folder(path), self.items(path), {name: text})
        return self.show(path, page, f"saved the caption of {name}")

    def replace_all(self, path: str, page: float, old: str, new: str) -> list[Any]:
        items = self.items(path)
        changed = replace_text(items, old, new)
        self.edits.write(self.studio.allowed.check_folder(path), items, changed)
        return self.show(path, page, f"changed {len(changed)} captions")

    def undo_last(self, path: str, page: float, name: str) -> list[Any]:
        refuse_if(not path, "no folder is open; give a folder of images and open it")
        count = self.edits.undo(self.studio.allowed.check_folder(path))
        items = self.items(path)
        caption = self.chosen_values(items, name)[2]
        return [caption, *self.values(items, int(page or 1), f"undone: {count} files are as before")]

    def check_steps(self, path: str, size: float) -> list[Step]:
        folder = self.studio.allowed.check_folder(path, "folder of images")
        return [Step("Look for problems", inspect_words(folder, int(size or 0), self.studio.work / "problems.json"))]

    def start_check(self, path: str, size: float) -> None:
        steps = self.check_steps(path, size)
        self.studio.jobs.check_none_runs(_CHECK)
        self.studio.save({"images": path})
        self.studio.jobs.start(_CHECK, f"Problems in {path}", steps, {"folder": path})

    def problems(self, view: JobView) -> list[Any]:
        """Return the list of problems that a job has found. A choice is the folder and the name of the image."""
        if view.state.status != FINISHED:
            return [gr.update(choices=[], value=None)]
        folder = view.job.about.get("folder")
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(read_at_most(self.studio.work / "problems.json", _MOST_BYTES))
            found = [(f"{entry['name']}: {entry['text']}", json.dumps([folder, entry["name"], number]))
                     for number, entry in enumerate(content["problems"][:_MOST_PROBLEMS])]  # fmt: skip
            label = f"{len(content['problems'])} problems in {folder}; choose one to see its image"
            return [gr.update(choices=found, value=None, label=label)]
        return [gr.update(choices=[], value=None)]

    def show_problem(self, opened: str, choice: str | None) -> list[Any]:
        """Open the page of the gallery with the image of a problem, and its caption."""
        if not choice:
            return [gr.skip()] * 10
        path, name, _ = json.loads(choice)
        items = self.items(path)
        place = next((number for number, item in enumerate(items) if item.name == name), None)
        refuse_if(place is None, f"{name}: is not in {path} any more; look for problems again")
        values = self.values(items, place // _ON_PAGE + 1, "")
        values[1] = {**values[1], "selected_index": place % _ON_PAGE}
        return [path, *self.chosen_values(items, name), *values, choice]

    def chosen_values(self, items: list[ImageItem], name: str) -> list[Any]:
        """Return the values of the chosen name, its line and the caption."""
        caption = next((item.caption for item in items if item.name == name), None)
        return [name, note(name or _NONE_CHOSEN), caption or ""]

    def values(self, items: list[ImageItem], number: int, text: str) -> list[Any]:
        """Return the values of summary, gallery, page and tags, and the names on the page."""
        pages = max(-(-len(items) // _ON_PAGE), 1)
        number = min(max(number, 1), pages)
        images, unread = [], 0
        here = items[(number - 1) * _ON_PAGE : number * _ON_PAGE]
        for item in here:
            try:
                path, label = self.studio.thumbnails.of_item(item), item.caption or "(no caption)"
            except UserError as error:
                unread += 1
                path, label = self.studio.thumbnails.placeholder(), f"cannot be read: {error}"
            images.append((str(path), label))
        without = sum(item.caption is None for item in items)
        counts = f"{len(items)} images, {without} without a caption; page {number} of {pages}"
        broken = f"; {unread} on this page cannot be read" if unread else ""
        summary = note(f"{text + '; ' if text else ''}{counts}{broken}", "bad" if unread else "note")
        tags = html_table(["tag", "images"], tag_counts(items)[:_MOST_TAGS])
        return [summary, gr.update(value=images, selected_index=None), number, tags, [item.name for item in here]]
