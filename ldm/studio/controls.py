"""Controls that several tabs have, and the events of the page."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ldm.cli.paths import LOGS
from ldm.studio.commands import Step, shown
from ldm.studio.runs import list_runs
from ldm.studio.studio import Studio
from ldm.util import UserError

SECONDS = 1.5  # between two looks at the jobs


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


def gallery(label: str, name: str, height: int) -> gr.Gallery:
    """Return a gallery that shows whole images, `height` pixels high. The style sheet sets the columns."""
    return gr.Gallery(label=label, elem_id=name, elem_classes="studio-gallery", height=height, object_fit="contain",
                      interactive=False, allow_preview=False, fit_columns=False, buttons=[])  # fmt: skip


def newest_runs() -> Any:
    """Return the runs for a list of them, with the newest chosen."""
    runs = list_runs(LOGS)
    return gr.update(choices=runs, value=runs[0] if runs else None)


def with_new_runs(known: Sequence[str], *chosen: str | None) -> list[Any]:
    """Return the runs of now, and for each list of runs its update: the newest stays chosen if it was.

    Args:
        known: the runs as the lists have them.
        chosen: the run that each list has chosen.
    """
    runs = list_runs(LOGS)
    followers = (None, *known[:1])
    updates = [gr.update(choices=runs, value=runs[0] if runs and run in followers else run) for run in chosen]
    return [runs, *updates]


def command_box(label: str, name: str) -> gr.Code:
    """Return a box that shows commands or a config, and copies them."""
    # Without colours, which lack contrast.
    return gr.Code("# ", label=label, language=None, interactive=False, elem_id=name, lines=1, max_lines=None,
                   wrap_lines=True, show_line_numbers=False, buttons=["copy"])  # fmt: skip


@dataclass
class Page:
    """Page that is being built: its studio, the fields that commands are made of, and what it shows about them."""

    studio: Studio
    fields: dict[str, Any] = field(default_factory=dict)
    _runs: list[gr.Dropdown] = field(default_factory=list)
    _shown: list[tuple[Callable[..., Any], list[Any], Any]] = field(default_factory=list)
    _watched: list[tuple[Callable[[], Any], gr.State]] = field(default_factory=list)

    def keep_shown(self, inputs: list[Any], function: Callable[..., Any], output: Any) -> None:
        """Show the result of `function` for `inputs` when the page opens, and after each change that is complete."""
        self._shown.append((function, inputs, output))
        for part in inputs:
            listen(_completed(part), function, inputs, output, trigger_mode="always_last")

    def keep_command(self, inputs: list[Any], read: Callable[..., Sequence[Step]], output: Any) -> None:
        """Show the commands that `read` returns for `inputs`, or why there are none, as `keep_shown` does."""

        def show(*values: Any) -> str:
            try:
                return shown(read(*values))
            except UserError as error:
                return f"# {error}"

        self.keep_shown(inputs, show, output)

    def run_list(self, name: str, button: str) -> gr.Dropdown:
        """Return a list of the runs under `logs/`, with a button that reads it again and chooses the newest."""
        with gr.Row():
            runs = gr.Dropdown([], label="Run", elem_id=name, scale=3)
            refresh = gr.Button("List runs again", elem_id=button)
        listen(refresh.click, newest_runs, None, runs)
        self._runs.append(runs)
        return runs

    def watch(
        self, signature: Callable[[], Any], show: Callable[..., Any], inputs: Sequence[Any], outputs: list[Any]
    ) -> None:
        """Show the result of `show` for `inputs` each time that `signature` returns another value, except None."""
        seen = gr.State(None)
        self._watched.append((signature, seen))
        listen(seen.change, show, list(inputs), outputs)

    def fill(self, blocks: gr.Blocks) -> None:
        """Fill the fields, each time the page opens."""

        def saved() -> list[Any]:
            values = self.studio.saved()
            return [values[name] for name in self.fields]

        filled = listen(blocks.load, saved, None, list(self.fields.values()))
        for runs in self._runs:
            listen(filled.then, newest_runs, None, runs)
        for function, inputs, output in self._shown:
            listen(filled.then, function, inputs, output)
        known_and_chosen = [gr.State([]), *self._runs]
        self.watch(lambda: list_runs(LOGS), with_new_runs, known_and_chosen, known_and_chosen)
        self._look_again()

    def _look_again(self) -> None:
        """Compare all watched signatures at each tick of a timer, in one request that outputs only states.

        Gradio makes each output component anew, even a skipped one.
        """

        def look(*seen: Any) -> list[Any]:
            found = []
            for (signature, _), old in zip(self._watched, seen, strict=True):
                try:
                    new = signature()
                except (OSError, UserError) as error:  # `show` meets it too, and tells it
                    new = str(error)
                found.append(gr.skip() if new is None or new == old else new)
            return found

        states = [seen for _, seen in self._watched]
        listen(gr.Timer(SECONDS).tick, look, states, states)


def _completed(part: Any) -> Any:
    """Return the event of a field after which its value is complete."""
    if isinstance(part, (gr.Textbox, gr.Number)):
        return part.blur
    return part.release if isinstance(part, gr.Slider) else part.change
