"""Fixtures of tests in a browser: Chromium, driven by Playwright, with nothing but this machine to talk to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.watched import BLOCKED_HOSTS, Watch

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "tests/browser need Chromium, and none is in PATH. Debian: sudo apt-get install chromium"


@pytest.fixture(scope="module")  # while it is open, asyncio takes this thread for one with a running loop
def browser() -> Iterator[Browser]:
    """Start Chromium without a window. Fail if it is not installed."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.fail(MISSING)
    with sync_playwright() as playwright:
        # The sandbox does not start as root, and the pages are our own.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", BLOCKED_HOSTS]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return a function that opens an address in a browser of its own, `width` pixels wide, light or dark.

    The test fails at its end if a page had an error in its console, a failed request, or a request to another machine.
    """
    watch, contexts = Watch(), []

    def open_(url: str, width: int = 1280, *, dark: bool = False, offline: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=offline
        )
        contexts.append(context)
        watch.follow(context)
        page = context.new_page()
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert watch.faults == []
