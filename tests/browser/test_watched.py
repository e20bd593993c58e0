"""The checks of the browser tests themselves: each finds its fault in a page that has it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.watched import Watch, not_rendered, overflow, violations
from tests.waiting import LIMIT

PAGE = '<!DOCTYPE html><html lang="en"><title>A page</title><body>{}</body></html>'


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def page(browser: Browser, watch: Watch) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    watch.follow(context)
    yield context.new_page()
    context.close()


@pytest.mark.parametrize(("body", "rule"), [
    ('<p style="color: #bbb; background: #fff">pale</p>', "color-contrast"),
    ('<div style="width: 9em; overflow: auto"><svg width="400" height="9"><rect width="9" height="9"/></svg></div>',
     "scrollable-region-focusable"),
    ('<input type="text">', "label"),
    ("<button></button>", "button-name"),
    ('<p style="color: #222; background: #fff">dark</p><label>Name <input></label>', None),
])  # fmt: skip
def test_violations_finds(page: Page, body: str, rule: str | None) -> None:
    page.set_content(PAGE.format(body))
    assert [found.split()[0] for found in violations(page)] == ([] if rule is None else [rule])


def test_overflow_measures_what_is_too_wide(page: Page) -> None:
    page.set_content(PAGE.format('<div style="width: 500px">wide</div>'))
    assert overflow(page) >= 500 - 390
    page.set_content(PAGE.format("<div>narrow</div>"))
    assert overflow(page) == 0


@pytest.mark.parametrize("body", [
    '<img src="data:image/png;base64,AAAA" alt="broken">',
    '<svg width="9" height="9"></svg>',
    '<svg width="0" height="9"><rect width="9" height="9"/></svg>',
    '<canvas width="0" height="9"></canvas>',
])  # fmt: skip
def test_not_rendered_finds(page: Page, body: str) -> None:
    page.set_content(PAGE.format('<svg width="9" height="9"><rect width="9" height="9"/></svg>'))
    assert not_rendered(page) == []
    page.set_content(PAGE.format(body))
    assert len(not_rendered(page)) == 1


@pytest.mark.parametrize(("script", "fault"), [
    ("console.error('an error')", "console: an error"),
    ("setTimeout(() => { throw new Error('a defect') })", "uncaught: "),
    ("new Image().src = 'http://example.org/x.png'", "request to another machine: http://example.org/x.png"),
])  # fmt: skip
def test_watch_finds(page: Page, watch: Watch, script: str, fault: str) -> None:
    page.evaluate(f"() => {{ {script} }}")
    end = time.monotonic() + LIMIT
    while not watch.faults and time.monotonic() < end:
        page.wait_for_timeout(20)
    assert watch.faults[0].startswith(fault)


def test_watch_passes_a_warning(page: Page, watch: Watch) -> None:
    with page.expect_console_message():
        page.evaluate("() => { console.warn('a warning') }")
    assert not watch.faults
