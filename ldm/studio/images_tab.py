"""Tab of the images: a gallery with captions, editing, and counts of tags."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ldm.images.find import ImageItem
from ldm.studio.caption_editing import CaptionEdits, read_images, replace_text, tag_counts
from ldm.studio.html_parts import note
from ldm.studio.studio import Page, Studio, listen
from ldm.util import UserError

_PAGE = 60  # images
_MOST_TAGS = 200


def build_images(on: Page) -> None:
    """Add the controls of this tab, and the field of the folder."""
    studio, fields = on.studio, on.fields
    edits = CaptionEdits(studio.work / "undo")
    with gr.Row():
        folder = gr.Textbox(label="Folder of images", elem_id="images-folder", scale=4)
        opens = gr.Button("Open", variant="primary", elem_id="images-open", scale=1)
    fields["images"] = folder
    summary = gr.HTML(note("Open a folder of images with captions."), elem_id="images-summary")
    opened, chosen, names = gr.State(""), gr.State(""), gr.State([])
    with gr.Row():
        with gr.Column(scale=3):
            gallery = gr.Gallery(label="Images", columns=5, height=520, allow_preview=False, elem_id="images-gallery",
                                 interactive=False, buttons=[])  # fmt: skip
            number = gr.Number(1, label="Page", minimum=1, precision=0, elem_id="images-page")
        with gr.Column(scale=2):
            name = gr.HTML(note("Choose an image to edit its caption."), elem_id="images-name")
            caption = gr.Textbox(label="Caption", lines=4, elem_id="images-caption")
            with gr.Row():
                save = gr.Button("Save caption", elem_id="images-save")
                undo = gr.Button("Undo last change", elem_id="images-undo")
            with gr.Accordion("Find and replace in all captions", open=True):
                find = gr.Textbox(label="Find", elem_id="images-find")
                replacement = gr.Textbox(label="Replace with", elem_id="images-replace")
                replace = gr.Button("Replace in all captions", elem_id="images-replace-all")
            with gr.Accordion("Tags", open=False):
                tags = gr.Dataframe(headers=["tag", "images"], elem_id="images-tags", interactive=False,
                                    column_count=2, label="Parts of captions between commas")  # fmt: skip
    shown = [summary, gallery, number, tags, names]

    def show(path: str, page: float, text: str = "") -> list[Any]:
        items = read_images(studio.allowed.check_folder(path, "folder of images"))
        return _shown(studio, items, int(page or 1), text)

    def open_folder(path: str) -> list[Any]:
        found = show(path, 1)
        return [path, "", note("Choose an image to edit its caption."), "", *found]

    def select(path: str, listed: list[str], event: gr.SelectData) -> list[Any]:
        which = listed[event.index]
        return [which, note(which), _caption(studio, path, which)]

    def save_caption(path: str, page: float, which: str, text: str) -> list[Any]:
        if not which:
            raise UserError("no image is chosen; choose one in the gallery")
        edits.write(studio.allowed.check_folder(path), {which: text})
        return show(path, page, f"saved the caption of {which}")

    def replace_all(path: str, page: float, old: str, new: str) -> list[Any]:
        changed = replace_text(_items(studio, path), old, new)
        edits.write(studio.allowed.check_folder(path), changed)
        return show(path, page, f"changed {len(changed)} captions")

    def undo_last(path: str, page: float, which: str) -> list[Any]:
        count = edits.undo(studio.allowed.check_folder(path))
        return [_caption(studio, path, which), *show(path, page, f"undone: {count} files are as before")]

    first = [opened, chosen, name, caption, *shown]
    listen(opens.click, open_folder, folder, first)
    listen(folder.submit, open_folder, folder, first)
    listen(number.submit, show, [opened, number], shown)
    listen(gallery.select, select, [opened, names], [chosen, name, caption])
    listen(save.click, save_caption, [opened, number, chosen, caption], shown)
    listen(replace.click, replace_all, [opened, number, find, replacement], shown)
    listen(undo.click, undo_last, [opened, number, chosen], [caption, *shown])


def _items(studio: Studio, path: str) -> list[ImageItem]:
    if not path:
        raise UserError("no folder is open; give a folder of images and open it")
    return read_images(studio.allowed.check_folder(path, "folder of images"))


def _caption(studio: Studio, path: str, name: str) -> str:
    """Return the caption of the image `name`, empty if there is none."""
    return next((item.caption or "" for item in _items(studio, path) if item.name == name), "")


def _shown(studio: Studio, items: list[ImageItem], number: int, text: str) -> list[Any]:
    """Return the values of summary, gallery, page and tags, and the names on the page."""
    pages = max(-(-len(items) // _PAGE), 1)
    number = min(max(number, 1), pages)
    images, unread = [], 0
    here = items[(number - 1) * _PAGE : number * _PAGE]
    for item in here:
        try:
            path, label = studio.thumbnails.of_item(item), item.caption or "(no caption)"
        except UserError as error:
            unread += 1
            path, label = studio.thumbnails.placeholder(), f"cannot be read: {error}"
        images.append((str(path), label))
    without = sum(item.caption is None for item in items)
    counts = f"{len(items)} images, {without} without a caption; page {number} of {pages}"
    broken = f"; {unread} on this page cannot be read" if unread else ""
    summary = note(f"{text + '; ' if text else ''}{counts}{broken}", "bad" if unread else "note")
    return [summary, images, number, tag_counts(items)[:_MOST_TAGS], [item.name for item in here]]
