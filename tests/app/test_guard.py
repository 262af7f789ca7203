"""Who may ask, from where, for what: the guard alone, and in front of the whole application."""

import asyncio
import time
from typing import Any

import pytest

from graft.app.guard import MAX_BODY, SECONDS, TRIES, Guard

HOST = "127.0.0.1:7860"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def ask(
    guard: Guard, path: str = "/", method: str = "GET", body: bytes = b"", query: str = "", **headers: str
) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer; `sec_fetch_site` becomes sec-fetch-site."""
    sent: list[Any] = []
    given = {"host": HOST, **{key.replace("_", "-"): value for key, value in headers.items()}}
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(),
        "headers": [(key.encode(), value.encode()) for key, value in given.items()],
    }  # fmt: skip
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(parts, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], {key.decode(): value.decode() for key, value in sent[0]["headers"]}


@pytest.mark.parametrize("host", [HOST, "localhost:9000", "[::1]:7860", "192.168.0.7:7860", "studio.lan"])
def test_addresses_and_known_names_are_answered(host: str) -> None:
    assert ask(Guard(hello, ["studio.lan"]), host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil", "a@127.0.0.1", "x/y"]
)
def test_other_names_are_refused(host: str) -> None:
    assert ask(Guard(hello), host=host)[0] == 421


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:9", "http://127.0.0.1.evil:7860"])
def test_other_sites_may_not_act(origin: str) -> None:
    guard = Guard(hello)
    assert ask(guard, "/gradio_api/queue/join", "POST", origin=origin)[0] == 403
    assert ask(guard, "/gradio_api/queue/join", "POST", origin=f"http://{HOST}")[0] == 200


def test_other_sites_may_not_embed_but_may_link() -> None:
    guard = Guard(hello)
    assert ask(guard, "/files/data/x/1.png", sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403
    status, headers = ask(guard, "/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert status == 200
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/docs", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/proxy=http://127.0.0.1:22/", "/monitoring",
        "/gradio_api/run-history/records", "/gradio_api/vibe-edit/", "/gradio_api/deep_link", "/gradio_api/call/look",
        "/gradio_api/run/look", "/gradio_api/file/etc/passwd", "/gradio_api/process_recording", "/gradio_api/mcp/sse",
        "/files/../etc/passwd", "/assets/..%2fx", "/.env", "/login/x", "/teach/../x",
    ],
)  # fmt: skip
def test_nothing_else_is_answered(path: str) -> None:
    assert ask(Guard(hello), path)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_two_methods_only(method: str) -> None:
    assert ask(Guard(hello), method=method)[0] == 405


def test_size_is_limited_whatever_the_header_says() -> None:
    guard = Guard(hello)
    assert ask(guard, method="POST", content_length=str(MAX_BODY + 1))[0] == 413
    assert ask(guard, method="POST", content_length="-1")[0] == 413
    assert ask(guard, method="POST", content_length="x")[0] == 413


def test_with_a_token_nothing_is_answered_without_it() -> None:
    guard = Guard(hello, token="secret")
    assert ask(guard) == (303, {**ask(guard)[1], "location": "/login"})
    for path in ("/config", "/files/data/x/1.png", "/gradio_api/queue/data", "/assets/index.js"):
        assert ask(guard, path)[0] == 401
    assert ask(guard, authorization="Bearer secret")[0] == 200
    assert ask(guard, authorization="Bearer secre")[0] == 401 or ask(guard, authorization="Bearer secre")[0] == 303
    assert ask(guard, cookie="graft=wrong")[0] == 303
    assert ask(guard, cookie="graft=;;;=")[0] == 303
    assert ask(guard, "/login")[0] == 200
    status, headers = ask(guard, "/login", "POST", b"token=secret", origin=f"http://{HOST}")
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly; SameSite=Strict" in headers["set-cookie"]
    assert ask(guard, cookie=headers["set-cookie"].split(";")[0])[0] == 200


def test_guessing_is_slow() -> None:
    guard = Guard(hello, token="secret")
    assert [ask(guard, "/login", query=f"token={k}")[0] for k in range(TRIES)] == [401] * TRIES
    assert ask(guard, "/login", query="token=secret")[0] == 429
    assert ask(guard, authorization="Bearer secret")[0] == 200  # who has it is not locked out


def test_a_thousand_logins() -> None:
    guard = Guard(hello, token="secret")
    began = time.monotonic()
    answers = [
        ask(guard, "/login", "POST", f"token=guess{k}".encode(), origin=f"http://{HOST}")[0] for k in range(1000)
    ]
    assert (answers.count(401), answers.count(429)) == (TRIES, 1000 - TRIES)
    assert len(guard.wrong) == TRIES, "what it remembers does not grow"
    assert ask(guard, authorization="Bearer secret")[0] == 200
    assert time.monotonic() - began < SECONDS
