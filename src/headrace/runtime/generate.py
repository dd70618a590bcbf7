"""generate: token after token until something says stop. Knows no model and no turn format."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from headrace.runtime.engine import Engine
from headrace.runtime.sampling import Sampler, SamplingOptions
from headrace.text.streaming import TextStream
from headrace.text.tokenizer import Tokenizer

__all__ = ["Limits", "Token", "generate"]


@dataclass(frozen=True)
class Token:
    """One step of an answer.

    Attributes:
        id: the token.
        text: text that became certain with it; may be empty. All texts joined are the answer.
        finish: on the last one, why: "stop" (an end token or stop string), "length" (max_tokens) or "context".
    """

    id: int
    text: str
    finish: str | None = None


@dataclass(frozen=True)
class Limits:
    """Where an answer ends.

    Attributes:
        max_tokens: after so many tokens.
        stop_ids: at any of these tokens.
        stops: at any of these strings, which are not part of it.
    """

    max_tokens: int
    stop_ids: Collection[int] = ()
    stops: Sequence[str] = ()


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    options: SamplingOptions,
    limits: Limits,
    *,
    continues: bool = False,
) -> Iterator[Token]:
    """Answer a prompt of token ids.

    The prompt is computed when the first token is asked for; what the engine already holds of it is kept. The end
    token itself is given as the last Token, without text.

    Args:
        engine: its sequence becomes the prompt and the answer.
        tokenizer: turns tokens to text.
        ids: the prompt.
        options: how tokens are chosen; the repetition penalty sees prompt and answer.
        limits: where the answer ends.
        continues: the answer goes on from the prompt's text (see `Tokenizer.decode`).

    Raises:
        ContextFull: the prompt leaves no room for an answer.
    """
    if limits.max_tokens < 1:
        return
    sampler = Sampler(options)
    stream = TextStream(tokenizer, limits.stops, continues=continues)
    logits = engine.prefill(ids)
    seen = list(ids)
    for count in range(1, limits.max_tokens + 1):
        token = sampler.sample(logits, seen)
        seen.append(token)
        if token in limits.stop_ids:
            yield Token(token, stream.finish(), "stop")
            return
        text = stream.push(token)
        cut = "length" if count == limits.max_tokens else "context" if not engine.room else None
        finish = "stop" if stream.stopped else cut
        if finish is not None:
            yield Token(token, text + stream.finish(), finish)
            return
        yield Token(token, text)
        logits = engine.append([token])
