"""The server's routes: bodies in, responses and event streams out, keys and limits at the door. Knows no engine."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib import resources
from typing import Any, TypeAlias, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.server import anthropic_messages, ollama, openai_chat, openai_responses
from headrace.server.door import Door, Gate, ServedModel, ServerOptions, error_object, error_response
from headrace.server.fields import Body
from headrace.server.generation import Generator, Refused
from headrace.server.metrics import Metrics
from headrace.server.openapi import UNKNOWN, described
from headrace.server.sessions import SavedSessions

__all__ = ["create_app"]

OLLAMA_VERSION = "0.12.0"  # of the API that is spoken, not of a program
PING_SECONDS = 15  # between two signs of life, for proxies that end silent connections

# Characters of a text: as long as a tokenizer may keep all other answers waiting, some tenths of a second.
MAX_TOKENIZED = 1 << 17

T = TypeVar("T")
_log = logging.getLogger(__name__)
EventCall: TypeAlias = openai_responses.ResponseCall | anthropic_messages.MessagesCall


def create_app(models: Mapping[str, ServedModel], options: ServerOptions, metrics: Metrics) -> FastAPI:
    """The ASGI application.

    Args:
        models: by name; the first is the default.
        options: key and limits.
        metrics: what is counted.
    """
    app = FastAPI(title="headrace", version=__version__, docs_url=None, redoc_url=None)
    door = Door(models, options)
    app.add_middleware(Gate, options=options, metrics=metrics)
    app.add_exception_handler(Exception, error_response)
    app.add_exception_handler(HeadraceError, error_response)
    app.add_exception_handler(HTTPException, error_response)
    app.add_exception_handler(RecursionError, error_response)
    for path, read, streamed, told in ANSWERS:
        app.add_api_route(
            path,
            _answering(door, read, streamed),
            methods=["POST"],
            name=told,
            description=told,
            openapi_extra=described(path),
        )
    _model_routes(app, door)
    _session_routes(app, door, SavedSessions(options.sessions))
    _service_routes(app, door, metrics)
    web = resources.files("headrace") / "server" / "web"
    app.mount("/web", StaticFiles(directory=str(web)), name="web")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((web / "index.html").read_text(encoding="utf-8"), media_type="text/html")

    for route in [route for route in app.routes if isinstance(route, APIRoute) and "GET" in (route.methods or ())]:
        app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    return app


def _answering(
    door: Door, read: Callable[[object], Any], streamed: Callable[[Any, Generator], Response]
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await door.answer(request, read, streamed)

    return answer


def _model_routes(app: FastAPI, door: Door) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """OpenAI: the models that are served."""
        return {"object": "list", "data": [_model_object(model) for model in door.models.values()]}

    @app.get("/v1/models/{name:path}", responses=UNKNOWN)
    async def model(name: str) -> dict[str, Any]:
        """OpenAI: one model."""
        return _model_object(door.model(name))

    @app.get("/api/version")
    async def version() -> dict[str, str]:
        """Ollama: the version of the API."""
        return {"version": OLLAMA_VERSION}

    @app.get("/api/tags")
    @app.get("/api/ps")
    async def tags() -> dict[str, Any]:
        """Ollama: the models that are served, all of them in memory."""
        return {"models": [_ollama_model(model) for model in door.models.values()]}

    @app.post("/api/show", openapi_extra=described("/api/show"))
    async def show(request: Request) -> dict[str, Any]:
        """Ollama: one model."""
        body = Body(await door.body(request), ("verbose", "system", "template", "options"))
        model, older = body.take("model", str, default=""), body.take("name", str, default="")
        served = door.model(model or older)
        body.done()
        properties = dict(served.properties())
        return {
            "details": _ollama_model(served)["details"],
            "model_info": {"general.architecture": "headrace", "headrace.context_length": properties["context_length"]},
            "capabilities": ["completion", *(["tools"] if properties.get("tools") else [])],
            "parameters": "",
            "template": properties.get("chat_template") or "",
        }


def _session_routes(app: FastAPI, door: Door, saved: SavedSessions) -> None:
    @app.get("/sessions")
    async def sessions() -> dict[str, Any]:
        """Saved conversations, the newest first."""
        return {"sessions": list(saved)}

    @app.put("/sessions/{name}", openapi_extra=described("/sessions/{name}"))
    async def save(name: str, request: Request) -> dict[str, Any]:
        """Save a conversation, with what the cache holds of it; an older one of this name is replaced."""
        call = openai_chat.chat_call(await door.body(request))
        with saved.file(name, exists=False) as path:
            tokens = await door.model(call.model).save_session(call.request, path)
            return {"name": name, "tokens": tokens, "bytes": path.stat().st_size}

    @app.post("/sessions/{name}/restore", openapi_extra=described("/sessions/{name}/restore"))
    async def restore(name: str, request: Request) -> dict[str, Any]:
        """A saved conversation's messages; its cache is held again, so that a prompt that goes on with it is short."""
        body = Body(await door.body(request))
        model = door.model(body.take("model", str, default=""))
        body.done()
        with saved.file(name) as path:
            messages, tokens = await model.restore_session(path)
        return {"name": name, "messages": messages, "tokens": tokens}

    @app.delete("/sessions/{name}", responses=UNKNOWN)
    async def delete(name: str) -> dict[str, str]:
        """Delete a saved conversation."""
        with saved.file(name) as path:
            path.unlink()
        return {"deleted": name}


def _service_routes(app: FastAPI, door: Door, counted: Metrics) -> None:
    started = time.monotonic()

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether requests are answered."""
        return {"status": "ok"}

    @app.get("/props")
    async def props() -> dict[str, Any]:
        """What is served, and how."""
        return {
            "headrace": __version__,
            "uptime_seconds": round(time.monotonic() - started, 1),
            "models": {name: dict(model.properties()) for name, model in door.models.items()},
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Measurements, in Prometheus' text format."""
        return Response(counted.text(), media_type="text/plain; version=0.0.4")

    @app.post("/tokenize", openapi_extra=described("/tokenize"))
    async def tokenize(request: Request) -> dict[str, Any]:
        """Ids of a text."""
        body = Body(await door.body(request))
        model = door.model(body.take("model", str, default=""))
        content, special = body.take("content", str, required=True), body.flag("add_special")
        body.done()
        if len(content) > MAX_TOKENIZED:
            raise Refused(f"content has {len(content)} characters; expected at most {MAX_TOKENIZED}", field="content")
        return {"tokens": await asyncio.to_thread(model.tokenize, content, special=special)}

    @app.post("/detokenize", openapi_extra=described("/detokenize"))
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of ids."""
        body = Body(await door.body(request))
        model = door.model(body.take("model", str, default=""))
        ids = body.take("tokens", list, required=True)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise Refused("tokens holds something else than ids", field="tokens")
        body.done()
        return {"content": await asyncio.to_thread(model.detokenize, ids)}

    @app.post("/apply-template", openapi_extra=described("/apply-template"))
    async def apply_template(request: Request) -> dict[str, Any]:
        """The prompt that a conversation becomes."""
        call = openai_chat.chat_call(await door.body(request))
        text, ids = await asyncio.to_thread(door.model(call.model).render, call.request)
        return {"prompt": text, "tokens": ids}


def _chunks(call: openai_chat.Call, generator: Generator) -> Response:
    """Server-sent events of data alone."""
    parts = _closing(call.chunks(generator), generator, json.dumps)
    return EventSourceResponse(parts, sep="\n", ping=PING_SECONDS)


def _events(call: EventCall, generator: Generator) -> Response:
    """Server-sent events with names."""

    async def named() -> AsyncIterator[dict[str, str]]:
        async for event, data in call.events(generator):
            yield {"event": event, "data": data}

    parts = _closing(named(), generator, lambda error: {"event": "error", "data": json.dumps(error)})
    return EventSourceResponse(parts, sep="\n", ping=PING_SECONDS)


def _lines(call: ollama.OllamaCall, generator: Generator) -> Response:
    """JSON, a line each."""
    parts = _closing(call.lines(generator), generator, lambda error: json.dumps({"error": error["error"]["message"]}))
    return StreamingResponse(parts, media_type="application/x-ndjson")


async def _closing(
    parts: AsyncIterator[T], generator: Generator, told: Callable[[dict[str, Any]], T]
) -> AsyncIterator[T]:
    """The parts of a stream; an error is told as its last part. When the client leaves, its slots are freed."""
    try:
        async for part in parts:
            yield part
    except Exception as error:
        if not isinstance(error, HeadraceError):
            _log.exception("a stream broke")
        yield told({"type": "error", **error_object(error)})
    finally:
        await generator.aclose()


# Every route that answers: its body as the dialect reads it, its stream, and what it is.
ANSWERS: tuple[tuple[str, Callable[[object], Any], Callable[[Any, Generator], Response], str], ...] = (
    ("/v1/chat/completions", openai_chat.chat_call, _chunks, "OpenAI: answer a conversation"),
    ("/v1/completions", openai_chat.completion_call, _chunks, "OpenAI: continue a text"),
    ("/v1/responses", openai_responses.response_call, _events, "OpenAI: answer, as the responses API does"),
    ("/v1/messages", anthropic_messages.messages_call, _events, "Anthropic: answer a conversation"),
    ("/api/chat", ollama.chat_call, _lines, "Ollama: answer a conversation"),
    ("/api/generate", ollama.generate_call, _lines, "Ollama: answer a prompt"),
)


def _model_object(model: ServedModel) -> dict[str, Any]:
    length = model.properties()["context_length"]
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "headrace",
        "context_length": length,
        "max_model_len": length,
    }


def _ollama_model(model: ServedModel) -> dict[str, Any]:
    properties = model.properties()
    return {
        "name": f"{model.name}:latest",
        "model": f"{model.name}:latest",
        "modified_at": ollama.now(),
        "expires_at": ollama.now(),
        "size": properties["weight_bytes"],
        "size_vram": 0,
        "digest": properties["digest"],
        "details": {
            "format": "headrace",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": properties["parameters"],
            "quantization_level": properties["recipe"],
        },
    }
