"""What speculation gains a bundle: speed with and without it, how many guesses came true, whether answers are the same.

On text, since random tokens repeat nothing: a few prompts whose answers quote them, and a few whose answers do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.language_model import LanguageModel, load

__all__ = ["time_speculation"]

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
        tokens: of each answer.
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
    """
    with load(path, runner=runner, threads=threads) as model:
        plain, seconds, _ = _answers(model, tokens, repeats)
    with load(path, runner=runner, threads=threads, speculate=how) as model:
        guessed, faster, (drafted, accepted) = _answers(model, tokens, repeats)
    count = sum(map(len, plain))
    return {
        "how": how if how == "lookup" else Path(how).name,
        "tokens": count,
        "plain_tok_s": round(count / seconds, 3),
        "tok_s": round(sum(map(len, guessed)) / faster, 3),
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        "acceptance": round(accepted / drafted, 4) if drafted else 0.0,
        "same": plain == guessed,
        "equal_tokens": sum(_equal(a, b) for a, b in zip(plain, guessed)),
    }


def _equal(plain: Sequence[int], guessed: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(plain, guessed))
    return next((i for i, (a, b) in pairs if a != b), min(len(plain), len(guessed)))


def _answers(model: LanguageModel, tokens: int, repeats: int) -> tuple[list[list[int]], float, tuple[int, int]]:
    """Answers to all prompts, the median seconds after their first tokens, and the last round's (drafted, accepted)."""
    taken = []
    for _ in range(repeats + 1):  # the first only warms up
        answers, seconds, drafted, accepted = [], 0.0, 0, 0
        for prompt in PROMPTS:
            answer = []
            started = 0.0
            for token in model.generate(prompt, max_tokens=tokens, temperature=0.0, repetition_penalty=1.0):
                started = started or time.perf_counter()
                answer.append(token.id)
                if token.usage is not None:
                    drafted += token.usage.drafted_tokens
                    accepted += token.usage.accepted_tokens
            seconds += time.perf_counter() - started
            answers.append(answer)
        taken.append(seconds)
    return answers, statistics.median(taken[1:]), (drafted, accepted)
