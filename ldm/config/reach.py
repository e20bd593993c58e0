"""What a text in a config reaches if something opens it: a command, another machine, or local files alone."""

from __future__ import annotations

import re
import unicodedata

from ldm.config.braces import expand_braces, most_names
from ldm.util import UserError

COMMAND = "runs a command"
NETWORK = "is a URL, which reaches out of this machine"
UNCLEAR = "cannot be told to be a local file"

# Characters that readers of URLs drop or take as mere quoting.
_DROPPED = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\\'\"`]")
_PIPE = re.compile(r"(?<![a-z0-9])pipe\s*:")
_SHELL = re.compile(r"(?:^|::|[{,])\s*[!|]")
# One letter is a drive; a digit after it, as in cuda:0 or 12:30, is no URL. Prose has a space after its colon.
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:(?=[^\s\d])")
_KNOWN_SCHEME = re.compile(r"(ais|ftps?|gs|hf|htgs|https?|s3|scp|sftp|ssh):")
_FILE = re.compile(r"^(file:(//)?)+")
_BRACE = re.compile(r"\{[^{}]*(,|\.\.)[^{}]*\}")
_MOST_EXPANDED = 1000  # names of one text


def reach(text: str) -> str | None:
    """Return what `text` does where it is opened as a file, `COMMAND`, `NETWORK` or `UNCLEAR`; None for local files.

    It is read as WebDataset and fsspec read URLs: `::` joins several, and braces stand for several.
    """
    read = _DROPPED.sub("", unicodedata.normalize("NFKC", text)).casefold()
    if _PIPE.search(read) or _SHELL.search(read):
        return COMMAND
    if ":" not in read:
        return None
    return next(filter(None, map(_reach_of_part, read.split("::"))), None)


def _reach_of_part(part: str) -> str | None:
    part = _FILE.sub("", part.strip())
    if "://" in part:
        return NETWORK
    before, _, _ = part.rpartition(":")
    if not before:
        return None
    if part.count("{") != part.count("}"):
        return UNCLEAR
    if "{" not in before or not _BRACE.search(part):
        return _reach_of_name(part)
    if most_names(part) > _MOST_EXPANDED:  # and the scheme itself may be made by braces
        return UNCLEAR
    try:
        return next(filter(None, map(_reach_of_name, expand_braces(part))), None)
    except UserError:
        return UNCLEAR


def _reach_of_name(name: str) -> str | None:
    name = _FILE.sub("", name.strip())
    if _PIPE.search(name) or _SHELL.search(name):
        return COMMAND
    if _KNOWN_SCHEME.match(name) or _SCHEME.match(name) or "://" in name or "::" in name:
        return NETWORK
    return None
