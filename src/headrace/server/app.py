"""The server's routes: bodies in, responses and event streams out, keys and limits at the door. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from importlib import resources
from typing import Any, TypeAlias, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.server import anthropic_messages, ollama, openai_chat, openai_responses
from headrace.server.door import Door, Gate, ServedModel, ServerOptions, error_response
from headrace.server.fields import Body
from headrace.server.generation import Generator, Refused
from headrace.server.metrics import Metrics

__all__ = ["create_app"]

OLLAMA_VERSION = "0.12.0"  # of the API that is spoken, not of a program
PING_SECONDS = 15  # between two signs of life, for proxies that end silent connections

T = TypeVar("T")
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
    _openai_routes(app, door)
    _anthropic_routes(app, door)
    _ollama_routes(app, door)
    _service_routes(app, door, metrics)
    web = resources.files("headrace") / "server" / "web"
    app.mount("/web", StaticFiles(directory=str(web)), name="web")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((web / "index.html").read_text(encoding="utf-8"), media_type="text/html")

    return app


def _openai_routes(app: FastAPI, door: Door) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_json_body("messages"))
    async def chat_completions(request: Request) -> Response:
        """OpenAI: answer a conversation."""
        return await door.answer(request, openai_chat.chat_call, _chunks)

    @app.post("/v1/completions", openapi_extra=_json_body("prompt"))
    async def completions(request: Request) -> Response:
        """OpenAI: continue a text."""
        return await door.answer(request, openai_chat.completion_call, _chunks)

    @app.post("/v1/responses", openapi_extra=_json_body("input"))
    async def responses(request: Request) -> Response:
        """OpenAI: answer, in the form of the responses API."""
        return await door.answer(request, openai_responses.response_call, _events)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """OpenAI: the models that are served."""
        return {"object": "list", "data": [_model_object(model) for model in door.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """OpenAI: one model."""
        return _model_object(door.model(name))


def _anthropic_routes(app: FastAPI, door: Door) -> None:
    @app.post("/v1/messages", openapi_extra=_json_body("messages"))
    async def messages(request: Request) -> Response:
        """Anthropic: answer a conversation."""
        return await door.answer(request, anthropic_messages.messages_call, _events)


def _ollama_routes(app: FastAPI, door: Door) -> None:
    @app.post("/api/chat", openapi_extra=_json_body("messages"))
    async def chat(request: Request) -> Response:
        """Ollama: answer a conversation."""
        return await door.answer(request, ollama.chat_call, _lines)

    @app.post("/api/generate", openapi_extra=_json_body("prompt"))
    async def generate(request: Request) -> Response:
        """Ollama: answer a prompt."""
        return await door.answer(request, ollama.generate_call, _lines)

    @app.get("/api/version")
    async def version() -> dict[str, str]:
        """Ollama: the version of the API."""
        return {"version": OLLAMA_VERSION}

    @app.get("/api/tags")
    async def tags() -> dict[str, Any]:
        """Ollama: the models that are served."""
        return {"models": [_ollama_model(model) for model in door.models.values()]}

    @app.get("/api/ps")
    async def running() -> dict[str, Any]:
        """Ollama: the models in memory."""
        return {"models": [_ollama_model(model) for model in door.models.values()]}

    @app.post("/api/show", openapi_extra=_json_body("model"))
    async def show(request: Request) -> dict[str, Any]:
        """Ollama: one model."""
        body = Body(await door.body(request), ("verbose", "system", "template", "options"))
        served = door.model(body.take("model", str, default="") or body.take("name", str, default=""))
        body.done()
        properties = dict(served.properties())
        return {
            "details": _ollama_model(served)["details"],
            "model_info": {"general.architecture": "headrace", "headrace.context_length": properties["context_length"]},
            "capabilities": ["completion", *(["tools"] if properties.get("tools") else [])],
            "parameters": "",
            "template": properties.get("chat_template") or "",
        }


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

    @app.get("/metrics")
    async def metrics() -> Response:
        """Measurements, in Prometheus' text format."""
        return Response(counted.text(), media_type="text/plain; version=0.0.4")

    @app.post("/tokenize", openapi_extra=_json_body("content"))
    async def tokenize(request: Request) -> dict[str, Any]:
        """Ids of a text."""
        body = Body(await door.body(request))
        model = door.model(body.take("model", str, default=""))
        ids = model.tokenize(body.take("content", str, required=True), special=body.flag("add_special"))
        body.done()
        return {"tokens": ids}

    @app.post("/detokenize", openapi_extra=_json_body("tokens"))
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of ids."""
        body = Body(await door.body(request))
        model = door.model(body.take("model", str, default=""))
        ids = body.take("tokens", list, required=True)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise Refused("tokens holds something else than ids", field="tokens")
        body.done()
        return {"content": model.detokenize(ids)}

    @app.post("/apply-template", openapi_extra=_json_body("messages"))
    async def apply_template(request: Request) -> dict[str, Any]:
        """The prompt that a conversation becomes."""
        call = openai_chat.chat_call(await door.body(request))
        text, ids = door.model(call.model).render(call.request)
        return {"prompt": text, "tokens": ids}


def _chunks(call: openai_chat.Call, generator: Generator) -> Response:
    """Server-sent events of data alone."""
    return EventSourceResponse(_closing(call.chunks(generator), generator), sep="\n", ping=PING_SECONDS)


def _events(call: EventCall, generator: Generator) -> Response:
    """Server-sent events with names."""

    async def named() -> AsyncIterator[dict[str, str]]:
        async for event, data in call.events(generator):
            yield {"event": event, "data": data}

    return EventSourceResponse(_closing(named(), generator), sep="\n", ping=PING_SECONDS)


def _lines(call: ollama.OllamaCall, generator: Generator) -> Response:
    """JSON, a line each."""
    return StreamingResponse(_closing(call.lines(generator), generator), media_type="application/x-ndjson")


async def _closing(parts: AsyncIterator[T], generator: Generator) -> AsyncIterator[T]:
    """The parts of a stream; when the client leaves, its slots are freed."""
    try:
        async for part in parts:
            yield part
    finally:
        await generator.aclose()


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


def _json_body(*required: str) -> dict[str, Any]:
    """What OpenAPI is told of a body that the dialect itself reads."""
    schema = {"type": "object", "required": list(required), "additionalProperties": True}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
