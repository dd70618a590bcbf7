"""Anthropic's and Ollama's clients, and what all dialects share, against a scripted model: streams, refusals."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from headrace.server.door import ServerOptions
from tests.server.scripted import ASK, CALL, CONTEXT, TOOL, WEATHER, ScriptedModel, running


def test_anthropic(address: str, model: ScriptedModel) -> None:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        asked: Any = [{"role": "user", "content": "Capital of France?"}]
        made = client.messages.create(model="tiny", max_tokens=9, system="Be brief.", messages=asked)
        assert made.content[0].type == "text" and made.content[0].text == "Paris."
        assert (made.stop_reason, made.usage.input_tokens, made.usage.cache_read_input_tokens) == ("end_turn", 4, 3)
        assert model.seen[0].prompt == ASK
        with client.messages.stream(model="tiny", max_tokens=9, messages=asked) as stream:
            assert "".join(stream.text_stream) == "Paris."
            assert stream.get_final_message().usage.output_tokens == 3
        model.words = ["Well. ", CALL]
        tool: Any = {"name": "weather", "input_schema": WEATHER}
        with client.messages.stream(model="tiny", max_tokens=9, messages=asked, tools=[tool]) as stream:
            final = stream.get_final_message()
        assert final.stop_reason == "tool_use"
        call: Any = final.content[-1]
        assert (call.name, call.input) == ("weather", {"city": "北京"})
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
        after: Any = [*asked, {"role": "assistant", "content": final.content}, {"role": "user", "content": [result]}]
        client.messages.create(model="tiny", max_tokens=9, messages=after, tools=[tool])
        rendered: Any = model.seen[-1].prompt
        assert [m["role"] for m in rendered] == ["user", "assistant", "tool"]
        with pytest.raises(anthropic.BadRequestError, match="the prompt has 10000 tokens"):
            client.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "x" * 20_000}])


@pytest.mark.parametrize(
    ("words", "finish", "stop", "told"),
    [
        (["Paris"], "stop", "\n\n", ("stop_sequence", "\n\n")),
        (["Paris"], "stop", None, ("end_turn", None)),
        (["Paris"], "length", None, ("max_tokens", None)),
        (["Well. ", CALL], "stop", "\n\n", ("tool_use", None)),
    ],
)
def test_anthropic_is_told_why_an_answer_ended(
    address: str, model: ScriptedModel, words: list[str], finish: str, stop: str | None, told: tuple[str, str | None]
) -> None:
    model.words, model.finish, model.stop = words, finish, stop
    tool: Any = {"name": "weather", "input_schema": WEATHER}
    asked: Any = {"model": "tiny", "max_tokens": 9, "messages": ASK[1:], "tools": [tool], "stop_sequences": ["\n\n"]}
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        made = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
    assert (made.stop_reason, made.stop_sequence) == (final.stop_reason, final.stop_sequence) == told


def test_ollama(address: str, model: ScriptedModel) -> None:
    client = ollama.Client(host=address)
    with client._client:
        _talk_as_ollama(client, address, model)


def _talk_as_ollama(client: ollama.Client, address: str, model: ScriptedModel) -> None:
    made = client.chat(model="tiny", messages=ASK, options={"temperature": 0.5, "num_predict": 9, "num_ctx": 4096})
    assert (made.message.content, made.done_reason, made.eval_count) == ("Paris.", "stop", 3)
    assert model.seen[0].sampling == {"temperature": 0.5} and model.seen[0].max_tokens == 9
    parts = list(client.chat(model="tiny:latest", messages=ASK, stream=True))
    assert "".join(part.message.content or "" for part in parts) == "Paris." and parts[-1].done
    assert client.generate(model="tiny", prompt="Hi", system="Be brief.").response == "Paris."
    assert model.seen[-1].prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    client.generate(model="tiny", prompt="Once", raw=True, format="json")
    assert (model.seen[-1].prompt, model.seen[-1].grammar) == ("Once", ("json_object", ""))
    model.words = [CALL]
    called = client.chat(model="tiny", messages=ASK, tools=[TOOL])
    assert called.message.tool_calls is not None
    assert called.message.tool_calls[0].function.arguments == {"city": "北京"}
    assert [m.model for m in client.list().models] == ["tiny:latest"]
    assert [m.model for m in client.ps().models] == ["tiny:latest"]
    assert client.show("tiny").modelinfo is not None
    assert httpx.post(f"{address}/api/show", json={"model": "tiny", "name": "tiny"}).status_code == 200
    assert httpx.get(f"{address}/api/version").json()["version"]
    with pytest.raises(ollama.ResponseError, match="not served"):
        client.chat(model="other", messages=ASK)


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_is_asked_to_load_a_model(address: str, model: ScriptedModel, stream: bool) -> None:
    """By an empty prompt, as its documentation says; nothing is generated, and no field goes unread."""
    client = ollama.Client(host=address)
    with client._client:
        for made in (
            client.generate(model="tiny", stream=stream),
            client.generate(model="tiny", prompt="", system="Be brief.", raw=True, keep_alive="5m", stream=stream),
            client.chat(model="tiny", stream=stream),
            client.chat(model="tiny", messages=[], stream=stream),
        ):
            (told,) = made if stream else (made,)
            assert (told.done, told.done_reason, told.eval_count) == (True, "load", None)
            assert (told.response if isinstance(told, ollama.GenerateResponse) else told.message.content) == ""
        with pytest.raises(ollama.ResponseError, match="not served"):
            client.generate(model="other")
        with pytest.raises(ollama.ResponseError, match="temperature"):
            client.generate(model="tiny", options={"temperature": 999}, stream=False)
    assert model.seen == []


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/chat/completions", {"messages": ASK}, ("choices", 0, "delta", "content")),
        ("/v1/completions", {"prompt": "x"}, ("choices", 0, "text")),
        ("/v1/responses", {"input": "x"}, ("delta",)),
        ("/v1/messages", {"messages": ASK[1:], "max_tokens": 9}, ("delta", "text")),
        ("/api/chat", {"messages": ASK}, ("message", "content")),
        ("/api/generate", {"prompt": "x"}, ("response",)),
    ],
)
def test_no_character_of_an_answer_ends_a_line_of_its_stream(
    address: str, model: ScriptedModel, path: str, body: dict[str, Any], place: tuple[Any, ...]
) -> None:
    """Clients cut a stream at whatever Unicode calls a line's end, Ollama's and everybody with httpx."""
    model.words = ["a\x0b", "\x1c\x85b", "\u2028 百😀\u2029"]
    said = ""
    with httpx.stream("POST", address + path, json=body | {"stream": True}) as answer:
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if data.startswith("{"):
                said += str(_at(json.loads(data), place) or "")
            else:
                assert not data or data == "[DONE]" or data.startswith("event: "), line
    assert said == "".join(model.words)


def _at(found: Any, place: tuple[Any, ...]) -> Any:
    """What stands at a place of a JSON value; None where there is nothing."""
    for step in place:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            return None
    return found


def test_a_stream_that_breaks_says_so(address: str, client: openai.OpenAI, model: ScriptedModel) -> None:
    """As each client expects it, and without what went wrong inside."""
    model.breaks = True
    asked: Any = ASK[1:]
    inside = "something went wrong inside the server"
    with pytest.raises(openai.APIError, match=inside):
        list(client.chat.completions.create(model="tiny", messages=asked, stream=True))
    with pytest.raises(openai.APIError, match=inside):
        list(client.responses.create(model="tiny", input="Hi", stream=True))
    other = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
    with other, pytest.raises(anthropic.APIError, match=inside):
        list(other.messages.create(model="tiny", max_tokens=9, messages=asked, stream=True))
    third = ollama.Client(host=address)
    with third._client, pytest.raises(ollama.ResponseError, match=inside):
        list(third.chat(model="tiny", messages=asked, stream=True))
    assert model.closed == 4


def test_sessions(tmp_path: Path) -> None:
    talk = [*ASK, {"role": "assistant", "content": "Paris."}]
    model, folder = ScriptedModel(), tmp_path / "saved"
    folder.mkdir()
    (folder / "notes.txt").write_text("not ours")
    with (
        running(model, options=ServerOptions(sessions=folder)) as address,
        httpx.Client(base_url=address) as http,
    ):
        saved = http.put("/sessions/对话-1", json={"messages": talk}).json()
        assert (saved["name"], saved["tokens"]) == ("对话-1", 3) and saved["bytes"] > 0
        assert [s["name"] for s in http.get("/sessions").json()["sessions"]] == ["对话-1"]
        restored = http.post("/sessions/对话-1/restore", json={"model": "tiny"}).json()
        assert restored == {"name": "对话-1", "messages": talk, "tokens": 3}
        for name in ("..", "a%2Fb", ".hidden", "x" * 49, "..%2Fnotes.txt", "a b", "%00"):
            for method in ("PUT", "DELETE"):
                answer = http.request(method, f"/sessions/{name}", json={"messages": talk})
                assert answer.status_code in (400, 404, 405) and answer.json()["error"]["message"], name
        missing = http.post("/sessions/absent/restore", json={})
        assert missing.status_code == 404 and "there is no session 'absent'" in missing.text
        assert http.delete("/sessions/对话-1").json() == {"deleted": "对话-1"}
        assert http.delete("/sessions/对话-1").status_code == 404
        assert [path.name for path in folder.iterdir()] == ["notes.txt"] and not (tmp_path / "notes.txt").exists()


def test_sessions_are_off_by_default(address: str) -> None:
    answer = httpx.put(f"{address}/sessions/a", json={"messages": ASK})
    assert answer.status_code == 404 and "--sessions FOLDER" in answer.json()["error"]["message"]


def test_models_and_services(address: str, client: openai.OpenAI) -> None:
    listed: Any = client.models.list().data[0]
    assert (listed.id, listed.context_length) == ("tiny", CONTEXT)
    assert client.models.retrieve("tiny").id == "tiny"
    post = httpx.post
    assert post(f"{address}/tokenize", json={"content": "hé", "add_special": True}).json() == {
        "tokens": [1, 104, 195, 169]
    }
    assert post(f"{address}/detokenize", json={"tokens": [104, 195, 169]}).json() == {"content": "hé"}
    rendered = post(f"{address}/apply-template", json={"messages": ASK}).json()
    assert rendered["prompt"] == "Be brief.Capital of France?"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    for path in ("/health", "/", "/props", "/v1/models", "/v1/models/tiny", "/metrics", "/api/tags", "/api/version"):
        head = httpx.head(address + path)
        assert (head.status_code, head.content) == (200, b""), path
    assert httpx.head(f"{address}/v1/models/other").status_code == 404
    assert httpx.get(f"{address}/props").json()["models"]["tiny"]["context_length"] == CONTEXT
    client.chat.completions.create(model="tiny", messages=ASK)
    text = httpx.get(f"{address}/metrics").text
    assert re.search(r'headrace_requests_total\{route="/v1/chat/completions",status="200"\} [1-9]', text)
    assert httpx.get(f"{address}/openapi.json").json()["paths"]["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 99}, "n is 99"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "expected auto, none, required or a function"),
        ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "expected auto, none, required or a function"),
        ({"tool_choice": "required"}, "tool_choice is 'required'; expected a function of tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TOOL]}, "tool_choice is 'x'"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, r"logit_bias names token '9+\.+9+'; expected a token id"),
        ({"logit_bias": {"5": 10**4000}}, "logit_bias adds 1000+"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"model": "other"}, "not served here; expected tiny"),
    ],
)
def test_what_is_wrong_is_named(address: str, change: dict[str, Any], field: str) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", json={"model": "tiny", "messages": ASK} | change)
    assert answer.status_code == (404 if change.get("model") else 400)
    error = answer.json()["error"]
    assert len(error["message"].splitlines()) == 1
    assert re.search(field, error["message"]), error


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"messages": 1e999}', b"9" * 5000]
)
def test_bodies_of_anything(address: str, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/tokenize"):
        answer = httpx.post(address + path, content=body)
        assert answer.status_code == 400 and "error" in answer.json(), (path, answer.text)


def test_a_model_that_is_not_there_is_told_as_openai_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served here") as answered:
        client.chat.completions.create(model="other", messages=ASK)
    with pytest.raises(openai.NotFoundError) as listed:
        client.models.retrieve("other")
    assert answered.value.code == listed.value.code == "model_not_found"


def test_a_prompt_that_does_not_fit_says_both_numbers(address: str) -> None:
    asked = {"messages": [{"role": "user", "content": "x" * 20_000}]}
    answer = httpx.post(f"{address}/v1/chat/completions", json=asked)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert "10000" in answer.text and str(CONTEXT) in answer.text


def test_a_full_queue_says_when_to_come_back(address: str, model: ScriptedModel) -> None:
    model.full = True
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": ASK})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")


def test_keys_and_sizes() -> None:
    with running(ScriptedModel(), options=ServerOptions(api_key="schlüssel", max_body=200)) as address:
        ask = {"messages": [{"role": "user", "content": "Hi"}]}
        url = f"{address}/v1/chat/completions"
        assert httpx.post(url, json=ask).status_code == 401
        assert httpx.post(url, json=ask, headers={"Authorization": "Bearer wrong"}).status_code == 401
        told = {"Authorization": "Bearer schlüssel".encode()}
        assert httpx.post(url, json=ask, headers=told).status_code == 200
        assert httpx.post(url, json=ask, headers={"x-api-key": "schlüssel".encode()}).status_code == 200
        assert (
            httpx.post(url, json={"messages": [{"role": "user", "content": "x" * 300}]}, headers=told).status_code
            == 413
        )
        assert httpx.get(f"{address}/health").status_code == httpx.get(address).status_code == 200
        assert httpx.get(f"{address}/metrics").status_code == 401


def test_a_client_that_leaves_frees_its_slot(address: str, model: ScriptedModel) -> None:
    model.words, model.delay = ["x"] * 2000, 0.01
    body = {"messages": ASK, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/chat/completions", json={"messages": ASK}, timeout=0.2)
    deadline = time.monotonic() + 5
    while model.closed < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert model.closed == 2 and model.said < 200


def test_the_page_brings_nothing_from_outside(address: str) -> None:
    page = httpx.get(address)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text
    for name in ("app.js", "api.js", "markdown.js", "strings.js", "style.css", "icon.svg"):
        assert httpx.get(f"{address}/web/{name}").status_code == 200
    assert httpx.get(f"{address}/web/../app.py").status_code == 404
