"""Any text as a conversation: what a chat model is asked, where calibration and evaluation have plain text only."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

from headrace.errors import UserError
from headrace.text.tokenizer import Tokenizer
from headrace.text.turns import Message, TurnFormat

__all__ = ["conversation"]

_TURNS = (("user", 24), ("assistant", 96))  # tokens of each, roughly


def conversation(tokenizer: Tokenizer, turns: TurnFormat, ids: Sequence[int]) -> list[int]:
    """The same text as a prompt: a question, an answer, a question, …; none where the template wants something else.

    Args:
        tokenizer: the model's vocabulary.
        turns: its turn format.
        ids: the text's tokens.
    """
    text = tokenizer.decode(ids)
    messages, start = [], 0
    for role, tokens in itertools.cycle(_TURNS):
        stop = start + 1 + tokens * len(text) // len(ids)
        messages.append(Message(role, text[start:stop].strip()))
        start = stop
        if start >= len(text):
            break
    try:
        return turns.render(messages, sys.maxsize)
    except UserError:
        return []
