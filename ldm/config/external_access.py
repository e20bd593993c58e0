"""Detection of texts in a config that run a command or open a URL when they are used as a file name."""

from __future__ import annotations

import re
import unicodedata

from ldm.config.braces import expand_braces, most_names
from ldm.util import UserError

COMMAND = "runs a command"
NETWORK = "is a URL, which contacts another machine"
UNCLEAR = "may not be a local file"

# Characters that readers of URLs ignore or treat as quotes.
_DROPPED = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\\'\"`]")
_PIPE = re.compile(r"(?<![a-z0-9])pipe\s*:")
_SHELL = re.compile(r"(?:^|::|[{,])\s*[!|]")
# Not a URL: a drive letter, a colon before a digit (cuda:0, 12:30), or a colon before a space (prose).
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:(?=[^\s\d])")
_KNOWN_SCHEME = re.compile(r"(ais|ftps?|gs|hf|htgs|https?|s3|scp|sftp|ssh):")
_FILE = re.compile(r"^(file:(//)?)+")
_BRACE = re.compile(r"\{[^{}]*(,|\.\.)[^{}]*\}")
_MOST_EXPANDED = 1000  # names per text


def external_access(text: str) -> str | None:
    """Return the effect of opening `text`: `COMMAND`, `NETWORK`, `UNCLEAR`, or None for a local file.

    `text` is parsed with the rules of WebDataset and fsspec, in which `::` and braces join several URLs.
    """
    read = _DROPPED.sub("", unicodedata.normalize("NFKC", text)).casefold()
    if _PIPE.search(read) or _SHELL.search(read):
        return COMMAND
    if ":" not in read:
        return None
    return next(filter(None, map(_access_of_part, read.split("::"))), None)


def _access_of_part(part: str) -> str | None:
    part = _FILE.sub("", part.strip())
    if "://" in part:
        return NETWORK
    before, _, _ = part.rpartition(":")
    if not before:
        return None
    if part.count("{") != part.count("}"):
        return UNCLEAR
    if "{" not in before or not _BRACE.search(part):
        return _access_of_name(part)
    if most_names(part) > _MOST_EXPANDED:  # braces may form the scheme
        return UNCLEAR
    try:
        return next(filter(None, map(_access_of_name, expand_braces(part))), None)
    except UserError:
        return UNCLEAR


def _access_of_name(name: str) -> str | None:
    name = _FILE.sub("", name.strip())
    if _PIPE.search(name) or _SHELL.search(name):
        return COMMAND
    if _KNOWN_SCHEME.match(name) or _SCHEME.match(name) or "://" in name or "::" in name:
        return NETWORK
    return None
