"""Tool calls in a model's text: `<tool_call>{"name": …, "arguments": …}</tool_call>`, the form that the Hermes and
Qwen templates teach; and the grammar of an answer that has to be one. Knows no dialect and no model.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import shown
from headrace.server.generation import Refused

__all__ = ["NO_TOOLS", "ToolCall", "ToolText", "ToolUse", "choice_of", "split_calls", "tool_use"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# What stands around a call's name and arguments, as texts of a Lark grammar.
_BEFORE, _ARGUMENTS, _BEHIND = map(json.dumps, (f'{OPEN}\n{{"name": ', ', "arguments": ', f"}}\n{CLOSE}"))
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class ToolUse:
    """Which functions a request offers.

    Attributes:
        tools: those that the model is told of, each as {"type": "function", "function": …}.
        grammar: what the answer must be where it has to be a call, as (kind, source); else None.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    grammar: tuple[str, str] | None = None


NO_TOOLS = ToolUse()


def choice_of(choice: str | Mapping[str, Any], named: object) -> str:
    """OpenAI's tool_choice as `tool_use` takes it.

    Args:
        choice: the field.
        named: what holds the name, where the choice is a function.

    Raises:
        Refused: it is none of the choices.
    """
    if isinstance(choice, Mapping) and isinstance(named, Mapping) and isinstance(named.get("name"), str):
        return f"={named['name']}"
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return choice
    raise Refused(f"tool_choice is {shown(choice)}; expected auto, none, required or a function", field="tool_choice")


def tool_use(tools: Sequence[Mapping[str, Any]], choice: str) -> ToolUse:
    """What a choice makes of the functions offered.

    Args:
        tools: the functions.
        choice: "auto" (the model decides), "none", "required" (some call), or "=NAME" (a call of this function).

    Raises:
        Refused: a call is required, and there is no such function.
    """
    if choice in ("auto", "none"):
        return ToolUse(tuple(tools) if choice == "auto" else ())
    functions = [tool["function"] for tool in tools if choice in ("required", f"={tool['function']['name']}")]
    if not functions:
        raise Refused(f"tool_choice is {choice.removeprefix('=')!r}; expected a function of tools", field="tool_choice")
    # Each schema is a grammar of its own, since references in it are counted from its own beginning.
    calls = [
        f"%json {json.dumps({'const': function['name']})} {_ARGUMENTS} %json {json.dumps(_parameters(function))}"
        for function in functions
    ]
    return ToolUse(tuple(tools), ("lark", f"start: {_BEFORE} call {_BEHIND}\ncall: {' | '.join(calls)}"))


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, to be written as a template would: at most a space between tokens."""
    schema = function.get("parameters") or {"type": "object"}
    if not isinstance(schema, dict):
        raise Refused(f"the parameters of {function['name']!r} are {shown(schema)}; expected a schema", field="tools")
    return {**schema, "x-guidance": {"whitespace_pattern": " ?"}}


@dataclass(frozen=True)
class ToolCall:
    """A function the model wants called.

    Attributes:
        id: made here, to match the result with the call: nine letters and digits, which is what Mistral's templates
            want of an id; clients take any text.
        name: of the function.
        arguments: a JSON object as text.
    """

    id: str
    name: str
    arguments: str


def split_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text outside of calls, and the calls: what `ToolText` makes of a whole answer."""
    return ToolText(True).push(text, last=True)


class ToolText:
    """Text as it streams, with calls taken out once they are whole, and the space around them where no text is behind.
    What stands between the marks and is no call stays in the text.

    Args:
        active: look for calls at all.
    """

    def __init__(self, active: bool) -> None:
        self._active = active
        self._held = ""  # from where a call may begin
        self._space = ""  # at the end of the text before it
        self._said = self._called = False

    def push(self, text: str, *, last: bool) -> tuple[str, list[ToolCall]]:
        """Text that is certainly no part of a call, and the calls that became whole; everything left on the last."""
        if not self._active:
            return text, []
        self._held += text
        said, calls = "", list[ToolCall]()
        while (start := self._held.find(OPEN)) >= 0:
            try:
                call, stop = _call_at(self._held, start)
            except EOFError:
                if not last:
                    break
                call, stop = None, start + len(OPEN)
            said += self._told(self._held[: stop if call is None else start])
            if call is not None:
                self._called = True
                calls.append(call)
            self._held = self._held[stop:]
        keep = len(self._held) if last else start if start >= 0 else len(self._held) - _possible_opening(self._held)
        said += self._told(self._held[:keep])
        self._held = self._held[keep:]
        return (said + self._space if last and not self._called else said), calls

    def _told(self, text: str) -> str:
        """Text without the space at its end, which is told with what follows."""
        text = self._space + text
        told = text.rstrip()
        self._space = text[len(told) :]
        if self._called and not self._said:
            told = told.lstrip()
        self._said |= bool(told)
        return told


def _possible_opening(text: str) -> int:
    """Length of the longest end of the text that may become OPEN."""
    return next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-n:])), 0)


def _call_at(text: str, start: int) -> tuple[ToolCall | None, int]:
    """The call whose opening mark is at `start`, or None, and where the text goes on behind it. Its arguments may have
    the marks in them.

    Raises:
        EOFError: more of the text must come before that is certain.
    """
    none = None, start + len(OPEN)
    close = text.find(CLOSE, start)
    if close < 0:
        raise EOFError
    try:
        raw, stop = _JSON.raw_decode(text, _behind_space(text, start + len(OPEN)))
    except json.JSONDecodeError as error:
        # It may be wrong only for not being whole yet, with the closing mark in one of its strings.
        if error.pos > close or error.msg.startswith("Unterminated string"):
            raise EOFError from None
        return none
    except (ValueError, RecursionError):
        return none
    stop = _behind_space(text, stop)
    if not text.startswith(CLOSE, stop):
        if CLOSE.startswith(text[stop:]):
            raise EOFError
        return none
    call = _call_of(raw)
    return none if call is None else (call, stop + len(CLOSE))


def _behind_space(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def _call_of(raw: Any) -> ToolCall | None:
    if not isinstance(raw, dict):
        return None
    name, arguments = raw.get("name"), raw.get("arguments", raw.get("parameters", {}))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(uuid.uuid4().hex[:9], name, json.dumps(arguments, ensure_ascii=False))
