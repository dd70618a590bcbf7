"""The server's door: keys, limits, which model is meant, and what an error looks like in each dialect."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.errors import ContextFull, HeadraceError, UserError, shown
from headrace.server.generation import Answer, GenerationRequest, Generator, Refused, Usage, collect
from headrace.server.metrics import Metrics

__all__ = ["Door", "Gate", "ServedModel", "ServerOptions", "error_object", "error_response"]

BODIES = 8  # bodies of the largest size that may be in memory at once, before they are read
RETRY_SECONDS = 2  # what a client is told to wait when there is no room for its body
MAX_MESSAGE = 1000  # characters of an error; what it quotes is the client's
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # half a surrogate pair as JSON writes it: no text, if alone
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_ROUTES = ("/health", "/")  # answered without a key, like the page's files: they tell nothing about the model
CLIENT_GONE = 499
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class ServerOptions:
    """How the door is kept.

    Attributes:
        api_key: what clients must send, or None for no key.
        max_body: bytes of a request's body.
        sessions: folder where clients save conversations, or None: they cannot.
    """

    api_key: str | None = None
    max_body: int = 8 << 20
    sessions: Path | None = None


class ServedModel(Protocol):
    """A model as the routes see it.

    Attributes:
        name: what clients call it.
        created: when it was loaded, seconds since 1970.
    """

    name: str
    created: int

    async def submit(self, request: GenerationRequest) -> Generator:
        """Queue a request.

        Raises:
            Refused: the queue is full, or a field cannot be served.
            UserError: the prompt cannot be rendered or does not fit.
        """

    def properties(self) -> Mapping[str, Any]:
        """What the model is: context length, sizes, precision, slots, turn format."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text."""

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids."""

    def render(self, request: GenerationRequest) -> tuple[str, list[int]]:
        """The prompt of a conversation, as text and ids."""

    async def save_session(self, request: GenerationRequest, path: Path) -> int:
        """Write a conversation to a file, with what is held of its cache: of how many tokens.

        Raises:
            UserError: the prompt cannot be rendered, or the file cannot be written.
        """

    async def restore_session(self, path: Path) -> tuple[list[dict[str, Any]], int]:
        """The messages of a saved conversation, and how many tokens of it are held from now on.

        Raises:
            UserError: the file is damaged, or of another model or runner.
        """


class Call(Protocol):
    """A body that a dialect has read; a dataclass.

    Attributes:
        model: the model asked for, or nothing.
        request: what to generate; None: nothing, and `whole` is the response.
        stream: answer piece by piece.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def model(self) -> str: ...

    @property
    def request(self) -> GenerationRequest | None: ...

    @property
    def stream(self) -> bool: ...

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The response to a request that is answered at once."""
        ...


C = TypeVar("C", bound=Call)


class Gate:
    """ASGI middleware: key and origin are checked, requests are counted, the page gets its content security policy."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics) -> None:
        self._app = app
        self._options = options
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(message["status"])).inc()
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                if _is_page(path):
                    headers["Content-Security-Policy"] = CSP
                    headers["Referrer-Policy"] = "no-referrer"
                    headers["Cache-Control"] = "no-cache"
            await send(message)

        refused = self._refused(path, scope)
        await (self._app if refused is None else _told(path, refused))(scope, receive, counted)

    def _refused(self, path: str, scope: Scope) -> Refused | None:
        """Why a request may not pass, or None."""
        headers = Headers(scope=scope)
        if self._options.api_key is not None:
            if path in OPEN_ROUTES or _is_page(path) or self._has_key(headers):
                return None
            return Refused("the API key is missing or wrong; expected Authorization: Bearer KEY", status=401)
        # Without a key a browser is the danger: pages from elsewhere may send requests here, and may let a name of
        # their own lead to this computer, so that the browser takes the server for theirs.
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Refused(f"pages of {shown(origin)} cannot use this server", status=403)
        if (scope.get("server") or ("",))[0] in LOOPBACK and _name(host) not in LOOPBACK:
            return Refused(f"the host is {shown(host)}; expected localhost, or a server with a key", status=403)
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, told = headers.get("authorization", "").partition(" ")
        given = told.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode("latin-1"), (self._options.api_key or "").encode())  # as it came


class Door:
    """What routes share: reading bodies, finding models, waiting for whole answers.

    Args:
        models: by name; the first is the default.
        options: limits.
    """

    def __init__(self, models: Mapping[str, ServedModel], options: ServerOptions) -> None:
        self.models = models
        self._options = options
        self._arriving = 0  # bytes of bodies that are not whole yet

    async def body(self, request: Request) -> Any:
        """The JSON of a request, at most `max_body` bytes of it.

        Raises:
            Refused: it is larger, there is no room for it now, it is no JSON, or the client has gone.
        """
        most, data = self._options.max_body, bytearray()
        try:
            async for chunk in request.stream():
                data += chunk
                self._arriving += len(chunk)
                if len(data) > most:
                    raise Refused(f"the body is larger than {most} bytes", status=413)
                if self._arriving > BODIES * most:
                    raise Refused("too many large bodies are arriving", status=503, retry_after=RETRY_SECONDS)
        except ClientDisconnect:
            raise Refused("the client has gone", status=CLIENT_GONE) from None
        finally:
            self._arriving -= len(data)
        try:
            found = json.loads(data.decode("utf-8"))
            if HALF_PAIR.search(data):
                json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body is not JSON: {error}") from None
        return found

    def model(self, name: str) -> ServedModel:
        """The model a request asks for; the first one when it names none.

        Raises:
            Refused: it is not served here.
        """
        name = name.removesuffix(":latest")
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            wrong = f"model {shown(name)} is not served here; expected {known}"
            raise Refused(wrong, status=404, field="model", code="model_not_found")
        return self.models[name]

    async def answer(
        self, request: Request, read: Callable[[object], C], streamed: Callable[[C, Generator], Response]
    ) -> Response:
        """Answer a request in its dialect.

        Args:
            request: the request.
            read: its body as the dialect reads it.
            streamed: the response of an answer that is given piece by piece.

        Raises:
            UserError: the body is wrong, or the model cannot answer it.
        """
        call = read(await self.body(request))
        served = self.model(call.model)
        call = call if call.model else replace(call, model=served.name)
        asked = call.request
        if asked is None:
            return JSONResponse(call.whole((), Usage(0)))
        generator = await served.submit(asked)
        if call.stream:
            return streamed(call, generator)
        answers = await self._whole(request, generator, asked.n)
        return JSONResponse(call.whole(answers, generator.usage))

    async def _whole(self, request: Request, generator: Generator, n: int) -> list[Answer]:
        """The answers. When the client goes before they are whole, its slots are free within one token.

        Raises:
            Refused: the client has gone.
        """
        answers = asyncio.create_task(collect(generator, n))
        gone = asyncio.create_task(_disconnected(request))
        try:
            done, _ = await asyncio.wait({answers, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answers not in done:
                raise Refused("the client has gone", status=CLIENT_GONE)
            return answers.result()
        finally:
            gone.cancel()
            answers.cancel()
            await generator.aclose()


async def error_response(request: Request, error: Exception) -> Response:
    """An exception handler: every error in one line, in the form that the path's dialect has for it."""
    return _told(request.url.path, error)


def error_object(error: Exception) -> dict[str, Any]:
    """{"error": …} as OpenAI has it."""
    status, message = _status(error)
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "api_error")
    field = code = None
    if isinstance(error, Refused):
        field, code = None if error.field is None else _short(error.field), error.code
    elif isinstance(error, ContextFull):
        code = "context_length_exceeded"
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def _status(error: Exception) -> tuple[int, str]:
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, RecursionError):
        return 400, "the body is nested too deeply"
    # What went wrong inside is for the log, not for a stranger.
    message = str(error) if isinstance(error, HeadraceError) else "something went wrong inside the server"
    status = error.status if isinstance(error, Refused) else 400 if isinstance(error, UserError) else 500
    return status, _short(message)


def _told(path: str, error: Exception) -> Response:
    body, (status, message) = error_object(error), _status(error)
    if path.startswith("/api/"):
        body = {"error": message}
    elif path.startswith("/v1/messages"):
        body = {"type": "error", "error": {"type": body["error"]["type"], "message": message}}
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, Refused) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(body, status_code=status, headers=headers)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _short(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"


def _name(host: str) -> str:
    """A Host header without its port and brackets."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith("/web/")
