"""What tests in a browser look at: faults while a page is open, its layout, its figures, and its accessibility."""

from __future__ import annotations

from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request, Response

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ABORTED = "net::ERR_ABORTED"  # the page went away while it loaded something
# Gradio closes its stream of events when the page goes away. A server that is gone also gives failed requests.
_CLOSED = ("AbortError: signal is aborted without reason", "Unexpected error Connection errored out.")
_SEVERE = ("serious", "critical")
_RULES = {"resultTypes": ["violations"], "rules": {"color-contrast": {"enabled": True}}}


class Watch:
    """Faults of the pages of some contexts, in words."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def follow(self, context: BrowserContext) -> None:
        context.on("console", self._console)
        context.on("weberror", lambda error: self.faults.append(f"uncaught: {error.error}"))
        context.on("request", self._request)
        context.on("requestfailed", self._failed)
        context.on("response", self._response)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith(_CLOSED):
            self.faults.append(f"console: {message.text} ({message.location.get('url')})")

    def _request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob", "file", "about") and parts.hostname not in LOOPBACK:
            self.faults.append(f"request to another machine: {request.url:.200}")

    def _failed(self, request: Request) -> None:
        if request.failure != _ABORTED:
            self.faults.append(f"failed: {request.url:.200} ({request.failure})")

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.faults.append(f"status {response.status}: {response.url:.200}")


def violations(page: Page) -> list[str]:
    """Return the serious and critical violations that axe-core finds, each with its elements."""
    found = Axe().run(page, options=_RULES).response["violations"]
    return [
        f"{rule['id']} ({rule['impact']}): {', '.join(' '.join(map(str, node['target'])) for node in rule['nodes'])}"
        for rule in found
        if rule["impact"] in _SEVERE
    ]


def overflow(page: Page) -> int:
    """Return by how many pixels the page is wider than its window."""
    return page.evaluate("Math.max(0, document.documentElement.scrollWidth - innerWidth)")


def not_rendered(page: Page) -> list[str]:
    """Return the visible figures and images of the page that show nothing, once all images are loaded."""
    page.eval_on_selector_all("img", "all => all.forEach(one => { one.loading = 'eager'; })")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return page.evaluate("""() => [...document.querySelectorAll("img, svg, canvas")].filter(part => {
        if (!part.checkVisibility()) return false;
        const box = part.getBoundingClientRect();
        const empty = part.tagName === "IMG" ? !(part.complete && part.naturalWidth > 0)
            : part.tagName === "svg" ? !part.querySelector("path, use, image, circle, rect, line, polyline, polygon")
            : !(part.width > 0 && part.height > 0);
        return empty || box.width < 1 || box.height < 1;
    }).map(part => part.outerHTML.slice(0, 200))""")


def check(page: Page) -> None:
    """Assert that the page fits its window, shows all its figures, and has no severe violation."""
    found = {"pixels of overflow": overflow(page), "not rendered": not_rendered(page), "violations": violations(page)}
    assert not any(found.values()), found
