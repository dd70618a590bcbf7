"""How likely tokens were, over a real engine: of an answer and of a prompt, as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.language_model import load
from headrace.measure.likelihood import likelihoods
from headrace.measure.questions import following
from headrace.server.generation import Answer, collect
from headrace.server.openai_chat import Call, chat_call, completion_call
from headrace.server.worker import ModelWorker
from headrace.text.turns import Message
from tests.exports import CONTEXT, Exports
from tests.server.asking import answers, ask


def test_logprobs_are_those_of_the_model(serving: Callable[..., ModelWorker], exports: Exports) -> None:
    made = asyncio.run(answers(serving(), [ask("The river", top_logprobs=3)]))[0][0]
    assert all(len(t.top) == 3 and t.top[0].logprob == t.logprob for t in made.tokens)
    with load(exports.bundle("tied"), runner="host") as model:
        ids = model.turns.render([Message("user", "The river")], CONTEXT)
        row = model.logits(ids)[-1].astype(np.float64)
    expected = row.max() - np.log(np.exp(row).sum())
    assert made.tokens[0].logprob == pytest.approx(expected, abs=1e-4)  # float32 logits


def told(worker: ModelWorker, call: Call) -> tuple[str, dict[str, Any]]:
    """The text of an answer and its logprobs, as OpenAI's clients get them: whole and in chunks they are the same."""

    async def both() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        generation = await worker.submit(call.request)
        whole = call.whole(await collect(generation, 1), generation.usage)["choices"][0]
        data = [json.loads(d) async for d in call.chunks(await worker.submit(call.request)) if d != "[DONE]"]
        return whole, [chunk["choices"][0] for chunk in data]

    whole, chunks = asyncio.run(both())
    text = whole["message"]["content"] if call.chat else whole["text"]
    streamed = [c["delta"].get("content", "") if call.chat else c["text"] for c in chunks]
    assert "".join(streamed) == text
    for name, listed in whole["logprobs"].items():
        assert [one for chunk in chunks if "logprobs" in chunk for one in chunk["logprobs"][name]] == listed
    return text, whole["logprobs"]


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "The river"}], "temperature": 0, "logprobs": True}


@pytest.mark.parametrize("text", ["🦕😀", "百川龘", "é~"])
def test_bytes_of_a_characters_tokens_joined_are_the_character(serving: Callable[..., ModelWorker], text: str) -> None:
    call = chat_call(CHAT | {"top_logprobs": 2})
    call = replace(call, request=replace(call.request, grammar=("regex", text)))
    said, logprobs = told(serving(), call)
    tokens = logprobs["content"]
    assert said == text and len(tokens) > len(text)
    assert bytes(byte for token in tokens for byte in token["bytes"]) == text.encode()
    assert all(token["token"].encode() == bytes(token["bytes"]) or "\\x" in token["token"] for token in tokens)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_that_are_told_are_those_of_the_text(serving: Callable[..., ModelWorker], seed: int) -> None:
    """Neither the end token nor a stop string's, which completions tell alone."""
    worker, hot = serving(), {"temperature": 1.0, "seed": seed, "max_tokens": 60}
    plain, logprobs = told(worker, chat_call(CHAT | hot))
    for stop in ([], [plain[5:7]], ["".join(t["token"] for t in logprobs["content"][4:6])]):
        text, logprobs = told(worker, chat_call(CHAT | hot | {"stop": stop}))
        joined = b"".join(bytes(token["bytes"]) for token in logprobs["content"])
        assert text == plain.partition(stop[0])[0] if stop else plain
        assert joined.decode(errors="replace").startswith(text)
        last = bytes(logprobs["content"][-1]["bytes"]) if logprobs["content"] else b""
        assert not joined or len(joined) - len(last) < len(text.encode())
        assert stop or joined.decode(errors="replace") == text


def test_completions_tell_the_token_that_was_drawn_beside_the_likeliest(serving: Callable[..., ModelWorker]) -> None:
    body = {"prompt": "The river", "temperature": 2, "seed": 1, "max_tokens": 40, "logprobs": 5}
    _, logprobs = told(serving(), completion_call(body))
    places = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
    assert all(top[token] == logprob for token, logprob, top in places)
    assert {len(top) for *_, top in places} == {5, 6}, "no two tokens are spelled alike"
    assert any(re.fullmatch(r"bytes:.*\\x[0-9a-f]{2}.*", token) for token in logprobs["tokens"])


LONG = "The river 百川 runs to the sea. " * 2  # several steps of the runner
SCORED: dict[str, Any] = {"temperature": 0, "echo": True, "logprobs": 1, "max_tokens": 1}


@pytest.mark.parametrize("prompt", [LONG, "T", "百🦕"])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echo_is_the_prompt_and_how_likely_its_tokens_are(
    serving: Callable[..., ModelWorker], exports: Exports, prompt: str, as_ids: bool, max_tokens: int
) -> None:
    """As much as `logits` says, also where the cache holds the prompt."""
    with load(exports.bundle("tied"), runner="host") as model:
        ids = model.encode_raw(prompt)
        rows = model.logits(ids)[:-1].astype(np.float64)
    worker = serving()
    asyncio.run(answers(worker, [ask("", prompt=prompt)]))
    given = [ids] if as_ids else prompt
    text, logprobs = told(worker, completion_call(SCORED | {"prompt": given, "max_tokens": max_tokens}))
    assert text.startswith(prompt) and (max_tokens or text == prompt)
    assert len(ids) <= len(logprobs["tokens"]) <= len(ids) + max_tokens
    expected = [row[token] - np.log(np.exp(row).sum()) for row, token in zip(rows, ids[1:])]
    assert logprobs["token_logprobs"][: len(ids)] == [None, *(pytest.approx(one, abs=1e-4) for one in expected)]
    tops = logprobs["top_logprobs"]
    assert tops[0] is None
    likeliest = [one == max(top.values()) for one, top in zip(logprobs["token_logprobs"][1:], tops[1:])]
    assert likeliest[: len(rows)] == [row.argmax() == token for row, token in zip(rows, ids[1:])]
    for token, at in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[at:].startswith(token) or token.startswith(("bytes:", "<"))


def test_a_prompt_is_scored_as_the_harness_scores_it(serving: Callable[..., ModelWorker], exports: Exports) -> None:
    """lm-evaluation-harness, local-completions: a list of one list of ids, and the last of the tokens is the answer's;
    the sum over a continuation is what its own model class for bundles gives."""
    with load(exports.bundle("tied"), runner="host") as model:
        context, continuation = model.encode_raw("The river runs"), model.tokenizer.encode(" to the sea")
        (expected,) = likelihoods([(context, continuation)], following(model))
    _, logprobs = told(serving(), completion_call(SCORED | {"prompt": [context + continuation], "seed": 1234}))
    assert sum(logprobs["token_logprobs"][len(context) : -1]) == pytest.approx(expected.log, abs=1e-3)


def test_every_answer_echoes_a_prompt_that_is_read_once(serving: Callable[..., ModelWorker]) -> None:
    worker = serving()
    call = completion_call(SCORED | {"prompt": LONG, "n": 2, "temperature": 2, "seed": 1, "max_tokens": 9})
    made = asyncio.run(answers(worker, [call.request]))[0]
    assert all(answer.text.startswith(LONG) for answer in made) and made[0].text != made[1].text
    size = next(place for place, token in enumerate(made[0].tokens) if token.start >= len(LONG))
    assert made[0].tokens[:size] == made[1].tokens[:size]

    async def cached() -> int:
        generation = await worker.submit(ask("", prompt=LONG))
        await collect(generation, 1)
        return generation.usage.cached_tokens

    assert asyncio.run(cached()) > size // 2, "others may use its cache"


def test_no_tokens_are_no_answer(serving: Callable[..., ModelWorker]) -> None:
    async def made() -> tuple[Answer, int]:
        generation = await worker.submit(completion_call({"prompt": "The river", "max_tokens": 0}).request)
        return (await collect(generation, 1))[0], generation.usage.completion_tokens

    worker = serving()
    assert asyncio.run(made()) == (Answer(finish="length"), 0)
