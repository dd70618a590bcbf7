"""Each dialect through its own real client, against a scripted model: bodies read, answers and streams understood."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from headrace.server.door import ServerOptions
from tests.server.scripted import CONTEXT, ScriptedModel, running

ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "", "parameters": WEATHER}}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ScriptedModel, str]]:
    model = ScriptedModel()
    with running(model) as address:
        yield model, address


@pytest.fixture
def model(served: tuple[ScriptedModel, str]) -> ScriptedModel:
    """The served model, as new."""
    vars(served[0]).update(vars(ScriptedModel()))
    return served[0]


@pytest.fixture
def address(served: tuple[ScriptedModel, str], model: ScriptedModel) -> str:
    return served[1]


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openai_chat_whole(client: openai.OpenAI, model: ScriptedModel) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0.5, top_p=0.9, max_tokens=9, stop=["!"], seed=3, logit_bias={"5": -100}
    )
    assert made.choices[0].message.content == "Paris."
    assert (made.choices[0].finish_reason, made.model) == ("stop", "tiny")
    assert made.usage is not None and made.usage.prompt_tokens_details is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (7, 3, 10)
    assert made.usage.prompt_tokens_details.cached_tokens == 3
    asked = model.seen[0]
    assert asked.prompt == ASK
    assert asked.sampling == {"temperature": 0.5, "top_p": 0.9, "seed": 3, "logit_bias": {5: -100.0}}
    assert (asked.max_tokens, asked.stop) == (9, ("!",))


def test_openai_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris."
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 10
    assert len({c.id for c in chunks}) == 1
    assert all(c.to_dict()["usage"] is None for c in chunks[:-1])
    chunks = list(client.chat.completions.create(model="tiny", messages=ASK, stream=True))
    assert not any("usage" in c.to_dict() for c in chunks)


def test_openai_async(address: str) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as made:
            stream = await made.chat.completions.create(model="tiny", messages=ASK, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    assert asyncio.run(ask()) == "Paris."


def test_openai_several_answers_with_logprobs(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="tiny", messages=ASK, n=3, logprobs=True, top_logprobs=2)
    assert [c.message.content for c in made.choices] == ["Paris."] * 3
    told = made.choices[2].logprobs
    assert told is not None and told.content is not None
    assert [t.token for t in told.content] == ["Par", "is", "."]
    assert [t.token for t in told.content[0].top_logprobs] == ["Par", "x"]


def test_openai_tools(client: openai.OpenAI, model: ScriptedModel) -> None:
    model.words = ["Let me", " see. <to", *CALL[3:]]
    made = client.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL])
    message = made.choices[0].message
    assert message.content == "Let me see." and made.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "北京"})
    assert model.seen[0].tools == (TOOL,)
    after: list[Any] = [*ASK, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    client.chat.completions.create(model="tiny", messages=after, tools=[TOOL])
    asked: Any = model.seen[1].prompt
    assert asked[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "北京"}}
    assert asked[3] == {"role": "tool", "content": "rain", "tool_call_id": call.id}


def test_openai_tools_stream(client: openai.OpenAI, model: ScriptedModel) -> None:
    model.words = ["Let me", " see. <to", *CALL[3:]]
    text, names, arguments, finish = "", [], "", None
    for chunk in client.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL], stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            names.append(call.function.name)
            arguments += call.function.arguments or ""
        finish = choice.finish_reason or finish
    assert (text.strip(), names, finish) == ("Let me see.", ["weather"], "tool_calls")
    assert json.loads(arguments) == {"city": "北京"}


def test_a_call_can_be_required(address: str, client: openai.OpenAI, model: ScriptedModel) -> None:
    """By each dialect's words for it; `none` keeps the tools from the model."""
    model.words = [CALL]
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        client.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL], tool_choice=choice)
    flat: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": None}
    for choice in ("required", {"type": "function", "name": "weather"}):
        client.responses.create(model="tiny", input="Weather?", tools=[flat], tool_choice=choice)
    theirs: Any = {"name": "weather", "input_schema": WEATHER}
    asked: Any = ASK[1:]
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as other:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            other.messages.create(model="tiny", max_tokens=9, messages=asked, tools=[theirs], tool_choice=choice)
        with pytest.raises(anthropic.BadRequestError, match="expected type auto, any, tool or none"):
            wrong: Any = {"type": []}
            other.messages.create(model="tiny", max_tokens=9, messages=asked, tools=[theirs], tool_choice=wrong)
    grammars = {request.grammar for request in model.seen}
    assert len(model.seen) == 6 and len(grammars) == 1
    (grammar,) = grammars
    assert grammar is not None and grammar[0] == "lark" and json.dumps(WEATHER)[1:-1] in grammar[1]
    client.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL], tool_choice="none")
    assert (model.seen[-1].tools, model.seen[-1].grammar) == ((), None)


@pytest.mark.parametrize(
    ("path", "form", "wrong"),
    [
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, {"response_format": {"type": "xml"}}),
        ("/v1/responses", {"text": {"format": {"type": "text"}}}, {"text": {"format": {"type": "xml"}}}),
        ("/api/chat", {"format": "json"}, {"format": "xml"}),
    ],
)
def test_a_form_beside_a_required_call(
    address: str, model: ScriptedModel, path: str, form: dict[str, Any], wrong: dict[str, Any]
) -> None:
    """It is about what is said, and the call is what is asked for; one that is none is refused all the same."""
    flat = {"type": "function", "name": "weather", "parameters": WEATHER}
    asked = {"input": "Weather?", "tools": [flat]} if "responses" in path else {"messages": ASK, "tools": [TOOL]}
    asked |= {"tool_choice": "required"}
    assert httpx.post(address + path, json=asked | form).status_code == 200
    assert model.seen[-1].grammar is not None and model.seen[-1].grammar[0] == "lark"
    told = httpx.post(address + path, json=asked | wrong)
    assert told.status_code == 400 and "'xml'; expected" in told.text


def test_openai_schema(client: openai.OpenAI, model: ScriptedModel) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": WEATHER}}
    client.chat.completions.create(model="tiny", messages=ASK, response_format=schema)
    client.chat.completions.create(model="tiny", messages=ASK, response_format={"type": "json_object"})
    assert model.seen[0].grammar == ("json_schema", json.dumps(WEATHER))
    assert model.seen[1].grammar == ("json_object", "")


def test_openai_completions(client: openai.OpenAI, model: ScriptedModel) -> None:
    made = client.completions.create(model="tiny", prompt="Once", echo=True, logprobs=1)
    assert made.choices[0].text == "OnceParis."
    assert made.choices[0].logprobs is not None and made.choices[0].logprobs.tokens == ["Par", "is", "."]
    stream = client.completions.create(model="tiny", prompt=[1, 2, 3], stream=True)
    assert "".join(c.choices[0].text for c in stream) == "Paris."
    stream = client.completions.create(model="tiny", prompt=["Once"], echo=True, stream=True)
    assert "".join(c.choices[0].text for c in stream) == "OnceParis."
    client.completions.create(model="tiny", prompt=[[1, 2]], max_tokens=0)
    assert [r.prompt for r in model.seen] == ["Once", [1, 2, 3], "Once", [1, 2]]
    assert [r.max_tokens for r in model.seen] == [16, 16, 16, 0]
    for several in ([], ["a", "b"], [[1], [2]], [[]], [1, "a"], [["a"]], [True]):
        with pytest.raises(openai.BadRequestError, match="expected one text or list of token ids"):
            client.completions.create(model="tiny", prompt=several)  # type: ignore[arg-type]


def test_a_list_of_one_prompt_is_that_prompt(address: str, model: ScriptedModel) -> None:
    for prompt in ("Once", [1, 2, 3]):
        assert httpx.post(f"{address}/v1/completions", json={"prompt": [prompt]}).status_code == 200
        assert model.seen[-1].prompt == prompt
    for wrong in (["a", "b"], [[1], [2]], [[]], [[[1]]], [["a"]], [], [True]):
        told = httpx.post(f"{address}/v1/completions", json={"prompt": wrong})
        assert told.status_code == 400 and "expected one text or list of token ids" in told.text, wrong


SAMPLED = {
    "/v1/chat/completions": {"messages": ASK},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"max_tokens": 9, "messages": ASK[1:]},
    "/api/chat": {"messages": ASK},
}


@pytest.mark.parametrize("path", SAMPLED)
def test_no_probability_and_any_seed_are_taken(address: str, model: ScriptedModel, path: str) -> None:
    """As OpenAI takes them; a seed of -1 asks Ollama for a new one."""
    least, most = -(1 << 63), (1 << 63) - 1
    for seed in (least, -1, most) if path not in ("/v1/responses", "/v1/messages") else (None,):
        wanted = {"top_p": 0, "seed": seed}
        told = httpx.post(address + path, json=SAMPLED[path] | ({"options": wanted} if "/api/" in path else wanted))
        assert told.status_code == 200, told.text
        given = None if "/api/" in path and seed == -1 else seed
        assert model.seen[-1].sampling == {"top_p": 0} | ({} if given is None else {"seed": given})


def test_openai_responses(client: openai.OpenAI, model: ScriptedModel) -> None:
    made = client.responses.create(model="tiny", input="Capital of France?", instructions="Be brief.")
    assert (made.output_text, made.status) == ("Paris.", "completed")
    assert made.usage is not None and made.usage.input_tokens_details.cached_tokens == 3
    assert model.seen[0].prompt == ASK
    with client.responses.stream(model="tiny", input=[{"role": "user", "content": "Hi"}]) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "Paris."
    model.finish = "length"
    assert client.responses.create(model="tiny", input="Hi", max_output_tokens=3).status == "incomplete"


def test_openai_responses_tools(client: openai.OpenAI, model: ScriptedModel) -> None:
    model.words = [CALL]
    tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": None}
    made = client.responses.create(model="tiny", input="Weather?", tools=[tool])
    call: Any = next(item for item in made.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "北京"})
    after: list[Any] = [
        {"role": "user", "content": "Weather?"},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    with client.responses.stream(model="tiny", input=after, tools=[tool]) as stream:
        kinds = [event.type for event in stream]
    assert "response.function_call_arguments.done" in kinds
    asked: Any = model.seen[1].prompt
    assert [m["role"] for m in asked] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("words", [[CALL], ["Well. ", CALL], [CALL, "Done."], ["Par", "is."], [""]])
def test_a_stream_says_what_a_whole_answer_does(
    address: str, client: openai.OpenAI, model: ScriptedModel, words: list[str]
) -> None:
    """A call alone has no message beside it."""
    model.words = words
    flat: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}

    def told(output: Any) -> list[Any]:
        return [item.arguments if item.type == "function_call" else item.content[0].text for item in output]

    whole = client.responses.create(model="tiny", input="Weather?", tools=[flat])
    with client.responses.stream(model="tiny", input="Weather?", tools=[flat]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert told(final.output) == told(whole.output)
    opened = [event.item.type for event in events if event.type == "response.output_item.added"]
    assert opened == [item.type for item in whole.output]
    theirs: Any = {"name": "weather", "input_schema": WEATHER}
    asked: Any = {"model": "tiny", "max_tokens": 9, "messages": ASK[1:], "tools": [theirs]}
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as other:
        with other.messages.stream(**asked) as messages:
            streamed = messages.get_final_message().content
        blocks: Any = (streamed, other.messages.create(**asked).content)
    one, two = ([b.text if b.type == "text" else (b.name, b.input) for b in content] for content in blocks)
    assert one == two


@pytest.mark.parametrize("choice", ["auto", "none", "required", {"type": "function", "name": "weather"}])
def test_a_response_tells_how_tools_were_asked_for(client: openai.OpenAI, model: ScriptedModel, choice: Any) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    made = client.responses.create(model="tiny", input="Weather?", tools=[tool], tool_choice=choice)
    assert made.to_dict()["tool_choice"] == choice and made.to_dict()["tools"] == [tool]


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
        ({"logit_bias": {"9" * 5000: 1}}, r"logit_bias has '9+\.+9+': 1; expected token ids"),
        ({"logit_bias": {"5": 10**4000}}, "logit_bias has '5': 1000+"),
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
