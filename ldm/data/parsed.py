"""Lists and mappings that data sets keep in JSON and YAML files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ldm.files import read_at_most
from ldm.text_files import decode_text
from ldm.util import UserError

_MOST_IN_JSON, _MOST_IN_YAML = 1 << 30, 1 << 24  # bytes


class _PlainLoader(yaml.SafeLoader):
    """Loader without aliases, by which a short file can stand for more than fits in memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias such as *x; write its value instead")
        return super().compose_node(parent, index)


def read_json(path: str | Path, what: str) -> Any:
    """Return the content of a JSON file. `what` is its setting for the message.

    Raises:
        UserError: the file is missing, no file, or not JSON. The message has the absolute path.
    """
    return _parsed(path, what, json.loads, _MOST_IN_JSON)


def read_yaml(path: str | Path, what: str) -> Any:
    """Return the content of a YAML file, as `read_json` does."""
    return _parsed(path, what, lambda data: yaml.load(decode_text(data), Loader=_PlainLoader), _MOST_IN_YAML)


def _parsed(path: str | Path, what: str, parse: Callable[[bytes], Any], most: int) -> Any:
    file = Path(path).expanduser()
    try:
        return parse(read_at_most(file, most))
    except OSError as error:
        reason = error.strerror
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # UserError is a ValueError
        reason = " ".join(str(error).split())[:300]
    raise UserError(f"{what} {str(file.absolute())!r}: cannot be read: {reason}")
