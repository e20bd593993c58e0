"""Chromium of this machine, without a window and without other machines."""

from __future__ import annotations

import shutil

from playwright.sync_api import Browser, Playwright

MISSING = "no Chromium in PATH; install it, on Debian with: sudo apt-get install chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")
# Chromium resolves no other name, whoever asks: pages, workers, sockets, or the browser itself.
_BLOCKED_HOSTS = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost, EXCLUDE ::1"
# The sandbox does not start as root, and the pages are our own.
_ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", _BLOCKED_HOSTS]


def find_chromium() -> str | None:
    """Return the path of Chromium, or None if it is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def start_chromium(playwright: Playwright) -> Browser:
    """Start Chromium, which is installed."""
    return playwright.chromium.launch(executable_path=find_chromium(), args=_ARGUMENTS)
