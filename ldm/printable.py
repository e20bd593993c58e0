"""Texts for messages and saved files: control characters are escaped, and passwords, tokens and keys are hidden."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<hidden>"

# Control characters, line ends and marks of text direction; and surrogates, which represent undecodable bytes of file
# names and cannot be printed.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")

_END = r"\s'\"<>"  # characters that end a URL in a text
_WORD = re.compile(rf"[^{_END}]+")
_PARAMETER = re.compile(r"[^&;]+")  # of the query of a URL
_SHORT = 6  # letters below which a parameter, such as true, hides nothing
_SECRET_NAME = r"(?:api_?key|api_?token|auth_?token|access_?key|access_?token|passw(?:or)?d|secret|credential)s?"
_SETTING = re.compile(rf"(?i)((?<![a-z0-9]){_SECRET_NAME}=)(?!\$\{{)[^{_END}]+")
_KEY = re.compile(rf"(?i)(?:.*_)?{_SECRET_NAME}")
# In the command of a `pipe:` also headers, and the option of curl and wget for user and password.
_PIPE = re.compile(r"pipe\s*:.*", re.IGNORECASE | re.DOTALL)
_IN_COMMAND = (
    re.compile(r"(?i)((?:authorization|cookie|x-[\w-]{1,40})\s*:\s*)(?!\$\{)[^'\"]+"),
    re.compile(r"((?:^|\s)(?:-u|--user|--password|--http-password)[\s=]*)(?!\$\{)[^\s'\"]+"),
    re.compile(r"(?i)((?:key|token|secret|passw(?:or)?d)\w{0,40}\s*=\s*)(?!\$\{)[^\s'\"]+"),
)


def escaped(text: str, keep: str = "") -> str:
    """Return `text` with control characters escaped, such as `\\x1b`, except for those in `keep`."""

    def written(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else repr(found[0])[1:-1]

    return _UNPRINTABLE.sub(written, text)


def redacted(text: str) -> str:
    """Return `text` with `<hidden>` in place of secrets.

    Secrets are user and password of a URL, values of six or more letters in its query, settings such as `api_key=`,
    and headers and passwords in the command of a `pipe:`. References such as `${oc.env:NAME}` stay. The time is linear
    in the length of `text`, which may be from a hostile file.
    """
    if "pipe" in text.casefold():
        text = _PIPE.sub(_redacted_command, text)
    if "://" in text:
        text = _WORD.sub(lambda found: _redacted_urls(found[0]), text)
    return _SETTING.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def printable(text: str, keep: str = "") -> str:
    """Return `text` without secrets, and with control characters escaped except for those in `keep`."""
    return escaped(redacted(text), keep)


def without_secrets(config: Any, key: str = "") -> Any:
    """Return `config`, of plain dicts and lists, with `<hidden>` in place of secrets.

    Secrets are those of `redacted`, and values of keys such as `password` and `api_key`. `key` is that of `config`.
    """
    if isinstance(config, Mapping):
        return {name: without_secrets(part, str(name)) for name, part in config.items()}
    if isinstance(config, list | tuple):
        return [without_secrets(part, key) for part in config]
    if not isinstance(config, str):
        return config
    return _hidden_text(config) if _KEY.fullmatch(key) else redacted(config)


def hidden_keys(config: Any, key: str = "") -> list[str]:
    """Return the dotted keys of values in `config` from which `without_secrets` has removed a secret."""
    parts = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    found = [key] if isinstance(config, str) and HIDDEN in config else []
    return found + [name for part, value in parts for name in hidden_keys(value, f"{key}.{part}".lstrip("."))]


def _redacted_urls(word: str) -> str:
    """Return a `word` without spaces, in which each `://` begins the address of a URL."""
    scheme, *addresses = word.split("://")
    return "://".join([scheme, *map(_redacted_address, addresses)])


def _redacted_address(address: str) -> str:
    place, mark, query = address.partition("?")
    host, slash, path = place.partition("/")
    user, at, host = host.rpartition("@")
    query = _PARAMETER.sub(lambda found: _redacted_parameter(found[0]), query)
    return f"{_hidden_text(user) if user else ''}{at}{host}{slash}{path}{mark}{query}"


def _redacted_parameter(parameter: str) -> str:
    name, mark, value = parameter.partition("=") if "=" in parameter else ("", "", parameter)
    return f"{name}{mark}{value if len(value) < _SHORT else _hidden_text(value)}"


def _hidden_text(text: str) -> str:
    return text if "${" in text else HIDDEN


def _redacted_command(found: re.Match[str]) -> str:
    text = found[0]
    for pattern in _IN_COMMAND:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text
