"""Fixtures of tests in a browser: Chromium, driven by Playwright, with nothing but this machine to talk to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.chromium import MISSING, find_chromium, start_chromium
from tests.browser.watched import Watch
from tests.waiting import LIMIT


@pytest.fixture(scope="module")  # while it is open, asyncio takes this thread for one with a running loop
def browser() -> Iterator[Browser]:
    """Start Chromium without a window. Fail if it is not installed."""
    if find_chromium() is None:
        pytest.fail(MISSING, pytrace=False)
    expect.set_options(timeout=1000 * LIMIT)  # milliseconds
    with sync_playwright() as playwright:
        browser = start_chromium(playwright)
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
        context.set_default_timeout(1000 * LIMIT)
        contexts.append(context)
        watch.follow(context)
        page = context.new_page()
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not watch.faults, "\n".join(watch.faults)
