"""Server of the page: files of allowed folders, the checks of each request, and the address."""

from __future__ import annotations

import base64
import hmac
import mimetypes
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response

from ldm.studio.html_parts import FILE_ROUTE
from ldm.studio.studio import Studio
from ldm.studio.tabs import build_page, page_options
from ldm.util import UserError

Scope = MutableMapping[str, Any]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]

_NAMES = ("localhost", "127.0.0.1", "[::1]")  # of this machine, in a browser on it
_UPLOADS = "/gradio_api/upload"  # the page takes no files


class Guard:
    """ASGI middleware that refuses requests of other sites, uploads and, if there is a `password`, of strangers.

    Without a password only this machine is served. A request must then name it in `Host`, so that a name that somebody
    else points to this machine opens nothing. `Origin`, if it is sent, must be the page itself.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], password: str | None = None) -> None:
        self.app, self.password = app, password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self.refusal(headers, scope["path"])
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def refusal(self, headers: Mapping[str, str], path: str) -> Response | None:
        """Return the answer to a request that is refused, else None."""
        host = headers.get("host", "")
        if self.password is None and _without_port(host) not in _NAMES:
            return PlainTextResponse("This studio serves its own machine only.", 403)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return PlainTextResponse("Requests of other sites are refused.", 403)
        if path.startswith(_UPLOADS):
            return PlainTextResponse("Uploads are refused.", 403)
        if self.password is not None and not _is_authorised(headers.get("authorization", ""), self.password):
            return PlainTextResponse("Give the password.", 401, {"WWW-Authenticate": 'Basic realm="studio"'})
        return None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _is_authorised(header: str, password: str) -> bool:
    kind, _, value = header.partition(" ")
    if kind.lower() != "basic":
        return False
    try:
        given = base64.b64decode(value, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return hmac.compare_digest(given, password.encode())


def build_app(studio: Studio, password: str | None) -> FastAPI:
    """Return the application: the page, and the files of allowed folders that it links."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(FILE_ROUTE)
    def send_file(path: str) -> Response:
        return file_response(studio, path)

    page = build_page(studio)
    options = page_options()
    app = gr.mount_gradio_app(
        app, page, "/", allowed_paths=[str(studio.thumbnails.folder)], show_error=True, footer_links=[],
        run_history=False, enable_monitoring=False, ssr_mode=False, **options,
    )  # fmt: skip
    app.add_middleware(Guard, password=password)
    return app


def file_response(studio: Studio, path: str) -> Response:
    """Return a file of an allowed folder. A report runs apart from the page, which its scripts cannot reach."""
    try:
        found = studio.allowed.check_existing(path, "file")
    except UserError as error:
        return PlainTextResponse(str(error), 403)
    if not found.is_file():
        return PlainTextResponse(f"{found}: not a file", 404)
    kind = mimetypes.guess_type(found.name)[0] or "application/octet-stream"
    headers = {"Content-Security-Policy": "sandbox allow-scripts", "X-Content-Type-Options": "nosniff"}
    is_shown = found.suffix in (".html", ".png")
    return FileResponse(found, media_type=kind, headers=headers, filename=found.name,
                        content_disposition_type="inline" if is_shown else "attachment")  # fmt: skip


def listen_at(host: str, port: int) -> socket.socket:
    """Return a socket that listens at `host` and `port`.

    Raises:
        UserError: the address is not available.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: not available ({error.strerror}); give another --port"
        ) from error
    return listener


def serve(studio: Studio, host: str, port: int, password: str | None, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C. `say` is called with its address."""
    listener = listen_at(host, port)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(build_app(studio, password), log_level="warning", timeout_graceful_shutdown=1)
    say(f"http://{shown}:{listener.getsockname()[1]}/")
    uvicorn.Server(config).run(sockets=[listener])
