"""A second, smaller model that guesses ahead for a larger one of the same vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace.runtime.engine import Engine
from headrace.runtime.sequence import common_prefix
from headrace.runtime.speculation import Costs, Speculation

__all__ = ["DraftModel", "draft_model"]


class DraftModel:
    """Guesses what a draft model would say, the likeliest token each time. A `Drafter` of one answer.

    Args:
        engine: the draft model's, shared by all answers; each has a sequence of its own in it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sequence = engine.open(reuse=False)

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` guesses; none where the draft model's context ends."""
        if len(tokens) + most > self._engine.context:
            return []
        same = common_prefix(self._sequence.tokens, tokens)
        self._sequence.rewind(same)
        logits = self._engine.extend(self._sequence, tokens[same:])
        made: list[int] = []
        while True:
            made.append(int(logits.argmax()))
            if len(made) >= most:
                return made
            logits = self._engine.extend(self._sequence, made[-1:])


def draft_model(engine: Engine) -> Callable[[], Speculation]:
    """For an Engine: guesses by another engine's model for each answer."""
    costs = Costs()
    return lambda: Speculation(DraftModel(engine), costs)
