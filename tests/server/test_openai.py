"""OpenAI's client against a scripted model: chat, completions and responses, whole and streamed, with tools."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.server.scripted import ASK, CALL, TOOL, WEATHER, ScriptedModel


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
