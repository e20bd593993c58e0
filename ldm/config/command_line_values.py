"""Parsing of config values on the command line, without silent changes. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ldm.util import UserError, refuse_if

# Numbers, booleans and null. Unlike in YAML 1.1, `on`, `010`, `1_000` and `12:30:00` are text.
_NULL = ("null", "~", "")
_INTEGER = r"[-+]?(0|[1-9]\d*)"
_FLOAT = r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.inf|\.nan"
_SCALAR = re.compile(rf"(?:true|false|null|~|{_INTEGER}|{_FLOAT}|)$", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """YAML loader whose words are text except those of `_SCALAR`. Each key of a mapping occurs once and has a value.

    A brace pattern such as `{a,b}` has keys without values.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, (key, (_, value)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key}", node.start_mark)
            if isinstance(value, yaml.ScalarNode) and not value.value and value.style is None:
                raise ValueError(f"the key {key} has no value; put a brace pattern in quotes")
        return super().construct_mapping(node, deep)


def _construct_scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = node.value.lower()
    if text in _NULL:
        return None
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(_INTEGER, text) else float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("!scalar", _SCALAR, None)
_Loader.add_constructor("!scalar", _construct_scalar)


def parse_value(text: str) -> Any:
    """Return the value of `text`.

    Numbers, true, false and null (or an empty text) are parsed. Quotes around a text are removed. Lists in brackets
    are parsed as YAML, and so are mappings in braces with a value per key. Their entries follow the same rules as
    single values. Any other text is kept: `*.tar`, `a #b`, `{a,b}`, `on`.

    Raises:
        UserError: a list or a quoted text is not valid YAML.
    """
    ends = text[:1] + text[-1:] if len(text) > 1 else ""
    for opening, closing in ("[]", "{}"):
        refuse_if(
            text.startswith(opening) and closing not in text,
            f"{text!r:.100}: the value is not valid YAML (it lacks {closing!r})",
        )
    if not _SCALAR.fullmatch(text) and ends not in ("[]", "{}", "''", '""'):
        return text
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if ends == "{}" or ("[" in text[1:] and ends == "[]"):  # a brace pattern, or a name like `[1] and [2]`
            return text
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{text!r:.100}: the value is not valid YAML ({reason:.200})") from error
    return value
