"""Request bodies as OpenAPI describes them: what clients and fuzzers read. The dialects themselves read bodies with
`fields`; a test holds both to each other. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.server import anthropic_messages, ollama, openai_chat, openai_responses
from headrace.server.fields import MAX_ANSWERS, MAX_SEED, MAX_STOPS, MAX_TOP_LOGPROBS

__all__ = ["BODIES", "UNKNOWN", "described"]

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
ANYTHING: Schema = {}
MOST_TOKENS = 1 << 20


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _list(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    return {"type": "array", "items": items, "minItems": least} | ({} if most is None else {"maxItems": most})


def _object(properties: Mapping[str, Schema], required: Sequence[str], *, open_: bool = False) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": open_,
    }


def _body(properties: Mapping[str, Schema], required: Sequence[str]) -> Schema:
    """A whole body: null is as good as nothing."""
    null: Schema = {"type": "null"}
    optional = {name: _either(schema, null) for name, schema in properties.items() if name not in required}
    return _object({**properties, **optional}, required)


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _ignored(names: Sequence[str]) -> dict[str, Schema]:
    return dict.fromkeys(names, ANYTHING)


SHARE = _number(0, 1)
SEED = _whole(-MAX_SEED - 1, MAX_SEED)
IDS = _list(_whole(0, MOST_TOKENS), 1)
STOP = _either({"type": "string", "minLength": 1}, _list({"type": "string", "minLength": 1}, most=MAX_STOPS))
PARTS = _list(
    _object({"type": _one_of("text", "input_text", "output_text"), "text": TEXT}, ["type", "text"], open_=True)
)
CONTENT = _either(TEXT, PARTS)
IDS = _list(_whole(0, MOST_TOKENS), 1)
FUNCTION = _object({"name": TEXT, "description": TEXT, "parameters": OBJECT}, ["name"], open_=True)
CALL = _object(
    {"id": TEXT, "function": _object({"name": TEXT, "arguments": OBJECT}, ["name", "arguments"])},
    ["function"],
    open_=True,
)


def _message(*roles: str, **more: Schema) -> Schema:
    return _object({"role": _one_of(*roles), "content": CONTENT, **more}, ["role", "content"], open_=True)


_TOOLS = {
    "tools": _list(_object({"type": _one_of("function"), "function": FUNCTION}, ["function"], open_=True)),
    "tool_choice": _one_of("auto", "none"),
}
_MESSAGES = {
    "messages": _list(
        _message("system", "developer", "user", "assistant", "tool", tool_calls=_list(CALL), tool_call_id=TEXT), 1
    )
}
_OPENAI = {
    "model": TEXT,
    "stream": FLAG,
    "stream_options": _object({"include_usage": FLAG}, [], open_=True),
    "max_tokens": _whole(1, MOST_TOKENS),
    "max_completion_tokens": _whole(1, MOST_TOKENS),
    "temperature": _number(0, 2),
    "top_p": SHARE,
    "top_k": _whole(0, MOST_TOKENS),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 10),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": SEED,
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": _number(-openai_chat.MAX_LOGIT_BIAS, openai_chat.MAX_LOGIT_BIAS),
    },
    "stop": STOP,
    "n": _whole(1, MAX_ANSWERS),
    "response_format": _either(
        _object({"type": _one_of("text", "json_object")}, ["type"], open_=True),
        _object(
            {"type": _one_of("json_schema"), "json_schema": _object({"schema": OBJECT}, ["schema"], open_=True)},
            ["type", "json_schema"],
            open_=True,
        ),
    ),
    **_ignored(openai_chat.IGNORED),
}
_OLLAMA = {
    "model": TEXT,
    "stream": FLAG,
    "format": _either(_one_of("", "json"), OBJECT),
    "options": _object(
        {
            **dict.fromkeys(ollama.OPTIONS, _number(-2, 100)),
            "top_k": _whole(0, MOST_TOKENS),
            "seed": SEED,
            "num_predict": _whole(-2, MOST_TOKENS),
            "stop": STOP,
        },
        [],
        open_=True,
    ),
    **_ignored(ollama.IGNORED),
}

_CHAT = _body(
    _OPENAI | _MESSAGES | _TOOLS | {"logprobs": FLAG, "top_logprobs": _whole(0, MAX_TOP_LOGPROBS)}, ["messages"]
)

BODIES: Mapping[str, Schema] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _body(
        _OPENAI
        | {
            "prompt": _either(TEXT, IDS, _list(_either(TEXT, IDS), 1, 1)),
            "max_tokens": _whole(0, MOST_TOKENS),
            "suffix": _one_of(""),
            "best_of": _whole(1, 1),
            "echo": FLAG,
            "logprobs": _whole(0, MAX_TOP_LOGPROBS),
        },
        ["prompt"],
    ),
    "/v1/responses": _body(
        {
            "model": TEXT,
            "input": _either(
                TEXT,
                _list(
                    _either(
                        _message("system", "developer", "user", "assistant"),
                        _object(
                            {"type": _one_of("function_call"), "name": TEXT, "arguments": TEXT, "call_id": TEXT},
                            ["type", "name", "arguments"],
                            open_=True,
                        ),
                        _object(
                            {"type": _one_of("function_call_output"), "output": CONTENT, "call_id": TEXT},
                            ["type", "output"],
                            open_=True,
                        ),
                    ),
                    1,
                ),
            ),
            "instructions": TEXT,
            "stream": FLAG,
            "max_output_tokens": _whole(1, MOST_TOKENS),
            "temperature": _number(0, 2),
            "top_p": SHARE,
            "text": _object({"format": OBJECT}, [], open_=True),
            "tools": _list(
                _object({"type": _one_of("function"), **FUNCTION["properties"]}, ["type", "name"], open_=True)
            ),
            "tool_choice": _one_of("auto", "none"),
            "background": {"type": "boolean", "enum": [False]},
            **_ignored(openai_responses.IGNORED),
        },
        ["input"],
    ),
    "/v1/messages": _body(
        {
            "model": TEXT,
            "messages": _list(_message("user", "assistant"), 1),
            "system": CONTENT,
            "stream": FLAG,
            "max_tokens": _whole(1, MOST_TOKENS),
            "temperature": _number(0, 1),
            "top_p": SHARE,
            "top_k": _whole(0, MOST_TOKENS),
            "stop_sequences": STOP,
            "tools": _list(
                _object(
                    {"name": TEXT, "description": TEXT, "input_schema": OBJECT}, ["name", "input_schema"], open_=True
                )
            ),
            "tool_choice": _object({"type": _one_of("auto", "none")}, ["type"], open_=True),
            "thinking": _object({"type": _one_of("disabled")}, ["type"], open_=True),
            **_ignored(anthropic_messages.IGNORED),
        },
        ["messages", "max_tokens"],
    ),
    "/api/chat": _body(
        _OLLAMA | {"messages": _list(_message("system", "user", "assistant", "tool", tool_calls=_list(CALL)))} | _TOOLS,
        [],
    ),
    "/api/generate": _body(
        _OLLAMA
        | {"prompt": TEXT, "system": TEXT, "suffix": _one_of(""), "images": _list(ANYTHING, most=0), "raw": FLAG},
        [],
    ),
    "/api/show": _body({"model": TEXT, "name": TEXT, **_ignored(("verbose", "system", "template", "options"))}, []),
    "/tokenize": _body({"model": TEXT, "content": TEXT, "add_special": FLAG}, ["content"]),
    "/apply-template": _CHAT,
    "/sessions/{name}": _CHAT,
    "/sessions/{name}/restore": _body({"model": TEXT}, []),
    "/detokenize": _body({"model": TEXT, "tokens": _list(_whole(0, MOST_TOKENS))}, ["tokens"]),
}


UNKNOWN: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": OBJECT}}}
    for status, description in ((400, "It can be no name"), (404, "There is none of that name"))
}
STREAMS = {"/api/": "application/x-ndjson", "/v1/": "text/event-stream"}


def described(path: str) -> dict[str, Any]:
    """What FastAPI is told of a route whose body a dialect reads itself: the request, and what comes back."""
    kinds = ["application/json"]
    if "stream" in BODIES[path]["properties"]:
        kinds += [kind for beginning, kind in STREAMS.items() if path.startswith(beginning)]
    answer = {"description": "The answer", "content": {kind: {"schema": ANYTHING} for kind in kinds}}
    error = {"description": "Refused, in one line", "content": {"application/json": {"schema": OBJECT}}}
    body = {"required": True, "content": {"application/json": {"schema": BODIES[path]}}}
    refused = {str(status): error for status in (400, 401, 403, 404, 405, 413, 429, 503)}
    return {"requestBody": body, "responses": {"200": answer, **refused}}
