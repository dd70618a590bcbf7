"""Turn formats: a conversation as the token ids its model was trained on.

    IdTurns        user_token_id and assistant_token_id in generation_config.json (Baichuan2: 195 and 196)
    TemplateTurns  a jinja chat template
    RawTurns       neither: the text goes on as it is

All keep the newest rounds when the context fills: whole rounds go, the oldest first; a system message and the last
round stay. Knows nothing about how a model runs or how text is printed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from headrace.errors import ContextFull, UserError, shown
from headrace.text.template import ChatTemplate
from headrace.text.tokenizer import Tokenizer

__all__ = ["IdTurns", "Message", "RawTurns", "TemplateTurns", "TurnFormat", "message_text", "turn_format"]

ROLES = ("system", "user", "assistant", "tool")
# Unicode's own non-characters, which no text holds: they mark what a user typed while a template runs.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
PROBE = "\ufdd2"


@dataclass(frozen=True)
class Message:
    """One turn's text.

    Attributes:
        role: "system", "user", "assistant", or "tool" for what a called function gave back.
        content: the text.
        ids: the very tokens an answer was generated as, without an end token; then the conversation so far stays a
            prefix of the next prompt, token for token, and the cache of it can be kept. None: the text is encoded, as
            a template always does.
        calls: functions that an assistant's message calls, as OpenAI's {"type": "function", "id", "function": {"name",
            "arguments"}} with arguments as an object.
        tool_call_id: the id of the call that a tool's message answers, or None.

    Raises:
        UserError: the role is unknown.
    """

    role: str
    content: str
    ids: tuple[int, ...] | None = None
    calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"a message's role is {self.role!r}; expected one of {', '.join(ROLES)}")


def message_text(content: object) -> str:
    """The text of a message's content as OpenAI's clients send it: a string, a list of text parts, or None for none.

    Raises:
        UserError: it is something else, or a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UserError(f"is {shown(content)}; expected text or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise UserError(f"has a part of type {kind!r}; expected text")
        texts.append(part["text"])
    return "".join(texts)


class TurnFormat(ABC):
    """How messages become a prompt.

    Attributes:
        name: "ids", "template" or "raw".
        is_raw: there is no turn format.
        stop_ids: the tokens that end an answer.
        takes_tools: functions and calls have a place in a prompt.
    """

    name: str
    is_raw: bool = False
    stop_ids: frozenset[int]
    takes_tools: bool = False

    def render(self, messages: Sequence[Message], room: int, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The prompt: the newest rounds that fit into `room` tokens.

        A conversation that ends with an assistant's message is left open, so that the model continues that message;
        see `goes_on`.

        Args:
            messages: the conversation, in order. System messages come first and become one, with a blank line between
                them; later ones only where the format has a place for them.
            room: the most tokens a prompt may have: the context less the tokens wanted for the answer.
            tools: functions that the model may call, as OpenAI's {"type": "function", "function": …}.

        Raises:
            ContextFull: the system message and the last round alone do not fit.
            UserError: there is no message, the template refused, or the format has no place for a later system message
                or for tools.
        """
        if not messages:
            raise UserError("the conversation is empty; expected at least one message")
        messages = _one_beginning(messages)
        if any(m.role == "system" for m in messages[1:]) and not self._takes_later_system():
            raise UserError(
                "a system message stands after others, where this model's turn format has no place for it; expected "
                "system messages first"
            )
        if not self.takes_tools and (tools or any(map(_is_of_tools, messages))):
            raise UserError("this model's turn format has no place for tools; leave them out")
        system, rounds = _rounds(messages)
        return self._newest(system, rounds, room, tools)

    def _newest(
        self,
        system: Message | None,
        rounds: list[list[Message]],
        room: int,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        head = [system] if system else []
        # Halving would need fewer renderings, but conversations have few rounds and most fit at once.
        for first in range(max(len(rounds), 1)):
            ids = self._encode([*head, *(m for r in rounds[first:] for m in r)], tools)
            if len(ids) <= room:
                return ids
        raise ContextFull(len(ids), room + 1)

    def goes_on(self, messages: Sequence[Message]) -> bool:
        """Whether the answer goes on from the prompt's text, so that its leading space is part of it: an assistant's
        last message is left open, unless it calls functions; without turns all text is."""
        return self.is_raw or (messages[-1].role == "assistant" and not messages[-1].calls)

    def _takes_later_system(self) -> bool:
        """A system message has a place behind others."""
        return False

    @abstractmethod
    def _encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The prompt of all these messages."""


class IdTurns(TurnFormat):
    """A turn is one id and the text behind it; nothing stands between turns.

    Source: Baichuan2's published `build_chat_input` (generation_utils.py): the system text comes first without an id,
    rounds are taken from the newest back, and the assistant's id ends the prompt. It cuts a prompt that is still too
    long from the left, in the middle of a message; here that is ContextFull.
    """

    name = "ids"

    def __init__(self, tokenizer: Tokenizer, user: int, assistant: int) -> None:
        for token in (user, assistant):
            if not 0 <= token < tokenizer.vocab_size:
                raise UserError(
                    f"generation_config.json has turn id {token}; expected 0 … {tokenizer.vocab_size - 1}, "
                    "the vocabulary's ids"
                )
        self._tokenizer = tokenizer
        self.user, self.assistant = user, assistant
        self.stop_ids = frozenset(tokenizer.eos_ids) | {user}  # a model that speaks for the user has ended its turn

    def _newest(
        self, system: Message | None, rounds: list[list[Message]], room: int, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        head = [] if system is None else self._text(system)
        tail = [] if rounds and self.goes_on(rounds[-1]) else [self.assistant]
        history: list[int] = []
        if not rounds and len(head) + len(tail) > room:
            raise ContextFull(len(head) + len(tail), room + 1)
        for turn in reversed(rounds):
            ids = [i for m in turn for i in (self._mark(m), *self._text(m))]
            needed = len(head) + len(ids) + len(history) + len(tail)
            if needed > room:
                if not history:
                    raise ContextFull(needed, room + 1)
                break
            history = ids + history
        return head + history + tail

    def _encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        system, rounds = _rounds(messages)
        return self._newest(system, rounds, 1 << 62)

    def _mark(self, message: Message) -> int:
        return self.user if message.role == "user" else self.assistant

    def _text(self, message: Message) -> list[int]:
        return list(message.ids) if message.ids is not None else self._tokenizer.encode(message.content)


class TemplateTurns(TurnFormat):
    """Turns as a jinja chat template writes them.

    Special tokens that the template writes become their ids; the same spelled out by a user stay text, so that nobody
    can forge a turn. An answer ends with an eos token, or with the special token that the template itself puts behind
    an assistant's words.

    Args:
        tokenizer: the model's vocabulary.
        template: jinja source.
        tool_template: takes its place in conversations with tools; None: it is for those too.

    Raises:
        UserError: a template does not compile.
    """

    name = "template"

    def __init__(self, tokenizer: Tokenizer, template: str, tool_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template)
        self._tool_template = self._template if tool_template is None else ChatTemplate(tool_template)
        self.takes_tools = "tools" in (tool_template or template)
        spell = tokenizer.id_to_piece
        spellings = sorted(filter(None, map(spell, tokenizer.special_ids)), key=len, reverse=True)
        self._forged = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self.stop_ids = frozenset(tokenizer.eos_ids) | self._end_of_answer()

    def _end_of_answer(self) -> frozenset[int]:
        """The special token right behind an assistant's words, if the template writes one; else eos alone ends them."""
        text = self._tried([{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}])
        rest = text.partition(PROBE)[2].lstrip()
        found = self._forged.match(rest) if self._forged else None
        token = self._tokenizer.token_id(found[0]) if found else None
        return frozenset() if token is None else frozenset([token])

    def _takes_later_system(self) -> bool:
        talk = [{"role": role, "content": "?"} for role in ("user", "assistant", "system", "user")]
        talk[2]["content"] = PROBE
        return PROBE in self._tried(talk)

    def _tried(self, talk: Sequence[Mapping[str, str]]) -> str:
        """What the template makes of a conversation; nothing where it wants another."""
        try:
            return self._template.render(talk, ask=False, marks=self._tokenizer.marks)
        except UserError:
            return ""

    def _encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        talk: list[dict[str, Any]] = [{"role": m.role, "content": self._guard(m.content)} for m in messages]
        for said, message in zip(talk, messages, strict=True):
            if message.calls:
                said["tool_calls"] = self._guarded(message.calls)
            if message.tool_call_id is not None:
                said["tool_call_id"] = self._guard(message.tool_call_id)
        marks = {**self._tokenizer.marks, **({"tools": self._guarded(tools)} if tools else {})}
        goes_on = self.goes_on(messages)
        if goes_on:
            talk[-1]["content"] += PROBE + " "
        template = self._tool_template if tools or any(map(_is_of_tools, messages)) else self._template
        text = template.render(talk, ask=not goes_on, marks=marks)
        if goes_on:
            text, _, behind = text.rpartition(PROBE)
            if not behind.startswith(" "):  # the template trims, so it would have trimmed the message itself too
                text = text.rstrip()
        ids: list[int] = []
        for i, stretch in enumerate(re.split(f"{OPEN}(.*?){CLOSE}", text, flags=re.DOTALL)):
            if stretch:
                ids += self._tokenizer.encode(stretch, special=not i % 2, continues=i > 0)
        return ids

    def _guarded(self, value: Any) -> Any:
        """The same JSON value, with every text in it guarded."""
        if isinstance(value, str):
            return self._guard(value)
        if isinstance(value, Mapping):
            return {self._guard(str(key)): self._guarded(item) for key, item in value.items()}
        return [self._guarded(item) for item in value] if isinstance(value, list | tuple) else value

    def _guard(self, content: str) -> str:
        clean = re.sub(f"[{OPEN}{CLOSE}{PROBE}]", "\ufffd", content)
        return self._forged.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", clean) if self._forged else clean


class RawTurns(TurnFormat):
    """No turns: the texts of all messages, one after the other, and the model goes on from there."""

    name = "raw"
    is_raw = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = frozenset(tokenizer.eos_ids)

    def _newest(
        self, system: Message | None, rounds: list[list[Message]], room: int, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        # Without turns there are no rounds that could go.
        ids = self._encode([*([system] if system else []), *(m for r in rounds for m in r)])
        if len(ids) > room:
            raise ContextFull(len(ids), room + 1)
        return ids

    def _encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        begin = [self._tokenizer.bos_id] if self._tokenizer.add_bos and self._tokenizer.bos_id is not None else []
        ids: list[int] = []
        text = ""
        for message in messages:
            if message.ids is None:
                text += message.content
            else:
                ids += self._tokenizer.encode(text) if text else []
                ids += message.ids
                text = ""
        return begin + ids + (self._tokenizer.encode(text) if text else [])


def turn_format(
    tokenizer: Tokenizer, generation_config: Mapping[str, Any], chat_template: str | None = None
) -> TurnFormat:
    """A model's own turn format: its turn ids, else its template, else none.

    Args:
        tokenizer: the model's vocabulary.
        generation_config: the content of generation_config.json; {} when there is none.
        chat_template: jinja source; None takes the one that came with the vocabulary.

    Raises:
        UserError: the turn ids are not the vocabulary's, or the template does not compile.
    """
    user, assistant = (generation_config.get(f"{role}_token_id") for role in ("user", "assistant"))
    if type(user) is int and type(assistant) is int:  # true and false are no ids
        return IdTurns(tokenizer, user, assistant)
    if chat_template:
        return TemplateTurns(tokenizer, chat_template)
    own = tokenizer.chat_template
    return TemplateTurns(tokenizer, own, tokenizer.tool_template) if own else RawTurns(tokenizer)


def _is_of_tools(message: Message) -> bool:
    return bool(message.calls) or message.role == "tool"


def _one_beginning(messages: Sequence[Message]) -> Sequence[Message]:
    """The same conversation with the system messages that it begins with as one, as most templates take no more."""
    first = list(takewhile(lambda message: message.role == "system", messages))
    if len(first) < 2:
        return messages
    return [Message("system", "\n\n".join(m.content for m in first)), *messages[len(first) :]]


def _rounds(messages: Sequence[Message]) -> tuple[Message | None, list[list[Message]]]:
    """The system message and the rounds; each begins with a user's message (the first may begin with any)."""
    system = messages[0] if messages[0].role == "system" else None
    rounds: list[list[Message]] = []
    for message in messages[1 if system else 0 :]:
        if message.role == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    return system, rounds
