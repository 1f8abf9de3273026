"""`shearling serve`: the report of a run, made anew whenever the run has moved, for this machine.

Only 127.0.0.1 is listened on, and only requests that name it are answered: a web page elsewhere
can make a browser send requests here under a name of its own (DNS rebinding). Nothing can be
written: there is GET, and three addresses.
"""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipelines.journal import read_status
from reports.page import live_report
from shearling import ShearlingError, __version__

HOST = "127.0.0.1"
SECONDS_BETWEEN = 10
"""How often the page asks again while the run is at work."""


class LiveReport:
    """The run's page and status, rendered at most once for each state of its files."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.port = 0
        self._lock = threading.Lock()
        self._mark: object = None
        self._page = b""

    def page(self) -> bytes:
        with self._lock:
            mark = self._files()
            if mark != self._mark:
                self._page = live_report(self.run, refresh=SECONDS_BETWEEN).encode()
                self._mark = mark
            return self._page

    def status(self) -> bytes:
        return json.dumps(read_status(self.run), ensure_ascii=False, allow_nan=False).encode()

    def _files(self) -> object:
        """What changes when there is something new to show; `running` may change by itself."""
        paths = [self.run / "run.json", *sorted((self.run / "stages").glob("*/*.json*"))]
        stats = [(str(path), path.stat().st_mtime_ns) for path in paths if path.exists()]
        return read_status(self.run)["state"], stats


class _Handler(BaseHTTPRequestHandler):
    server_version = f"shearling/{__version__}"
    sys_version = ""
    timeout = 10
    report: LiveReport

    def do_GET(self) -> None:
        if not self._named_us():
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"Ask for 127.0.0.1 or localhost.\n")
            return
        routes = {
            "/": ("text/html; charset=utf-8", self.report.page),
            "/status.json": ("application/json", self.report.status),
        }
        kind, make = routes.get(self.path.partition("?")[0], ("", None))
        if make is None:
            self._answer(HTTPStatus.NOT_FOUND, b"There is / and /status.json.\n")
            return
        try:
            self._answer(HTTPStatus.OK, make(), kind)
        except ShearlingError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())

    def _named_us(self) -> bool:
        hosts = [[f"{name}:{self.report.port}"] for name in (HOST, "localhost")]
        return self.headers.get_all("Host", []) in hosts

    def _answer(self, code: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not worth a line each."""


def make_server(run: Path, port: int) -> ThreadingHTTPServer:
    """A server that is ready for `serve_forever`; ``port`` 0 takes a free one.

    Raises:
        ShearlingError: if the folder is no run, or the port is taken.
    """
    read_status(run)
    report = LiveReport(run)
    handler = type("Handler", (_Handler,), {"report": report})
    try:
        server = ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise ShearlingError(
            f"Port {port} can't be used: {error.strerror}.",
            hint="Name another one with --port, or 0 for any that is free.",
        ) from error
    server.daemon_threads = True
    report.port = server.server_port
    return server
