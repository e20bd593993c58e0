"""What a config may name without being trusted: it is data, and building what it describes runs no code in it.

The one place of this policy; `ldm.config.load.load_config` holds every config against it. Imports no torch.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from typing import Any

from ldm.config.braces import expand_braces
from ldm.util import UserError, get_obj_from_str

# Where the classes are defined that configs name: models, layers, optimizers, and what Lightning is told to use.
# Not whole packages: torch and transformers have classes that start processes, and functions that unpickle files.
PACKAGES = (
    "ldm",
    "torch.nn",
    "torch.optim",
    "torchao.optim",
    "torchmetrics",
    "transformers.optimization",
    *(
        f"{lightning}.{part}"
        for lightning in ("pytorch_lightning", "lightning.pytorch")
        for part in ("callbacks", "loggers", "plugins", "strategies")
    ),
)
# What may be imported to see what is meant: the packages themselves, and main.py, which passes on classes of ldm.
_IMPORTED = {"main", *(package.partition(".")[0] for package in PACKAGES)}
_HINT = "give --trust-config if you trust whoever wrote the config"


def check_trust(config: Any, source: str, typed: Any = ()) -> None:
    """Hold `config`, plain dicts and lists, against the policy; `source` names it in messages.

    A `target` must be a class that is defined in one of `PACKAGES`; what is not there at all is left to whoever builds
    it. No string may be a `pipe:` URL, which is a command. What a person typed, the strings in `typed`, is exempt.

    Raises:
        UserError: one of these is not so.
    """
    exempt = {text for _, text in _strings(typed)}
    for key, text in _strings(config):
        if text in exempt:
            continue
        if key == "target":
            _check_target(text, source)
        elif runs_command(text):
            raise UserError(f"{source}: {text!r:.100} runs a command; {_HINT}")


def needs_trust(config: Any) -> bool:
    """Whether `config`, read from a file as it stands, would need trust, though a person may have typed it now."""
    try:
        check_trust(config, "config")
    except UserError:
        return True
    return False


def _check_target(target: str, source: str) -> None:
    if target.partition(".")[0] not in _IMPORTED:
        raise UserError(f"{source}: target {target!r:.100} is of none of the packages that need no trust; {_HINT}")
    try:
        found = get_obj_from_str(target)
    except UserError:  # a slip, or a class that Lightning no longer has: nothing that could run
        return
    if not inspect.isclass(found):
        raise UserError(f"{source}: target {target!r:.100} is no class; {_HINT}")
    if not any(found.__module__ == package or found.__module__.startswith(f"{package}.") for package in PACKAGES):
        raise UserError(
            f"{source}: target {target!r:.100} is defined in {found.__module__}, which is none of the packages that "
            f"need no trust; {_HINT}"
        )


def _strings(value: Any, key: Any = None) -> Iterator[tuple[Any, str]]:
    """Each scalar in `value` as a string (YAML can make paths too), with the key that it stands under."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _strings(part, name)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part, key)
    else:
        yield key, str(value)


def runs_command(text: str) -> bool:
    """Whether `text`, read as URLs, has a `pipe:`, which WebDataset gives to a shell."""
    if ":" not in text:
        return False
    try:
        return any(url.lower().startswith("pipe:") for pattern in text.split("::") for url in expand_braces(pattern))
    except UserError:  # what cannot be expanded is not read either
        return False


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add `--trust-config` to the parser of a command that builds what a config describes."""
    parser.add_argument(
        "--trust-config",
        action="store_true",
        help="let the configs name any class, and commands to read data from: they can then run any code",
    )
