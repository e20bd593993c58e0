"""State of the studio that all parts of the page share. Imports no torch."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.files import atomic_write, read_at_most
from ldm.studio.jobs import JobStore
from ldm.studio.paths import AllowedFolders
from ldm.studio.thumbnails import Thumbnails
from ldm.util import UserError

_SETTINGS = "settings.json"  # values of the fields of the page
_MOST_BYTES = 1 << 20


@dataclass
class Studio:
    """Folders that may be read, the folder `work` for what the studio writes, and the first values of the fields."""

    allowed: AllowedFolders
    work: Path
    defaults: Mapping[str, Any]
    card: str = ""  # name of the detected card
    jobs: JobStore = field(init=False)
    thumbnails: Thumbnails = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = JobStore(self.work / "jobs")
        self.thumbnails = Thumbnails(self.work / "thumbnails")

    def saved(self) -> dict[str, Any]:
        """Return the values that the fields had when a command was last started, over the defaults."""
        found: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            content = json.loads(read_at_most(self.work / _SETTINGS, _MOST_BYTES))
            found = content if isinstance(content, dict) else {}
        alike = {key: value for key, value in found.items() if type(value) is type(self.defaults.get(key))}
        return {**self.defaults, **alike}

    def save(self, values: Mapping[str, Any]) -> None:
        """Keep `values` of fields for a page that is opened later."""
        with atomic_write(self.work / _SETTINGS) as temporary:
            temporary.write_text(json.dumps({**self.saved(), **values}, indent=1), encoding="utf-8")


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, whose expected errors become a message on the page."""

    @functools.wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        except OSError as error:
            text = f"{error.filename or ''}: {error.strerror or error}"
            raise gr.Error(html.escape(text), duration=None, print_exception=False) from error

    return call


def listen(trigger: Any, function: Callable[..., Any], inputs: Any = None, outputs: Any = None, **options: Any) -> Any:
    """Call `function` at an event of the page. Errors of the user are shown; the function is no public API."""
    options = {"show_progress": "hidden", "api_visibility": "private", **options}
    return trigger(handler(function), inputs, outputs, **options)


@dataclass
class Page:
    """Page that is being built: its studio, the fields that commands are made of, and what it shows about them."""

    studio: Studio
    fields: dict[str, Any] = field(default_factory=dict)
    _shown: list[tuple[Callable[..., Any], list[Any], Any]] = field(default_factory=list)

    def keep_shown(self, inputs: list[Any], function: Callable[..., Any], output: Any) -> None:
        """Show the result of `function` for `inputs` when the page opens, and after each change that is complete."""
        self._shown.append((function, inputs, output))
        for part in inputs:
            listen(_completed(part), function, inputs, output, trigger_mode="always_last")

    def fill(self, blocks: gr.Blocks) -> None:
        """Fill the fields, each time the page opens."""

        def saved() -> list[Any]:
            values = self.studio.saved()
            return [values[name] for name in self.fields]

        filled = listen(blocks.load, saved, None, list(self.fields.values()))
        for function, inputs, output in self._shown:
            listen(filled.then, function, inputs, output)


def _completed(part: Any) -> Any:
    """Return the event of a field after which its value is complete."""
    if isinstance(part, (gr.Textbox, gr.Number)):
        return part.blur
    return part.release if isinstance(part, gr.Slider) else part.change
