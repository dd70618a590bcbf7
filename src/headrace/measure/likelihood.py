"""How likely texts are after other texts, for a model that is known only by what may come next after tokens.

Knows no runner, no file and no question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.model.fidelity import log_softmax
from headrace.runtime.sequence import common_prefix

__all__ = ["Encode", "Likelihood", "NextLogits", "likelihoods", "split_pair"]

Encode = Callable[[str], list[int]]
NextLogits = Callable[[Sequence[Sequence[int]]], Iterable[NDArray[np.float32]]]
"""Prompts of token ids → the logits (V,) of what follows each, in order."""


@dataclass(frozen=True)
class Likelihood:
    """The log of the probability of a continuation, and whether each of its tokens is the likeliest."""

    log: float
    greedy: bool


def split_pair(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a context, and those that follow it when the continuation is added.

    The text is encoded as a whole, so that a letter is the token it is within a text; spaces at the context's end
    belong to what follows (lm-evaluation-harness, TemplateLM._encode_pair). Where the vocabulary joins the two so that
    nothing would follow, the token that holds both follows.
    """
    start, whole = encode(context.rstrip()), encode(context + continuation)
    if len(whole) <= len(start):
        start = start[: common_prefix(start, whole)]
    return start, whole[len(start) :]


def likelihoods(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], following: NextLogits) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Args:
        pairs: (context, continuation), token ids, one or more of each.
        following: the model; asked once for each different beginning, in the order of first use.
    """
    queries: dict[tuple[int, ...], dict[int, tuple[float, bool]]] = {}
    for context, continuation in pairs:
        for used, token in enumerate(continuation):
            queries.setdefault((*context, *continuation[:used]), {})[token] = (np.nan, False)
    for found, logits in zip(queries.values(), following(list(queries)), strict=True):
        row = log_softmax(logits)
        likeliest = int(row.argmax())
        found.update({token: (float(row[token]), token == likeliest) for token in found})
    told = []
    for context, continuation in pairs:
        steps = [queries[(*context, *continuation[:used])][token] for used, token in enumerate(continuation)]
        told.append(Likelihood(sum(log for log, _ in steps), all(greedy for _, greedy in steps)))
    return told
