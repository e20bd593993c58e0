"""Policy for untrusted configs: they are data, and building from them runs no code of their author.

`ldm.config.load.load_config` applies it to every config. `docs/security.md` is the version for users.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from ldm.config.allowed import nearest_allowed, reason_for
from ldm.config.external_access import external_access
from ldm.moved_targets import current_path, hint_for_missing_module, hint_for_target, without_unused_keys
from ldm.printable import redacted
from ldm.util import UserError

if TYPE_CHECKING:
    from ldm.config.interpolations import Path  # imports OmegaConf, which command lines avoid

_HINT = "give --trust-config if you trust the author of the config"
# Keys of this and other projects that name a class or function to call.
_TARGETS = ("target", "_target_", "class_path")
# Settings that send data to another machine.
_SENDING = {("lightning", "trainer", "model_registry"): "uploads checkpoints"}
_LOGGER = ("lightning", "logger")
# Texts that are never opened, and may have a colon. In place of a list, this is the path of a regular file.
_PROMPTS = ("lightning", "previews", "prompts")


def check_trust(config: Any, source: str, typed: Collection[Path] = ()) -> None:
    """Check `config` against the policy, without importing anything.

    A `target` must be on the list of `ldm.config.allowed`. No key or value may run a command or be a URL. No text in
    `lightning.logger` may refer to an environment variable, because loggers insert the variable's value.

    Args:
        config: plain dicts and lists, with all `${...}` replaced.
        source: name of the config in messages.
        typed: paths of values from the command line, which are trusted.

    Raises:
        UserError: a text violates the policy. The message names `source` and the text.
    """
    own = set(typed) | {path[:depth] for path in typed for depth in range(1, len(path))}
    for path, key, text in _texts(config):
        if path in own:
            continue
        if key in _TARGETS:
            if reason_for(current_path(text)) is None:
                raise UserError(
                    f"{source}: target {text!r:.100} is not on the list of allowed classes"
                    f"{hint_for_target(text) or nearest_allowed(text) or hint_for_missing_module(text)}; {_HINT}"
                )
            continue
        opened = path[:3] != _PROMPTS
        effect = (_SENDING.get(path) if key else None) or (external_access(text) if opened else None)
        if effect is None and "${" in text:
            effect = "forms an interpolation after replacement"
        if effect is None and path[:2] == _LOGGER and "$" in text:
            effect = "refers to an environment variable, whose value loggers insert"
        if effect is not None:
            raise UserError(f"{source}: {redacted(text)!r:.100} {effect}; {_HINT}")


def may_look_up(target: Any, trusted: bool) -> bool:
    """Return True if the class `target` may be imported to read its parameters."""
    return trusted or (isinstance(target, str) and reason_for(current_path(target)) is not None)


def _texts(value: Any, path: Path = (), key: str = "") -> Iterator[tuple[Path, str, str]]:
    """Yield path, key and text of each scalar in `value`. Keys of mappings are texts too, with an empty key.

    Keys that a class is built without are skipped.
    """
    if isinstance(value, dict):
        if isinstance(value.get("target"), str) and isinstance(value.get("params"), dict):
            value = {**value, "params": without_unused_keys(value["target"], value["params"])[0]}
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
        help="allow any class, URL, command and environment variable in the configs; they can then run any code",
    )
