"""A page over a folder of runs: what is running, how the loss goes, what the samples look like. It only reads.

The server listens on the loopback interface and answers only requests that name it so: a page from elsewhere that
resolves its own name to 127.0.0.1 is refused by its Host header.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from graft.app import page
from graft.app.report import RunView

if TYPE_CHECKING:
    from graft.studio.runs import Run

LOOPBACK = "127.0.0.1"
LOG_LINES = 40
REFRESH_SECONDS = 4


def find(runs: Path, name: str) -> Run | None:
    """The run of that name, looked up among the runs that are there: a name never becomes a path."""
    from graft.studio.runs import list_runs

    return next((run for run in list_runs(runs) if run.folder.name == name), None)


def samples(run: Run) -> list[Path]:
    """Sample pictures of a run, the newest step first."""
    return sorted(run.samples(), key=lambda path: path.stat().st_mtime, reverse=True)


def picture_url(run: Run, path: Path) -> str:
    """Address of a run's sample on this server."""
    return quote(f"/runs/{run.folder.name}/{path.relative_to(run.folder).as_posix()}")


def overview(runs: Path) -> str:
    """The page with every run, the newest first."""
    from graft.studio.runs import list_runs

    found = sorted(list_runs(runs), key=lambda run: run.folder.name, reverse=True)
    cards = "".join(card(run) for run in found) or (
        "<p>No runs yet. Start one with <code>graft train job.toml</code>.</p>"
    )
    head = f'<h1>Runs</h1><p class="soft">{len(found)} in {escape(str(runs.resolve()))}</p>'
    refresh = REFRESH_SECONDS if any(run.status == "running" for run in found) else None
    return page.document("Runs", head + cards, refresh)


def card(run: Run) -> str:
    """One run in the overview."""
    view = RunView.of(run)
    newest = samples(run)[:4]
    last = view.metrics[-1] if view.metrics else {}
    facts = [f"{key} {page.text(last[key])}" for key in ("step", "loss") if key in last]
    thumbs = "".join(page.picture("", path, picture_url(run, path)) for path in newest)
    link = f'<h3><a href="{quote(f"/runs/{view.name}")}">{escape(view.name)}</a></h3>'
    head = f'<div class="row">{link}{page.status(view.status)}<span class="soft">{", ".join(facts)}</span></div>'
    return f'<section class="card">{head}{f"""<div class="row thumbs">{thumbs}</div>""" if thumbs else ""}</section>'


def detail(run: Run) -> str:
    """The page of one run."""
    view = RunView.of(run)
    log = run.folder / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
    figures = "".join(page.picture(path.stem, path, picture_url(run, path)) for path in samples(run))
    last = {key: value for key, value in (view.metrics[-1] if view.metrics else {}).items() if key != "attempt"}
    parts = [
        '<p class="soft"><a href="/">Runs</a></p>',
        f'<div class="row"><h1>{escape(view.name)}</h1>{page.status(view.status)}</div>',
        page.figures(last),
        f'<h2>Loss</h2><div class="card">{page.curve({"loss": view.series()})}</div>',
        f'<h2>Samples</h2><div class="grid">{figures}</div>' if figures else "",
        f"<h2>Log</h2><pre>{escape(chr(10).join(lines))}</pre>" if lines else "",
        f"<h2>Job</h2><pre>{escape(view.job)}</pre>" if view.job else "",
    ]
    return page.document(view.name, "".join(parts), REFRESH_SECONDS if view.status == "running" else None)


class Handler(BaseHTTPRequestHandler):
    """Answers GET for the overview, a run, and a run's samples; everything else is an error."""

    runs: Path
    server_version = "graft"
    sys_version = ""

    def do_GET(self) -> None:
        """Routes one request."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in {f"{LOOPBACK}:{port}", f"localhost:{port}"}:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "This server answers on the loopback interface only")
            return
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case [""]:
                self.answer(overview(self.runs))
            case ["runs", name]:
                self.show(name, detail)
            case ["runs", name, *rest]:
                self.show_sample(name, "/".join(rest))
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def show(self, name: str, draw: Callable[[Run], str]) -> None:
        """Sends a run's page."""
        run = find(self.runs, name)
        if run is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self.answer(draw(run))

    def show_sample(self, name: str, wanted: str) -> None:
        """Sends a picture, if it is one of the run's samples."""
        run = find(self.runs, name)
        paths = {path.relative_to(run.folder).as_posix(): path for path in run.samples()} if run else {}
        if wanted not in paths:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.answer(paths[wanted].read_bytes(), page.media_type(paths[wanted]))

    def answer(self, content: str | bytes, kind: str = "text/html; charset=utf-8") -> None:
        """Sends a document with headers that forbid the browser to guess, keep or embed it."""
        data = content.encode() if isinstance(content, str) else content
        self.send_response(HTTPStatus.OK)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Content-Security-Policy": page.POLICY + "; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet: a reader who refreshes is no news."""


def make_server(runs: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server over a folder of runs, bound to the loopback interface and not yet started; port 0 picks a free one."""
    return ThreadingHTTPServer((LOOPBACK, port), type("RunsHandler", (Handler,), {"runs": runs}))


def serve(runs: Path, port: int = 7860) -> None:
    """Serves until interrupted."""
    with make_server(runs, port) as server:
        print(f"http://{LOOPBACK}:{server.server_address[1]}  (stop with Ctrl-C)", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
