"""A conversation with a model: its messages, what of the context they take, its file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from headrace.errors import ContextFull, UserError
from headrace.runtime.answer import Answer, Limits, Token, Usage
from headrace.runtime.context import WhenFull, fit
from headrace.runtime.grammar import Grammar
from headrace.runtime.sampling import SamplingOptions
from headrace.runtime.sequence import common_prefix
from headrace.runtime.session import Session, read_session, write_session
from headrace.text.tokenizer import Tokenizer
from headrace.text.turns import Message, TurnFormat

__all__ = ["Answering", "Chat"]


class Answering(Protocol):
    """What a conversation asks of its model: `headrace.LanguageModel`'s members of these names."""

    tokenizer: Tokenizer
    sampling: SamplingOptions

    @property
    def context(self) -> int: ...

    def stream(self, ids: Sequence[int], options: SamplingOptions, answer: Answer) -> Iterator[Token]: ...

    def session(self, messages: Sequence[Message], tokens: Sequence[int]) -> Session: ...

    def hold(self, session: Session, path: Path) -> None: ...


class Chat:
    """A conversation: messages, and the model that answers.

    Args:
        model: answers.
        system: what the model is told first, or None for the turn format's own.
        turns: how messages become ids.
        when_full: what goes when the conversation no longer fits.

    Attributes:
        messages: all turns so far; may be replaced, by fewer of them or by others.
        dropped_tokens: tokens of the conversation that the last answer was given without, for want of room.
        usage: what the last answer took.
    """

    def __init__(
        self, model: Answering, system: str | None, turns: TurnFormat, when_full: WhenFull = WhenFull.NEWEST
    ) -> None:
        self.model = model
        self.turns = turns
        self.when_full = when_full
        self.messages: list[Message] = [] if system is None else [Message("system", system)]
        self.dropped_tokens = 0
        self.usage = Usage()
        self._tokens: Sequence[int] = ()  # what the model has before it
        self._used = 0
        self._known: list[Message] = []  # the conversation of which the two speak

    @property
    def used(self) -> int:
        """Tokens of the context that the conversation takes up to its last answer; 0 where it has none."""
        self._follow()
        return self._used

    def _follow(self) -> None:
        """Know the tokens of the conversation as it is now: answered, restored, or replaced by whoever holds it."""
        if self.messages == self._known:
            return
        self._known = list(self.messages)
        answered = max((i for i, m in enumerate(self.messages, 1) if m.role == "assistant"), default=0)
        if not answered:
            self._tokens, self._used = (), 0
            return
        try:
            ids = self.turns.render(self.messages[:answered], self.model.context)
        except ContextFull:  # its last round alone takes more
            self._tokens, self._used = (), self.model.context
            return
        self._tokens, self._used = ids[: common_prefix(ids, self._tokens)], len(ids)

    def say(
        self,
        text: str,
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        options: SamplingOptions | None = None,
        grammar: Grammar | None = None,
    ) -> Iterator[Token]:
        """Say something and yield the answer's tokens. Closed early, the answer so far stays in the conversation; an
        answer that fails before its first token leaves the conversation as it was.

        Raises:
            ContextFull: this message alone does not fit, or with `stop` the conversation does not.
        """
        model = self.model
        messages = [*self.messages, Message("user", text)]
        fitted = fit(self.turns, messages, model.context, max_tokens, self.when_full)
        beginning = fitted.beginning if self.when_full is WhenFull.WINDOW else None
        limits = Limits(max_tokens, self.turns.stop_ids, stop, beginning)
        made = Answer(model.tokenizer, limits, continues=self.turns.goes_on(messages), grammar=grammar)
        answer: list[Token] = []
        try:
            for token in model.stream(fitted.ids, options or model.sampling, made):
                if not answer:
                    made.usage.dropped_tokens += fitted.dropped_tokens
                self.dropped_tokens = made.usage.dropped_tokens
                answer.append(token)
                yield token
        finally:
            if answer:
                self.usage, self._tokens = made.usage, made.tokens
                # The answer's own tokens: the next prompt then begins with what the cache holds. A stop string's
                # tokens are no part of the answer, so then the text decides.
                cut = answer[-1].finish == "stop" and answer[-1].id not in self.turns.stop_ids
                own = None if cut else tuple(token.id for token in answer if token.id not in self.turns.stop_ids)
                self.messages = [*messages, Message("assistant", "".join(token.text for token in answer), own)]
                if made.usage.dropped_tokens:  # else the messages tell all
                    self._known = list(self.messages)
                    self._used = len(made.tokens) or made.usage.prompt_tokens + made.usage.tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file, with its cache.

        Raises:
            UserError: it cannot be written.
        """
        self._follow()
        write_session(Path(path), self.model.session(self.messages, self._tokens))

    def restore(self, path: Path) -> None:
        """Take over a saved conversation.

        Raises:
            UserError: it is missing or damaged, or another model's or runner's, or this conversation has begun.
        """
        if self.messages:
            raise UserError("a saved conversation cannot be joined to one that has begun; expected no --system")
        session = read_session(path)
        self.model.hold(session, path)
        self.messages, self._tokens = list(session.messages), session.tokens
        self._known = []
