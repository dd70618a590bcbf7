"""What happens when the context fills: the one place that says so.

    stop     a conversation that no longer fits is refused; an answer ends where the context does
    newest   whole rounds go, the oldest first, until prompt and answer fit (Baichuan2's rule); an answer ends where the
             context does
    window   the beginning and the newest tokens stay, what is between goes; an answer goes on over its oldest tokens

Nothing is ever left out in silence: `Fitted.dropped_tokens` and `Usage.dropped_tokens` say how much was. Knows no
engine and no terminal.

    window:   beginning │ dropped: a multiple of context/4 │ newest │ room for the answer
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import takewhile
from typing import NamedTuple

from headrace.errors import ContextFull, UserError, did_you_mean
from headrace.runtime.sequence import common_prefix
from headrace.text.turns import Message, TurnFormat

__all__ = ["Fitted", "WhenFull", "beginning_of", "fit", "slide"]

# Attention leans on the first tokens whatever they say (StreamingLLM, Xiao et al. 2023), so some always stay.
SINKS = 4
EVERYTHING = 1 << 62


class WhenFull(Enum):
    """The choice."""

    STOP = "stop"
    NEWEST = "newest"
    WINDOW = "window"

    @classmethod
    def named(cls, name: str) -> WhenFull:
        """The choice of this name.

        Raises:
            UserError: there is none.
        """
        names = [kind.value for kind in cls]
        if name not in names:
            raise UserError(f"--when-full {name!r} is unknown{did_you_mean(name, names)}; expected {', '.join(names)}")
        return cls(name)


class Fitted(NamedTuple):
    """A prompt that fits.

    Attributes:
        ids: its tokens.
        dropped_tokens: tokens of the conversation that are not in it.
        beginning: for `window`, how many first tokens stay when the answer runs on.
    """

    ids: list[int]
    dropped_tokens: int = 0
    beginning: int = 0


def fit(turns: TurnFormat, messages: Sequence[Message], context: int, max_tokens: int, when_full: WhenFull) -> Fitted:
    """The prompt of a conversation, as much of it as the choice allows.

    Args:
        turns: how messages become ids.
        messages: the conversation.
        context: positions.
        max_tokens: tokens wanted for the answer; at most half of the context is kept free for them.
        when_full: the choice.

    Raises:
        ContextFull: the conversation (`stop`), or its system message and last round (`newest`), leave no room.
    """
    whole = turns.render(messages, EVERYTHING)
    reserve = min(max_tokens, context // 2)
    if when_full is WhenFull.STOP:
        if len(whole) >= context:
            raise ContextFull(len(whole), context)
        return Fitted(whole)
    if when_full is WhenFull.WINDOW:
        beginning = beginning_of(turns, messages, whole, context)
        ids = slide(whole, beginning, context, context - reserve)
        return Fitted(ids, len(whole) - len(ids), beginning)
    if len(whole) <= context - reserve:
        return Fitted(whole)
    try:
        ids = turns.render(messages, context - reserve)
    except ContextFull:  # then a shorter answer is better than none
        ids = turns.render(messages, context - 1)
    return Fitted(ids, len(whole) - len(ids))


def beginning_of(turns: TurnFormat, messages: Sequence[Message], whole: Sequence[int], context: int) -> int:
    """How many tokens of a conversation come before anything was said: the system message and the first turn's mark; a
    few at least and a quarter of the context at most."""
    head = takewhile(lambda message: message.role == "system", messages)
    other = turns.render([*head, Message("user", "?")], EVERYTHING)
    return min(max(common_prefix(whole, other), SINKS), context // 4)


def slide(ids: Sequence[int], beginning: int, context: int, room: int) -> list[int]:
    """The first `beginning` tokens and the newest ones, at most `room` in all where that is possible.

    What goes is a multiple of a quarter of the context: then the prompts of several turns, and the middle of an answer,
    leave out the very same tokens, and what is cached of them can be kept.
    """
    step = max(context // 4, 1)
    steps = -(-max(len(ids) - room, 0) // step)
    dropped = min(steps * step, max(len(ids) - beginning - 1, 0))
    return [*ids[:beginning], *ids[beginning + dropped :]]
