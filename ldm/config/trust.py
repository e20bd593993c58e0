"""The policy for configs that are not trusted: they are data, and building what they describe runs no code in them.

`ldm.config.load.load_config` holds every config against it. `docs/security.md` states it for users.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from ldm.config.allowed import nearest_allowed, reason_for
from ldm.config.reach import reach
from ldm.translations import instead, todays_path, without_left_out
from ldm.util import UserError

if TYPE_CHECKING:
    from ldm.config.interpolations import Path  # which imports OmegaConf, and command lines import this module

_HINT = "give --trust-config if you trust whoever wrote the config"
# The keys under which this project, and others, name what is to be built or called.
_TARGETS = ("target", "_target_", "class_path")
# Settings that hand something to another machine.
_SENDING = {("lightning", "trainer", "model_registry"): "uploads checkpoints"}
_LOGGER = ("lightning", "logger")


def check_trust(config: Any, source: str, typed: Collection[Path] = ()) -> None:
    """Hold `config`, plain dicts and lists with all `${...}` replaced, against the policy.

    A `target` must be on the list of `ldm.config.allowed`. No text, key or value, may run a command or be a URL, and
    none of the section `lightning.logger` may be an environment variable, which loggers replace. What was typed on the
    command line, the values at the paths `typed`, is the person's own. Nothing is imported.

    Raises:
        UserError: one of these is not so; names `source` and the text.
    """
    own = set(typed) | {path[:depth] for path in typed for depth in range(1, len(path))}
    for path, key, text in _texts(config):
        if path in own:
            continue
        if key in _TARGETS:
            if reason_for(todays_path(text)) is None:
                raise UserError(
                    f"{source}: target {text!r:.100} is not on the list of classes that need no trust"
                    f"{instead(text) or nearest_allowed(text)}; {_HINT}"
                )
            continue
        done = (_SENDING.get(path) if key else None) or reach(text)
        if done is None and "${" in text:
            done = "is an interpolation again once its parts are put together"
        if done is None and path[:2] == _LOGGER and "$" in text:
            done = "is replaced from the environment by loggers"
        if done is not None:
            raise UserError(f"{source}: {text!r:.100} {done}; {_HINT}")


def may_look_up(target: Any, trusted: bool) -> bool:
    """Whether the class `target` may be imported to see what it takes."""
    return trusted or (isinstance(target, str) and reason_for(todays_path(target)) is not None)


def _texts(value: Any, path: Path = (), key: str = "") -> Iterator[tuple[Path, str, str]]:
    """Each scalar in `value` as text (YAML can make paths too), with its path and the key that it stands under.

    The keys themselves are texts under no key. What a class is built without is passed over.
    """
    if isinstance(value, dict):
        if isinstance(value.get("target"), str) and isinstance(value.get("params"), dict):
            value = {**value, "params": without_left_out(value["target"], value["params"])[0]}
        for name, part in value.items():
            yield (*path, str(name)), "", str(name)
            yield from _texts(part, (*path, str(name)), str(name))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _texts(part, (*path, str(number)), key)
    elif value is not None:
        yield path, key, str(value)


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add `--trust-config` to the parser of a command that builds what a config describes."""
    parser.add_argument(
        "--trust-config",
        action="store_true",
        help="let the configs name any class, URLs, commands to read data from, and environment variables: "
        "they can then run any code",
    )
