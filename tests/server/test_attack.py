"""What strangers send: every fault that benchmarks/server_attack.py and reading found, so that it stays mended."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from headrace.errors import ContextFull
from headrace.server import anthropic_messages, app, ollama, openai_chat, openai_responses
from headrace.server.connections import Patience
from headrace.server.door import BODIES, MAX_MESSAGE, ServerOptions
from headrace.server.fields import Body
from headrace.server.generation import GenerationRequest, Refused
from headrace.server.length import CHARACTERS, refuse_too_long
from headrace.server.logs import Discreet
from headrace.server.openapi import BODIES as DESCRIBED
from tests.server.scripted import ScriptedGeneration, ScriptedModel, running

KEY, PROMPT = "sesame-4711", "a secret prompt"
SHORT = 0.4  # seconds of patience in these tests
LATER = 10.0  # by which a connection has long been dropped, on a slow machine too
DEEP = 100_000
CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    patience = Patience(head=SHORT, body=SHORT, reading=SHORT)
    with running(ScriptedModel(), patience=patience, options=ServerOptions(max_body=1 << 20)) as made:
        yield made


def _assistant(calls: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}], "max_tokens": 1, "stream": False}


NO_CALLS = [5, True, "x", [5], [{}], [{"function": 3}], [{"function": {"name": [], "arguments": {}}}]]
WRONG: list[tuple[str, Any]] = [
    *[(path, _assistant(calls)) for path in ("/v1/chat/completions", "/api/chat") for calls in NO_CALLS],
    ("/v1/chat/completions", _assistant([{"function": {"name": "f", "arguments": "5"}}])),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": ["text"]}}),
    ("/v1/responses", {"input": "x", "text": {"format": ["text"]}}),
    ("/v1/responses", {"input": [{"type": "function_call", "name": "f", "arguments": "[" * DEEP}]}),
    ("/v1/responses", {"input": [{"type": "function_call", "name": 4, "arguments": "{}"}]}),
    ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
    ("/tokenize", {"content": "\udfff"}),
    ("/tokenize", {"content": "a" * (app.MAX_TOKENIZED + 1)}),
    ("/v1/completions", {"prompt": "x", "model": "\ud83d"}),
]


@pytest.mark.parametrize(("path", "body"), WRONG, ids=lambda value: str(value)[:60])
def test_what_no_dialect_means_is_refused_in_one_line(address: str, path: str, body: Any) -> None:
    told = httpx.post(address + path, content=json.dumps(body).encode())
    assert told.status_code == 400, told.text
    assert "\n" not in told.json()["error"] if path.startswith("/api/") else told.json()["error"]


@pytest.mark.parametrize("depth", [50, 500, *range(900, 1000, 7), DEEP])
@pytest.mark.parametrize(
    "path", ["/api/chat", "/v1/chat/completions"], ids=["a schema of Ollama's", "a schema of OpenAI's"]
)
def test_nesting_is_refused_wherever_it_becomes_too_deep(address: str, path: str, depth: int) -> None:
    """JSON is read, and written again for the grammar, at different depths of the stack."""
    schema = '{"a":' * depth + "1" + "}" * depth
    form = {
        "/api/chat": f'"stream": false, "format": {schema}',
        "/v1/chat/completions": f'"response_format": {{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}',
    }[path]
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], {form}}}'
    allowed = {200} if depth <= 500 else {400} if depth == DEEP else {200, 400}
    assert httpx.post(address + path, content=body.encode()).status_code in allowed


def test_an_error_quotes_little(address: str) -> None:
    told = httpx.post(f"{address}/v1/completions", json={"k" * 500_000: 1, "prompt": "x"})
    assert told.status_code == 400 and len(told.content) < 3 * MAX_MESSAGE


def test_a_long_text_is_refused_by_its_beginning() -> None:
    encoded = 0

    def encode(text: str) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return [0] * (len(text) // 4)

    refuse_too_long("x" * 2_000, encode, 500)
    refuse_too_long("x" * (4 * 500), encode, 500)
    with pytest.raises(ContextFull, match=r"has more than 1000 tokens, but the context holds 500"):
        refuse_too_long("x" * 100_000_000, encode, 500)
    with pytest.raises(ContextFull, match=r"has more than 1000 tokens, but the context holds 250 .* to 249 tokens"):
        refuse_too_long("x" * 100_000_000, encode, 250, times=2)
    assert encoded <= 2 * CHARACTERS * 500


def _open(address: str, sent: bytes, buffer: int | None = None) -> socket.socket:
    made = socket.socket()
    if buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.settimeout(LATER)
    host, _, port = address.removeprefix("http://").partition(":")
    made.connect((host, int(port)))
    made.sendall(sent)
    return made


def _dropped(connection: socket.socket) -> bool:
    """Whether the server ends a connection in time, whatever it says before."""
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
WHOLE = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


BODY = b"Content-Length: 9\r\n\r\n{"
HALVES = {
    "nothing": b"",
    "a byte": b"P",
    "half a head": HEAD,
    "half a body": HEAD + BODY,
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    "half a second head": WHOLE + HEAD,
    "half a second body": WHOLE + HEAD + BODY,
    "a promise": HEAD + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n",
}


@pytest.mark.parametrize("sent", HALVES.values(), ids=HALVES)
def test_who_sends_too_slowly_is_let_go(address: str, sent: bytes) -> None:
    with _open(address, sent) as connection:
        assert _dropped(connection)


def test_a_byte_now_and_then_does_not_help(address: str) -> None:
    with _open(address, HEAD) as connection:
        until = time.monotonic() + LATER
        with pytest.raises(OSError):
            while time.monotonic() < until:
                connection.sendall(b"x")
                time.sleep(SHORT / 10)


def test_who_does_not_read_is_let_go() -> None:
    model = ScriptedModel(words=["x" * 100_000] * 300)
    with running(model, patience=Patience(reading=SHORT)) as made:
        body = json.dumps(CHAT | {"stream": True}).encode()
        with _open(made, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body, buffer=1024):
            until = time.monotonic() + LATER
            while not model.closed and time.monotonic() < until:
                time.sleep(0.02)
        assert model.closed == 1 and model.said < 300


def test_a_connection_is_used_again() -> None:
    """For longer than a request's head may take, since each request has a clock of its own."""
    head, requests = 4.0, 6
    with running(ScriptedModel(), patience=Patience(head=head)) as made, httpx.Client(base_url=made) as client:
        for _ in range(requests):
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
            time.sleep(1.2 * head / requests)


def test_bodies_that_do_not_end_take_bounded_memory() -> None:
    most = 1 << 16
    with running(ScriptedModel(), options=ServerOptions(max_body=most)) as made:
        head = HEAD + b"Content-Length: %d\r\n\r\n" % most
        halves = [_open(made, head + b" " * (most - 1)) for _ in range(BODIES)]
        time.sleep(0.2)
        told = httpx.post(f"{made}/v1/chat/completions", content=b" " * 1000 + json.dumps(CHAT).encode())
        assert told.status_code == 503 and told.headers["Retry-After"]
        for half in halves:
            half.close()
        time.sleep(0.2)
        assert httpx.post(f"{made}/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "river.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "https://river.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:8080", "Origin": "http://localhost:8080"}, 200),
        ({"Host": "localhost:8080", "Origin": "http://localhost:9090"}, 403),
    ],
)
def test_pages_from_elsewhere_cannot_use_a_server_without_key(
    address: str, headers: dict[str, str], status: int
) -> None:
    assert httpx.post(f"{address}/v1/chat/completions", json=CHAT, headers=headers).status_code == status


def test_a_key_is_enough_from_wherever_one_comes() -> None:
    with running(ScriptedModel(), options=ServerOptions(api_key=KEY)) as made:
        headers = {"Host": "river.example", "Origin": "https://river.example", "Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{made}/props", headers=headers).status_code == 200


class BrokenModel(ScriptedModel):
    """Fails with the prompt in its hands."""

    async def submit(self, request: GenerationRequest) -> ScriptedGeneration:
        try:
            raise ValueError(request.prompt)
        except ValueError as error:
            raise KeyError(str(error)) from error


def test_logs_hold_neither_keys_nor_prompts() -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(Discreet())
    loggers = [logging.getLogger(name) for name in ("uvicorn", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with running(BrokenModel(), options=ServerOptions(api_key=KEY)) as made:
            body = {"messages": [{"role": "user", "content": PROMPT}]}
            told = httpx.post(f"{made}/v1/chat/completions", json=body, headers={"x-api-key": KEY})
            httpx.get(f"{made}/props", params={"api_key": KEY})
            assert told.status_code == 500 and PROMPT not in told.text
        try:
            raise ValueError(PROMPT)
        except ValueError as error:
            logging.getLogger("asyncio").error("a task failed\nfuture: %r", error, exc_info=True)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    said = log.getvalue()
    assert "builtins.ValueError, raised at:" in said and "builtins.KeyError" in said and "in submit" in said
    assert PROMPT not in said and KEY not in said


READERS = {
    "/v1/chat/completions": openai_chat.chat_call,
    "/v1/completions": openai_chat.completion_call,
    "/v1/responses": openai_responses.response_call,
    "/v1/messages": anthropic_messages.messages_call,
    "/api/chat": ollama.chat_call,
    "/api/generate": ollama.generate_call,
}
NEEDED = {"messages": CHAT["messages"], "prompt": "x", "input": "x", "max_tokens": 1}


@pytest.mark.parametrize("path", READERS)
def test_bodies_are_described_as_they_are_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[set[str]] = []
    monkeypatch.setattr(Body, "done", lambda body: known.append(body._known))
    READERS[path]({name: NEEDED[name] for name in DESCRIBED[path]["required"]})
    assert known == [set(DESCRIBED[path]["properties"])]


@pytest.mark.parametrize("path", READERS)
def test_null_is_as_good_as_nothing(path: str) -> None:
    """As the description says of every field that need not be there."""
    body, properties = DESCRIBED[path], DESCRIBED[path]["properties"]
    optional = [name for name in properties if name not in body["required"]]
    assert all({"type": "null"} in properties[name]["anyOf"] for name in optional)
    needed = {name: NEEDED[name] for name in body["required"]}
    READERS[path](needed | dict.fromkeys(optional))


def test_a_whole_number_may_be_written_with_a_point() -> None:
    """JSON has but one kind of numbers, and its schema's integers are those without a rest."""
    assert Body({"seed": 8.0}).whole("seed", 0, 9) == 8
    for value in (8.5, 10.0, -1.0, float("inf"), float("nan"), True, "8"):
        with pytest.raises(Refused, match=r"seed is .*expected a whole number, 0 … 9"):
            Body({"seed": value}).whole("seed", 0, 9)
