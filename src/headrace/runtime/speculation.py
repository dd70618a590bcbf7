"""Speculation: guess some tokens ahead and let the model judge them all in one step. It changes no answer.

    text so far ─► drafter ─► 4 guesses ─► one span of 5 tokens ─► the model's own choice at each place;
                                                                   guesses count up to the first it does not share

A step is bound by reading the weights once, so a few more tokens cost little; how many are worth it follows from how
often guesses came and from what steps of each length took. Knows no engine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["Costs", "Drafter", "Pace", "PromptLookup", "Speculation", "prompt_lookup"]

LENGTHS = (1, 2, 3, 4, 5, 7)  # drafts worth trying; native kernels compute up to 8 tokens exactly as they would one
FORGET = 0.2  # how far one more observation moves an estimate
GUESS = 0.6  # how often a guess comes, before anything is known
DEAREST = 0.05  # what a guess costs of a step, before anything is known; low, so that it is tried
SILENCE = 64  # most steps in a row without a guess where guessing does not pay
GAIN = 1.02  # a step with guesses must promise at least so much more, as times are noisy


class Drafter(Protocol):
    """What guesses."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` guesses for what follows these tokens; none where there is nothing to go by."""
        ...


class PromptLookup:
    """Guesses that what followed the last few tokens the last time will follow again (prompt lookup decoding, Saxena
    2023): code, quotations, summaries and tables repeat themselves.

    Args:
        longest, shortest: how many of the last tokens must be the same, longest first.
    """

    def __init__(self, longest: int = 5, shortest: int = 3) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._count = 0  # tokens seen
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens → the place behind them, when last seen

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` guesses. From call to call the text may only grow; a shorter one is another text."""
        if len(tokens) < self._count:  # the window moved
            self._count, self._after = 0, {}
        for end in range(max(self._count, 1), len(tokens)):  # what ends with the very last token has no successor yet
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._count = len(tokens)
        for size in self._sizes:
            place = self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                return list(tokens[place : place + most])
        return []


class Costs:
    """What steps of each number of tokens took; shared by the answers of one engine."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def timed(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        known = self._seconds.get(tokens)
        # Near the fastest of late: noise only ever makes a step slower.
        self._seconds[tokens] = seconds if known is None else min(seconds, known + FORGET * (seconds - known))

    def of(self, tokens: int) -> float:
        """What a step of so many tokens costs, in steps of one token."""
        one, this = self._seconds.get(1), self._seconds.get(tokens)
        if one and this:
            return this / one
        slopes = [(s / one - 1) / (n - 1) for n, s in self._seconds.items() if n > 1] if one else []
        return 1 + (tokens - 1) * max(min(slopes, default=DEAREST), 0.0)


class Pace:
    """How many guesses are worth a step.

    With chance p that a guess comes, given that those before it came, n guesses give 1 + p + … + pⁿ tokens; the n that
    gives most tokens a second is taken, and none where one token at a time is as fast. Then it is tried again now and
    then, since texts change.

    Args:
        costs: what steps take.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._chance = GUESS
        self._held_back = 0
        self._patience = 1

    def length(self, most: int) -> int:
        """How many guesses to make, at most `most`."""
        best, best_rate = 0, GAIN
        for n in LENGTHS[: bisect_right(LENGTHS, most)]:
            tokens = (1 - self._chance ** (n + 1)) / (1 - self._chance) if self._chance < 1 else n + 1
            if tokens <= best_rate:  # even if it cost nothing more
                continue
            rate = tokens / self._costs.of(n + 1)
            if rate > best_rate:
                best, best_rate = n, rate
        if best or most < 1:
            return best
        self._held_back += 1
        return int(self._held_back >= self._patience)

    def told(self, drafted: int, accepted: int) -> None:
        """So many of the guesses came."""
        for n in range(min(accepted + 1, drafted)):
            self._chance += FORGET * ((n < accepted) - self._chance)
        self._held_back = 0
        self._patience = 1 if accepted == drafted else min(2 * self._patience, SILENCE)


class Speculation:
    """What guesses for one answer, and how far.

    Args:
        drafter: guesses.
        costs: what steps take.
    """

    def __init__(self, drafter: Drafter, costs: Costs) -> None:
        self._drafter = drafter
        self._costs = costs
        self._pace = Pace(costs)

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Guesses for what follows these tokens."""
        length = self._pace.length(min(most, LENGTHS[-1]))
        return self._drafter.draft(tokens, length) if length > 0 else []

    def told(self, drafted: int, accepted: int) -> None:
        """So many of the guesses came."""
        self._pace.told(drafted, accepted)

    def timed(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._costs.timed(tokens, seconds)


def prompt_lookup() -> Callable[[], Speculation]:
    """For an Engine: a `PromptLookup` for each answer."""
    costs = Costs()
    return lambda: Speculation(PromptLookup(), costs)
