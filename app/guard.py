"""What stands between the network and the pages: who may ask, from where, for what, and how much at once.

A page from elsewhere cannot reach the studio by a name that it made resolve to this machine (the Host header must be an
address, localhost or a name that was given), nor have a browser send it anything (the Origin of whatever changes
something must be the studio itself). With a token, nothing but the login is answered without it.
"""

from __future__ import annotations

import hmac
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from html import escape
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit

from graft.app import page

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COOKIE = "graft"
TRIES, SECONDS = 5, 60.0
"""Wrong tokens that are heard in so many seconds; then nobody can log in until some are past."""
MAX_UPLOAD = 512 << 20
"""Bytes of one upload, all its files together."""
MAX_BODY = 4 << 20
"""Bytes of any other request."""
ROUTES = re.compile(
    r"/(teach|preview|compare|library|login|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)?/?"
    r"|/(assets|static|svelte|files)/[\w./@%+ ~()<>,=-]+"
    r"|/gradio_api/(app_id|startup-events|theme\.css|upload|upload_progress|reset|cancel|queue/join|queue/data)/?"
    r"|/gradio_api/(run/predict|heartbeat/\w+|info)/?|/gradio_api/file=.+"
)
"""All that is answered: the pages, what they are made of, and what they send."""
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
PIXELS = (b"image/png", b"image/jpeg", b"image/webp")
"""Types of uploaded files that are shown."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Any, names: Sequence[str] = (), token: str = ""):
        self.app, self.token = app, token
        self.names = {"localhost", *(name.lower() for name in names)}
        self.wrong: deque[float] = deque()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, refuse, or pass on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        path = scope["path"]
        if refusal := self.refusal(scope["method"], path, headers):
            await answer(send, *refusal)
        elif self.token and path.rstrip("/") == "/login":
            await self.login(scope, receive, send)
        elif self.token and not self.admits(headers):
            await self.unknown(scope, send)
        else:
            limit = MAX_UPLOAD if path.rstrip("/") == "/gradio_api/upload" else MAX_BODY
            await self.pass_on(scope, receive, send, headers, limit)

    def refusal(self, method: str, path: str, headers: MutableMapping[str, str]) -> tuple[int, str] | None:
        """Return why a request is refused before anything else is looked at, or None."""
        host = headers.get("host", "")
        if not self.knows(host):
            return 421, "This studio is not reached under that name. Start it with --name NAME to allow one."
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and urlsplit(origin).netloc != host:
            return 403, "Another site may not act here."
        away = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
        if away and headers.get("sec-fetch-mode") != "navigate":
            return 403, "Another site may not read here."
        if method not in ("GET", "HEAD", "POST"):
            return 405, "Only GET and POST are answered."
        return None if ROUTES.fullmatch(path) and ".." not in path else (404, "There is nothing here.")

    def knows(self, host: str) -> bool:
        """Tell whether a Host header is an address or a known name; a rebinding attack needs a name of its own."""
        name = urlsplit(f"//{host}").hostname if host and not set(host) & set("/@\\") else None
        if name is None or name in self.names:
            return name is not None
        try:
            ip_address(name)
        except ValueError:
            return False
        return True

    def admits(self, headers: MutableMapping[str, str]) -> bool:
        """Tell whether a request carries the token, as cookie or as bearer."""
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given = headers.get("authorization", "").removeprefix("Bearer ") or (cookie.value if cookie else "")
        return hmac.compare_digest(given.encode(), self.token.encode())

    async def unknown(self, scope: Message, send: Send) -> None:
        """Send people to the login and programs away."""
        if scope["method"] == "GET" and scope["path"] in ("/", "/teach", "/preview", "/compare", "/library"):
            await answer(send, 303, "", location="/login")
        else:
            await answer(send, 401, "Give the token: Authorization: Bearer TOKEN.")

    async def login(self, scope: Message, receive: Receive, send: Send) -> None:
        """Show the form, or take the token from it."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["method"] == "POST":
            body = await body_of(receive, 4096)
            given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
        now = time.monotonic()
        while self.wrong and now - self.wrong[0] > SECONDS:
            self.wrong.popleft()
        if len(self.wrong) >= TRIES:
            await answer(send, 429, "Too many wrong tokens. Wait a minute.")
        elif hmac.compare_digest(given.encode(), self.token.encode()):
            flags = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            await answer(send, 303, "", location="/", **{"set-cookie": flags})
        elif given:
            self.wrong.append(now)
            await answer(send, 401, form("That is not the token."), "text/html; charset=utf-8")
        else:
            await answer(send, 200, form(), "text/html; charset=utf-8")

    async def pass_on(
        self, scope: Message, receive: Receive, send: Send, headers: MutableMapping[str, str], limit: int
    ) -> None:
        """Let the application answer, count what it is sent, and add the headers that bind the browser."""
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            await answer(send, 413, f"At most {limit >> 20} MB at once.")
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return message if seen <= limit else {"type": "http.disconnect"}

        async def bound(message: Message) -> None:
            if message["type"] == "http.response.start":
                if scope["path"].startswith("/gradio_api/file="):
                    message["headers"] = harmless(message["headers"])
                own = {key.lower() for key, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await self.app(scope, counted, bound)


def harmless(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of a file that a browser has sent: shown if it is a picture of pixels, else only kept, never run."""
    kind = next((value for key, value in headers if key.lower() == b"content-type"), b"").split(b";")[0].strip()
    kept = [(k, v) for k, v in headers if k.lower() not in (b"content-disposition", b"content-security-policy")]
    way = b"inline" if kind in PIXELS else b"attachment"
    return [*kept, (b"content-disposition", way), (b"content-security-policy", b"default-src 'none'; sandbox")]


async def body_of(receive: Receive, limit: int) -> bytes:
    """A small request body, cut at `limit` bytes."""
    body, more = b"", True
    while more and len(body) < limit:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body[:limit]


async def answer(send: Send, status: int, text: str, kind: str = "text/plain; charset=utf-8", **headers: str) -> None:
    """Send a short answer of the guard's own."""
    plain = {**HEADERS, "content-type": kind, "cache-control": "no-store", **headers}
    pairs = [(key.encode(), value.encode("latin-1")) for key, value in plain.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": text.encode()})


def form(complaint: str = "") -> str:
    """The login page."""
    told = f'<p role="alert">{escape(complaint)}</p>' if complaint else ""
    body = (
        f'<h1>Graft Studio</h1>{told}<form method="post" action="/login"><p><label>Token of the terminal<br>'
        '<input name="token" type="password" autocomplete="current-password" autofocus required></label></p>'
        '<p><button type="submit">Open the studio</button></p></form>'
    )
    return page.document("Graft Studio", body).replace("form-action 'none'", "form-action 'self'")
