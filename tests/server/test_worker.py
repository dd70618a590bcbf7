"""The worker over a real engine and a tiny bundle: many answers at once are what each is alone; limits hold."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ContextFull, UserError
from headrace.language_model import LanguageModel, load
from headrace.runtime.grammar import Grammar
from headrace.server.generation import Answer, Piece, Refused, collect
from headrace.server.tools import split_calls, tool_use
from headrace.server.worker import ModelWorker, WorkerOptions
from tests.exports import CONTEXT, Exports
from tests.server.asking import GREEDY, answers, ask

ASKED = ["The river", "Water is", "长江", "A headrace carries", "One two three", "河"]


def alone(exports: Exports, texts: Sequence[str]) -> list[str]:
    with load(exports.bundle("tied"), runner="host") as model:
        return [_said(model, text) for text in texts]


def _said(model: LanguageModel, text: str) -> str:
    options = model.sampling_options(temperature=0)
    return "".join(token.text for token in model.chat().say(text, max_tokens=12, options=options))


def test_many_at_once_are_what_each_is_alone(serving: Callable[..., ModelWorker], exports: Exports) -> None:
    made = asyncio.run(answers(serving(slots=3), [ask(text) for text in ASKED]))
    assert [a[0].text for a in made] == alone(exports, ASKED)
    assert all(a[0].finish in ("stop", "length") for a in made)


def test_seeded_answers_do_not_depend_on_what_else_runs(serving: Callable[..., ModelWorker]) -> None:
    worker = serving()
    seeded = ask("The river", sampling={"temperature": 1.0, "seed": 5})
    first = asyncio.run(answers(worker, [seeded]))[0][0].text
    among = asyncio.run(answers(worker, [ask(ASKED[1]), seeded, ask(ASKED[2]), seeded]))
    assert among[1][0].text == among[3][0].text == first


def test_no_probability_is_that_of_the_likeliest_token(serving: Callable[..., ModelWorker]) -> None:
    requests = [ask("The river", sampling=s) for s in (GREEDY, {"temperature": 5.0, "top_p": 0})]
    greedy, least = asyncio.run(answers(serving(), requests))
    assert greedy[0].text == least[0].text


def test_a_seed_below_0_is_one_of_its_own(serving: Callable[..., ModelWorker]) -> None:
    seeds = (-1, -1, 1, -(1 << 63), (1 << 63) - 1)
    requests = [ask("The river", n=2, sampling={"temperature": 5.0, "seed": seed}) for seed in seeds]
    one, again, *others = ([a.text for a in made] for made in asyncio.run(answers(serving(), requests)))
    assert one == again and all(one != other for other in others)


def test_several_answers_of_one_prompt(serving: Callable[..., ModelWorker]) -> None:
    worker = serving()
    request = ask("The river", n=3, sampling={"temperature": 1.5, "seed": 1})
    made = asyncio.run(answers(worker, [request]))[0]
    assert len({a.text for a in made}) > 1
    assert [a.text for a in asyncio.run(answers(worker, [request]))[0]] == [a.text for a in made]
    with pytest.raises(Refused, match="n is 5; expected at most 4"):
        asyncio.run(answers(worker, [ask("x", n=5)]))


def test_the_stop_string_of_an_answer_is_told(serving: Callable[..., ModelWorker]) -> None:
    worker = serving()
    plain = asyncio.run(answers(worker, [ask("The river")]))[0][0]
    assert plain.stop is None and len(plain.text) > 3
    stop = plain.text[2:4]
    cut = asyncio.run(answers(worker, [ask("The river", stop=("☃", stop))]))[0][0]
    assert (cut.text, cut.finish, cut.stop) == (plain.text.partition(stop)[0], "stop", stop)


def test_an_answer_follows_its_schema(serving: Callable[..., ModelWorker]) -> None:
    """Beside an answer without one; a schema that is none is refused by its field."""
    schema = {
        "type": "object",
        "properties": {"deep": {"type": "boolean"}, "kind": {"enum": ["river", "sea"]}},
        "required": ["deep", "kind"],
        "additionalProperties": False,
    }
    worker = serving()
    strict = ask("The river", max_tokens=150, n=2, grammar=("json_schema", json.dumps(schema)))
    made = asyncio.run(answers(worker, [strict, ask("The sea")]))
    for answer in made[0]:
        found = json.loads(answer.text)
        assert type(found["deep"]) is bool and found["kind"] in ("river", "sea") and answer.finish == "stop"
    assert made[1][0].text
    with pytest.raises(Refused, match="the JSON schema cannot be read") as refused:
        asyncio.run(answers(worker, [ask("x", grammar=("json_schema", "{"))]))
    assert refused.value.field == "response_format"
    steps = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(3000)}
    deep = json.dumps({"$ref": "#/$defs/a0", "$defs": {**steps, "a3000": {}}})  # it would overflow the stack
    with pytest.raises(Refused, match="the grammar nests too deep") as refused:
        asyncio.run(answers(worker, [ask("x", grammar=("json_schema", deep))]))
    assert refused.value.field == "response_format"
    assert asyncio.run(answers(worker, [ask("The sea")]))[0][0].text == made[1][0].text, "it serves on"


def test_a_required_call_is_one(serving: Callable[..., ModelWorker]) -> None:
    """Whatever the model would rather say, in a vocabulary of its own."""
    city = {"type": "object", "properties": {"city": {"enum": ["Wuhan", "重庆"]}}, "required": ["city"]}
    depth = {"name": "depth", "parameters": {**city, "additionalProperties": False}}
    end = {"name": 'end "it"', "parameters": {"type": "object", "additionalProperties": False}}
    tools = [{"type": "function", "function": function} for function in (depth, end)]
    worker = serving()

    def call(choice: str, seed: int) -> tuple[str, dict[str, Any]]:
        use = tool_use(tools, choice)
        request = ask("How deep?", max_tokens=150, sampling={"temperature": 2.0, "seed": seed}, grammar=use.grammar)
        text, calls = split_calls(asyncio.run(answers(worker, [request]))[0][0].text)
        assert not text and len(calls) == 1
        return calls[0].name, json.loads(calls[0].arguments)

    for seed in range(3):
        name, arguments = call("=depth", seed)
        assert name == "depth" and arguments["city"] in ("Wuhan", "重庆")
        assert call("required", seed)[0] in ("depth", 'end "it"')


def test_slow_grammars_stop_nobody(serving: Callable[..., ModelWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may wait, more than asyncio has threads to share; texts are still turned to tokens beside them."""
    worker, go_on = serving(), threading.Event()
    compiled = worker._model.grammar

    def slow(kind: str, source: str) -> Grammar:
        assert go_on.wait(60)
        return compiled(kind, source)

    async def ask_all() -> tuple[Answer, list[Answer]]:
        strict = ask("The river", grammar=("regex", "[ab]{3}"))
        asked = [asyncio.create_task(worker.submit(strict)) for _ in range(40)]
        try:
            async with asyncio.timeout(30):
                plain = await collect(await worker.submit(ask("The sea")), 1)
                assert await asyncio.to_thread(worker.tokenize, "The sea", special=False)
            assert not any(task.done() for task in asked)
        finally:
            go_on.set()
            made = [await collect(await task, 1) for task in asked]
        return plain[0], [answer for (answer,) in made]

    monkeypatch.setattr(worker._model, "grammar", slow)
    plain, strict = asyncio.run(ask_all())
    assert plain.text and all(re.fullmatch("[ab]{3}", answer.text) for answer in strict)


def test_a_turn_computes_only_what_is_new(serving: Callable[..., ModelWorker]) -> None:
    worker = serving()
    talk = [{"role": "user", "content": "The river"}]

    async def two_turns() -> tuple[int, int]:
        first = await worker.submit(ask("", prompt=talk))
        said = await collect(first, 1)
        second = await worker.submit(
            ask("", prompt=[*talk, {"role": "assistant", "content": said[0].text}, {"role": "user", "content": "More"}])
        )
        await collect(second, 1)
        return first.usage.prompt_tokens, second.usage.cached_tokens

    length, cached = asyncio.run(two_turns())
    assert cached >= length - 3  # all but the mark that asks the assistant


@pytest.mark.parametrize("crowded", [False, True])
def test_a_saved_conversation_goes_on_elsewhere(
    serving: Callable[..., ModelWorker], tmp_path: Path, crowded: bool
) -> None:
    """The next answer is the same, and only what is new is computed; while all slots are taken, it waits for one."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The river " * 8}]
    path = tmp_path / "talk.session"
    here, there = serving(slots=2), serving(slots=1)

    async def go_on() -> None:
        said = (await collect(await here.submit(ask("", prompt=talk)), 1))[0].text
        whole = [*talk, {"role": "assistant", "content": said}]
        saved = await here.save_session(ask("", prompt=whole), path)
        before = [await there.submit(ask("x", max_tokens=40))] if crowded else []
        restoring = asyncio.create_task(there.restore_session(path))
        for generation in before:
            assert (await collect(generation, 1))[0].finish
        messages, held = await restoring
        assert messages == whole and held == saved
        more = ask("", prompt=[*whole, {"role": "user", "content": "More"}])
        made = [await worker.submit(more) for worker in (here, there)]
        answered = [await collect(generation, 1) for generation in made]
        assert answered[0][0].text == answered[1][0].text
        assert made[0].usage.cached_tokens == made[1].usage.cached_tokens >= saved - 1 > 20

    asyncio.run(go_on())


def test_a_session_of_another_model_is_refused(
    serving: Callable[..., ModelWorker], exports: Exports, tmp_path: Path
) -> None:
    path = tmp_path / "talk.session"
    with load(exports.bundle("mha"), runner="host") as other:
        chat = other.chat()
        list(chat.say("The river", max_tokens=3))
        chat.save(path)
    with pytest.raises(UserError, match="a conversation with another model or recipe"):
        asyncio.run(serving().restore_session(path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        asyncio.run(serving().restore_session(path))


def test_limits(serving: Callable[..., ModelWorker]) -> None:
    worker = serving(slots=1, queue=2)

    async def crowd() -> list[Any]:
        slow = [await worker.submit(ask("x", max_tokens=100)) for _ in range(2)]
        with pytest.raises(UserError, match="the prompt is empty"):
            await worker.submit(ask("", prompt=[]))
        slow.append(await worker.submit(ask("x", max_tokens=100)))
        async for _ in slow[0]:  # it has the slot; the others wait, whatever was taken from the inbox
            break
        with pytest.raises(Refused, match="2 answers wait already") as refused:
            await worker.submit(ask("x"))
        assert (refused.value.status, refused.value.retry_after) == (429, 2)
        await slow[0].aclose()
        made = [await collect(g, 1) for g in slow[1:]]
        return [*made, *[await collect(await worker.submit(ask("x")), 1) for _ in range(3)]]

    assert all(a[0].finish for a in asyncio.run(crowd()))
    with pytest.raises(ContextFull, match=rf"the context holds {CONTEXT}"):
        asyncio.run(answers(worker, [ask("long " * 300)]))
    with pytest.raises(UserError, match="the prompt is empty"):
        asyncio.run(answers(worker, [ask("", prompt=[])]))
    with pytest.raises(UserError, match="top_p"):
        asyncio.run(answers(worker, [ask("x", sampling={"top_p": 1.5})]))
    with pytest.raises(Refused, match="logit_bias names token 1000000") as wrong:
        asyncio.run(answers(worker, [ask("x", sampling={"logit_bias": {10**6: 1.0}})]))
    assert wrong.value.field == "logit_bias"
    with pytest.raises(Refused, match="outside of the vocabulary"):
        asyncio.run(answers(worker, [ask("", prompt=[10**6])]))


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_whose_time_ends_before_it_begins_is_told_to_come_back(
    serving: Callable[..., ModelWorker], n: int
) -> None:
    with pytest.raises(Refused, match="0 s were not enough to begin an answer; try again in 2 s") as refused:
        asyncio.run(answers(serving(seconds=0.0), [ask("x", n=n)]))
    assert (refused.value.status, refused.value.retry_after) == (503, 2)


def test_an_answer_whose_time_ends_loses_nothing(serving: Callable[..., ModelWorker]) -> None:
    """Not even what was held back, as the beginning of a stop string that did not come."""
    worker = serving()

    async def cut(stop: str) -> tuple[Answer, int]:
        worker._options = WorkerOptions()
        generation = await worker.submit(ask("The river", max_tokens=150, stop=(stop,), top_logprobs=0))

        async def pieces() -> AsyncIterator[Piece]:
            async for piece in generation:
                worker._options = WorkerOptions(seconds=0.0)
                yield piece

        return (await collect(pieces(), 1))[0], generation.usage.completion_tokens

    whole = asyncio.run(answers(worker, [ask("The river", max_tokens=150)]))[0][0].text
    answer, tokens = asyncio.run(cut(f"{whole}☃"))
    assert answer.finish == "length" and tokens < 100 and answer.text
    assert len(answer.tokens) == tokens
    assert b"".join(one.raw for one in answer.tokens).decode(errors="replace") == answer.text
    worker._options = WorkerOptions()
    assert answer.text == asyncio.run(answers(worker, [ask("The river", max_tokens=tokens)]))[0][0].text


def test_leaving_frees_the_slot_within_a_token(serving: Callable[..., ModelWorker]) -> None:
    worker = serving(slots=1)

    async def leave_and_ask() -> tuple[int, Answer]:
        left = await worker.submit(ask("x", max_tokens=150))
        async for _ in left:
            break
        await left.aclose()
        at = left.usage.completion_tokens
        answer = (await collect(await worker.submit(ask("y")), 1))[0]
        return left.usage.completion_tokens - at, answer

    more, answer = asyncio.run(leave_and_ask())
    assert more <= 2 and answer.finish


def test_closing_tells_those_who_wait(serving: Callable[..., ModelWorker]) -> None:
    worker = serving(slots=1)

    async def close() -> None:
        generation = await worker.submit(ask("x", max_tokens=150))
        async for _ in generation:
            break
        await asyncio.to_thread(worker.close)
        with pytest.raises(Refused, match="closing"):
            async for _ in generation:
                pass

    asyncio.run(close())
