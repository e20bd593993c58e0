"""Chromium of this machine, without a window and without other machines."""

from __future__ import annotations

import shutil

from playwright.sync_api import Browser, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Chromium resolves no other name, whoever asks: pages, workers, sockets, or the browser itself.
_BLOCKED_HOSTS = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost, EXCLUDE ::1"
# The sandbox does not start as root, and the pages are our own.
_ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", _BLOCKED_HOSTS]


def start_chromium(playwright: Playwright) -> Browser:
    """Start Chromium.

    Raises:
        FileNotFoundError: it is not installed.
    """
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise FileNotFoundError("no Chromium in PATH; install it, on Debian with: sudo apt-get install chromium")
    return playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
