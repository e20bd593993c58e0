"""Parsing of config values on the command line, without silent changes. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

from ldm.util import UserError

# Numbers, booleans and null. Unlike in YAML 1.1, `on`, `010`, `1_000` and `12:30:00` are text.
_SCALAR = re.compile(
    r"true|false|null|~|[-+]?(0|[1-9]\d*)|[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.inf|\.nan|",
    re.IGNORECASE,
)


def parse_value(text: str) -> Any:
    """Return the value of `text`.

    Numbers, true, false and null (or an empty text) are parsed. Quotes around a text are removed. Lists in brackets,
    and mappings in braces with a value per key, are parsed as YAML. Any other text is kept: `*.tar`, `a #b`, `{a,b}`.

    Raises:
        UserError: a list or a quoted text is not valid YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ends = text[:1] + text[-1:] if len(text) > 1 else ""
    for opening, closing in ("[]", "{}"):
        if text.startswith(opening) and closing not in text:
            raise UserError(f"{text!r:.100}: the value is not valid YAML (it lacks {closing!r})")
    if not _SCALAR.fullmatch(text) and ends not in ("[]", "{}", "''", '""'):
        return text
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, AttributeError, RecursionError) as error:
        if ends == "{}" or ("[" in text[1:] and ends == "[]"):  # brace patterns, and names like `[1] and [2]`
            return text
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{text!r:.100}: the value is not valid YAML ({reason:.200})") from error
    if ends == "{}" and not ((isinstance(value, dict) and None not in value.values()) or text == "{}"):
        return text
    return value
