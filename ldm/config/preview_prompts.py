"""Prompts of previews: lines of a text file, or entries of a config. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm.text_files import read_lines
from ldm.util import UserError, check_keys, check_number, located, refuse_if

# Options of a line, as in the sample prompts of other trainers.
_OPTIONS = {"n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "s": "steps", "l": "scale"}
_OPTION = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?=\s|=|$)[ \t=]?")
_USAGE = "; ".join(f"--{option} {name}" for option, name in _OPTIONS.items())


@dataclass(frozen=True)
class PreviewPrompt:
    """Prompt of a preview and its settings. The defaults are those of `tools/txt2img.py`.

    Args:
        negative_prompt: prompt that guidance moves away from.
        width, height: size in pixels; None for the model's own.
        seed: seed of the noise.
        steps: sampling steps.
        scale: scale of classifier-free guidance; 1 turns it off.

    Raises:
        UserError: a value has the wrong type, or is out of range.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int = 42
    steps: int = 50
    scale: float = 7.5

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            refuse_if(not isinstance(text, str), f"{name} {text!r:.100}: give text, in quotes if it is a number")
            refuse_if("${" in text, f"{name} {text!r:.100}: ${{ begins a reference in configs; leave it out")
        for name in ("width", "height"):
            check_number(name, getattr(self, name), least=1, optional=True)
        check_number("seed", self.seed, least=0, most=2**63 - 1)
        check_number("steps", self.steps, least=1)
        check_number("scale", self.scale, whole=False)
        refuse_if(
            self.negative_prompt and self.scale == 1,
            "the negative prompt needs guidance, which a scale of 1 turns off; give a larger scale",
        )

    @property
    def texts(self) -> tuple[str, str]:
        """The prompt and the negative prompt."""
        return self.prompt, self.negative_prompt


_FIELDS = tuple(field.name for field in fields(PreviewPrompt))


def read_prompt_file(path: str | Path) -> list[str]:
    """Return the lines of a text file of prompts, without empty ones and those that begin with `#`.

    Raises:
        UserError: the file is missing, has no prompt, or a line is wrong. The message names the line.
    """
    refuse_if(not Path(path).exists(), f"{path}: no such file of prompts; give a text file with a prompt per line")
    lines = [(number, line) for number, line in read_lines(path) if not line.startswith("#")]
    for number, line in lines:
        parse_prompt(line, f"{path}, line {number}")
    refuse_if(not lines, f"{path}: has no prompt; give one per line, such as: a red apple --w 512 --h 512 --d 42")
    return [line for _, line in lines]


def parse_prompt(entry: Any, where: str) -> PreviewPrompt:
    """Return the prompt that a line of a file or an entry of a config describes. `where` names it in messages.

    A line is `prompt --n negative --w width --h height --d seed --s steps --l scale`. An entry of a config is such a
    line, or a mapping with the fields of `PreviewPrompt`.

    Raises:
        UserError: an option or a value is wrong.
    """
    if isinstance(entry, Mapping):
        check_keys(where, entry, _FIELDS)
        given = {name: value for name, value in entry.items() if value is not None}
    elif isinstance(entry, str):
        given = _options_of(entry, where)
    else:
        raise UserError(f"{where}: {entry!r:.100} is no prompt; give text or a mapping with prompt")
    refuse_if("prompt" not in given, f"{where}: has no prompt; give one, and options after it")
    with located(where):
        return PreviewPrompt(**given)


def _options_of(line: str, where: str) -> dict[str, Any]:
    prompt, *rest = _OPTION.split(line)
    given: dict[str, Any] = {"prompt": prompt.strip()}
    for option, text in zip(rest[::2], rest[1::2], strict=True):
        refuse_if(option not in _OPTIONS, f"{where}: --{option} is not an option of a preview; valid: {_USAGE}")
        name = _OPTIONS[option]
        refuse_if(name in given, f"{where}: --{option} is given twice; keep one")
        given[name] = text.strip() if name == "negative_prompt" else _number(text.strip(), name, f"{where}: --{option}")
    return given


def _number(text: str, name: str, where: str) -> int | float:
    try:
        return float(text) if name == "scale" else int(text)
    except ValueError as error:
        kind = "a number" if name == "scale" else "a whole number"
        raise UserError(f"{where} {text!r}: give {kind}") from error
