"""A model on several nodes: conversations stay where their cache is, streams and errors come through, nodes die."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from headrace.language_model import load
from headrace.server.generation import GenerationRequest
from headrace.server.replicas import Loading, RemoteModel, beginning, in_order, replicated
from tests.clusters import Cluster, on_ray
from tests.exports import Exports
from tests.server.scripted import running

CONVERSATIONS = [f"{n}, a river" for n in range(6)]
RETURN_SECONDS = 120  # until a lost replica is there again, on a crowded machine
SAID = {"role": "user", "content": "Water?"}


def _request(*contents: str, system: str | None = None) -> GenerationRequest:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return GenerationRequest([*([{"role": "system", "content": system}] if system else []), *messages])


def test_a_conversation_has_one_beginning() -> None:
    first = beginning(_request("a"))
    assert first == beginning(_request("a", "b", "c")) != beginning(_request("b"))
    assert beginning(_request("a", system="s")) != first
    assert beginning(GenerationRequest("x" * 600)) == beginning(GenerationRequest("x" * 700))
    assert beginning(GenerationRequest([1, 2])) != beginning(GenerationRequest([1, 3]))
    assert beginning(GenerationRequest([{"role": "system", "content": "s"}]))


def test_a_replica_that_comes_or_goes_moves_no_other_conversation() -> None:
    names, keys = ["a", "b", "c", "d"], [str(n) for n in range(400)]
    before = {key: in_order(key, names)[0] for key in keys}
    spread = Counter(before.values())
    assert set(spread) == set(names) and min(spread.values()) > len(keys) / len(names) / 2
    after = {key: in_order(key, ["a", "c", "d"])[0] for key in keys}
    assert all(after[key] == name for key, name in before.items() if name != "b")
    assert all(after[key] == in_order(key, names)[1] for key, name in before.items() if name == "b")


@pytest.fixture(scope="module")
def served(exports: Exports, cluster: Cluster) -> Iterator[tuple[RemoteModel, str]]:
    loading = Loading(exports.bundle("tied"), slots=2, opening={"runner": "host"})
    with replicated(cluster.address, "tied", loading, 2) as model, running(model) as address:
        yield model, address


def _ask(address: str, *messages: dict[str, str], **more: Any) -> httpx.Response:
    body = {"messages": list(messages), "max_tokens": 6, "temperature": 0, **more}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=RETURN_SECONDS)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@on_ray
def test_answers_are_those_of_one_process(exports: Exports, served: tuple[RemoteModel, str]) -> None:
    model, address = served
    with load(exports.bundle("tied"), runner="host") as alone:
        for text in CONVERSATIONS[:3]:
            options = alone.sampling_options(temperature=0)
            expected = "".join(token.text for token in alone.chat().say(text, max_tokens=6, options=options))
            assert _ask(address, _user(text)).json()["choices"][0]["message"]["content"] == expected
            streamed = _ask(address, _user(text), stream=True)
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert streamed.text.rstrip().endswith("data: [DONE]") and streamed.text.count("data: {") > 3
    assert model.tokenize("river", special=False) and model.properties()["slots"] == 2
    assert model.detokenize(model.tokenize("river", special=False)) == "river"
    assert "Water?" in model.render(GenerationRequest([SAID]))[0]


@on_ray
def test_a_conversation_goes_on_where_its_cache_is(served: tuple[RemoteModel, str]) -> None:
    _, address = served
    for text in CONVERSATIONS:
        first = _ask(address, _user(text)).json()
        answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
        second = _ask(address, _user(text), answer, SAID).json()["usage"]
        assert second["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 3, text


@on_ray
def test_errors_come_through(served: tuple[RemoteModel, str]) -> None:
    model, address = served
    told = _ask(address, _user("long " * 300))
    assert (told.status_code, told.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert _ask(address, _user("x"), n=3).json()["error"]["param"] == "n"
    told = httpx.post(f"{address}/detokenize", json={"tokens": [10**6]})
    assert told.status_code == 400 and "vocabulary" in told.text
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert model.name == "tied"


@on_ray
def test_replicas_are_replaced_while_others_answer(served: tuple[RemoteModel, str]) -> None:
    model, address = served
    statuses: list[int] = []
    done = threading.Event()

    def asking() -> None:
        while not done.is_set():
            statuses.append(_ask(address, _user(f"{len(statuses)}")).status_code)

    thread = threading.Thread(target=asking)
    thread.start()
    try:
        model.restart()
    finally:
        done.set()
        thread.join()
    assert len(statuses) > 1 and set(statuses) == {200}


@on_ray
def test_a_lost_node_costs_its_own_conversations_a_moment(served: tuple[RemoteModel, str], cluster: Cluster) -> None:
    _, address = served
    cluster.lose_one()
    until = time.monotonic() + RETURN_SECONDS
    statuses: Counter[int] = Counter()
    waiting = list(CONVERSATIONS)
    while waiting and time.monotonic() < until:
        statuses[status := _ask(address, _user(waiting[0])).status_code] += 1
        if status == 200:
            waiting.pop(0)
        else:
            time.sleep(0.5)
    assert not waiting and set(statuses) <= {200, 503}
