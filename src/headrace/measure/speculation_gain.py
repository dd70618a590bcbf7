"""What speculation gains a bundle: speed with and without it, how many guesses came true, whether answers are the same.

On text, since random tokens repeat nothing: a few prompts whose answers quote them, and a few whose answers do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.language_model import LanguageModel, load
from headrace.runtime.answer import Answer, Limits

__all__ = ["LEAST_TOKENS", "time_speculation"]

LEAST_TOKENS = 16  # of an answer that is timed: more than a step can make

PROMPTS = (
    "Repeat this line three times: The river carries sand to the sea, and the sea carries it back to the shore.\n",
    "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return",
    "Name five rivers and say where each of them begins.\n",
    "把下面的句子重复两遍：先测量，再优化；每一个数字背后都有一次测量。\n",
)


def time_speculation(
    path: Path, how: str, *, tokens: int, repeats: int, runner: str | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Answer a few prompts greedily, without and with guesses.

    Args:
        path: the bundle.
        how: "lookup" or a draft bundle's folder.
        tokens: of each answer, LEAST_TOKENS or more.
        repeats: of all prompts; medians are told.
        runner, threads: who computes.

    Returns:
        {how, tokens, plain_tok_s, tok_s, drafted_tokens, accepted_tokens, acceptance, same, equal_tokens}: `same` says
        that both gave the same answers, token for token; `equal_tokens` counts the tokens before each answer's first
        difference. A runner that computes one token by another kernel than several (ONNX Runtime) rounds differently
        in the two, so where two tokens are nearly as likely the answers may part.

    Raises:
        BundleError: the draft bundle has another vocabulary.
        TargetError: the runner chooses tokens by itself.
        ContextFull: prompts and answers do not fit the context.
    """
    with load(path, runner=runner, threads=threads) as model:
        plain, speed = _rounds(model, tokens, repeats)
    with load(path, runner=runner, threads=threads, speculate=how) as model:
        guessed, faster = _rounds(model, tokens, repeats)
    return {
        "how": how if how == "lookup" else Path(how).name,
        "tokens": sum(map(len, plain.answers)),
        "plain_tok_s": round(speed, 3),
        "tok_s": round(faster, 3),
        "drafted_tokens": guessed.drafted,
        "accepted_tokens": guessed.accepted,
        "acceptance": round(guessed.accepted / guessed.drafted, 4) if guessed.drafted else 0.0,
        "same": plain.answers == guessed.answers,
        "equal_tokens": sum(_equal(a, b) for a, b in zip(plain.answers, guessed.answers)),
    }


def _equal(plain: Sequence[int], guessed: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(plain, guessed))
    return next((i for i, (a, b) in pairs if a != b), min(len(plain), len(guessed)))


@dataclass
class _Round:
    """All prompts answered once; speed is that of the steps behind each answer's first one, which reads the prompt."""

    answers: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0


def _rounds(model: LanguageModel, tokens: int, repeats: int) -> tuple[_Round, float]:
    """The last of some rounds, and the median of their tokens a second."""
    rounds = [_round(model, tokens) for _ in range(repeats + 1)]  # the first only warms up
    return rounds[-1], statistics.median(found.tokens / found.seconds for found in rounds[1:])


def _round(model: LanguageModel, tokens: int) -> _Round:
    found = _Round()
    options = model.sampling_options(temperature=0.0, repetition_penalty=1.0)
    limits = Limits(tokens, frozenset(model.tokenizer.eos_ids))
    for prompt in PROMPTS:
        answer = Answer(model.tokenizer, limits, continues=True)
        request = model.engine.submit(model.encode_raw(prompt), options, answer)
        ids: list[int] = []
        while not request.done:
            started = time.perf_counter()
            made = [token.id for _, token in model.engine.step()]
            if ids:
                found.seconds += time.perf_counter() - started
                found.tokens += len(made)
            ids += made
        if request.error is not None:
            raise request.error
        found.answers.append(ids)
        found.drafted += answer.usage.drafted_tokens
        found.accepted += answer.usage.accepted_tokens
    return found
