"""Prompts: from what a client asked for to what the engine needs. Knows no HTTP and no event loop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from sys import float_info
from typing import Any

from headrace.errors import ContextFull, UserError
from headrace.language_model import LanguageModel
from headrace.runtime.answer import Limits
from headrace.runtime.grammar import Grammar
from headrace.runtime.sampling import SamplingOptions
from headrace.server.generation import GenerationRequest, Refused
from headrace.server.length import refuse_too_long
from headrace.server.sessions import message_of
from headrace.text.tokenizer import Tokenizer

__all__ = ["Prompt", "compiled", "prepare", "render", "spelled_out"]

_WHOLE = 1 << 62  # room for any prompt: what does not fit is refused, not cut


@dataclass(frozen=True)
class Rendered:
    """A prompt as ids.

    Attributes:
        ids: the tokens.
        continues: the answer goes on from their text.
        stop_ids: the tokens that end an answer.
    """

    ids: list[int]
    continues: bool
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Prompt:
    """What the engine needs of a request.

    Attributes:
        ids: the prompt's tokens; they fit.
        continues: the answer goes on from their text.
        limits: where answers end.
        options: how tokens are chosen.
    """

    ids: list[int]
    continues: bool
    limits: Limits
    options: SamplingOptions


def prepare(model: LanguageModel, request: GenerationRequest) -> Prompt:
    """Whatever can be wrong with a request but for its grammar is told here, before anything is computed.

    Raises:
        Refused: a field cannot be served.
        UserError: the prompt cannot be rendered or does not fit.
    """
    rendered = render(model, request)
    if not rendered.ids:
        raise UserError("the prompt is empty; expected at least one token")
    room = model.context - len(rendered.ids)
    if room < 1:
        raise ContextFull(len(rendered.ids), model.context)
    options = model.sampling_options(**_sampling(request.sampling))
    try:
        options.check_vocabulary(model.engine.runner.vocab_size)
    except UserError as error:
        raise Refused(str(error), field="logit_bias") from None
    # Of an answer of no tokens one is drawn, and nobody is told.
    most = room if request.max_tokens is None else min(max(request.max_tokens, 1), room)
    limits = Limits(most, rendered.stop_ids, request.stop)
    return Prompt(rendered.ids, rendered.continues, limits, options)


def _sampling(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling as the engine takes it. Clients also ask for no probability, which is the least above it, that of the
    likeliest token alone, and for seeds below 0, of which generators of random numbers know none."""
    taken = dict(asked)
    if taken.get("top_p") == 0:
        taken["top_p"] = float_info.min
    if "seed" in taken:
        taken["seed"] %= 1 << 64
    return taken


def render(model: LanguageModel, request: GenerationRequest) -> Rendered:
    """The prompt as ids.

    Raises:
        ContextFull: it is far longer than the context.
        Refused: it has an id outside of the vocabulary.
        UserError: the turn format cannot render it.
    """
    prompt = request.prompt
    if request.is_conversation:
        messages = [message_of(raw) for raw in prompt if isinstance(raw, Mapping)]
        # Twice as much, since a template may leave out what was said before.
        said = "\n".join([*(m.content for m in messages), *(json.dumps(tool) for tool in request.tools)])
        refuse_too_long(said, model.tokenizer.encode, model.context, times=2)
        turns = model.turns
        ids = turns.render(messages, _WHOLE, request.tools)
        return Rendered(ids, turns.goes_on(messages), frozenset(turns.stop_ids))
    if isinstance(prompt, str):
        refuse_too_long(prompt, model.tokenizer.encode, model.context)
    ids = model.encode_raw(prompt) if isinstance(prompt, str) else [int(i) for i in prompt if isinstance(i, int)]
    size = model.tokenizer.vocab_size
    if any(not 0 <= i < size for i in ids):
        raise Refused(f"prompt has an id outside of the vocabulary; expected 0 … {size - 1}", field="prompt")
    return Rendered(ids, True, frozenset(model.tokenizer.eos_ids))


def compiled(model: LanguageModel, kind: str, source: str) -> Grammar:
    """A request's grammar.

    Raises:
        Refused: it is wrong, or takes too much memory or time.
    """
    try:
        return model.grammar(kind, source)
    except UserError as error:
        field = "tools" if kind == "lark" else "response_format"  # no field takes a Lark grammar itself
        raise Refused(str(error), field=field) from None


def spelled_out(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, with special tokens as they are spelled."""
    text = ""
    run: list[int] = []
    for token in ids:
        if token in tokenizer.special_ids:
            text += tokenizer.decode(run, continues=True) + tokenizer.id_to_piece(token)
            run = []
        else:
            run.append(token)
    return text + tokenizer.decode(run, continues=True)
