"""Tool calls: what a required one must be, and how they are read from an answer, whole or as it streams."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.grammar import Grammars
from headrace.server.generation import Refused
from headrace.server.tools import CLOSE, OPEN, ToolText, split_calls, tool_use
from headrace.text.tokenizer_folder import load_tokenizer
from tests.text.vocabularies import byte_level_tokenizer

CLOSED: dict[str, Any] = {"type": "object", "additionalProperties": False}
PLACE = CLOSED | {"properties": {"city": {"enum": ["Wuhan", "重庆"]}}, "required": ["city"]}
NESTED = CLOSED | {"properties": {"of": {"$ref": "#/$defs/Place"}}, "required": ["of"], "$defs": {"Place": PLACE}}
RECURSIVE = CLOSED | {"properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["next"]}
WHOLE = {"$ref": "#/$defs/Place", "$defs": {"Place": PLACE}}


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    folder = tmp_path_factory.mktemp("vocabulary")
    byte_level_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


@pytest.mark.parametrize("name", ["depth", 'end "it"', "水深 %json |?*"])
@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (NESTED, [{"of": {"city": "重庆"}}], [{"of": {"city": "Rome"}}, {"of": "Wuhan"}, {}]),
        (
            RECURSIVE,
            [{"next": None}, {"next": {"next": {"next": None}}}],
            [{"next": {"name": "depth", "arguments": {"next": None}}}, {"next": {}}],
        ),
        (WHOLE, [{"city": "Wuhan"}], [{"city": "Rome"}]),
        ({}, [{}, {"x": [1]}], ["x"]),
        (CLOSED, [{}], [{"x": 1}]),
    ],
    ids=["definitions", "itself", "all of it", "anything", "nothing"],
)
def test_arguments_are_those_of_the_schema(
    grammars: Grammars, name: str, parameters: dict[str, Any], right: list[Any], wrong: list[Any]
) -> None:
    """As the function has it: what it refers to is counted from its own beginning. Another function changes nothing."""
    functions: list[dict[str, Any]] = [
        {"name": name, "parameters": parameters},
        {"name": "other", "parameters": {"type": "object", "properties": {"$defs": {"type": "null"}}}},
    ]
    use = tool_use([{"type": "function", "function": function} for function in functions], "required")
    assert use.grammar is not None
    grammar = grammars.compile(*use.grammar)

    def accepted(name: str, arguments: Any) -> bool:
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return grammar.accepts(f"<tool_call>\n{call}\n</tool_call>")

    assert all(accepted(name, arguments) for arguments in right)
    assert not any(accepted(name, arguments) for arguments in wrong)
    assert accepted("other", {"$defs": None}) and not accepted("none", {})


def test_parameters_that_are_no_schema_are_refused() -> None:
    tool = {"type": "function", "function": {"name": "depth", "parameters": "city"}}
    with pytest.raises(Refused, match="the parameters of 'depth' are 'city'; expected a schema"):
        tool_use([tool], "required")


def _call(arguments: dict[str, Any], space: str = "\n") -> str:
    return f"{OPEN}{space}{json.dumps({'name': 'f', 'arguments': arguments})}{space}{CLOSE}"


def _streamed(pieces: list[str]) -> tuple[str, list[str]]:
    stream, text, arguments = ToolText(True), "", []
    for number, piece in enumerate(pieces):
        said, calls = stream.push(piece, last=number == len(pieces) - 1)
        text += said
        arguments += [call.arguments for call in calls]
    return text, arguments


MARKED: dict[str, Any] = {"a": f'{CLOSE}"\\', "b": [f"{OPEN}{{", 1.5]}


@pytest.mark.parametrize(
    ("answer", "text", "arguments"),
    [
        (_call(MARKED), "", [MARKED]),
        (_call(MARKED, space=""), "", [MARKED]),
        (f"Well.\n{_call({})}\n{_call(MARKED)}\n", "Well.", [{}, MARKED]),
        (f"Well. {_call({})}\nDone. ", "Well. \nDone.", [{}]),
        (f"\n{_call({})}\nDone.", "Done.", [{}]),
        (f"{OPEN}{_call({})}", OPEN, [{}]),
        (f"{OPEN}no call{CLOSE} {_call({})}", f"{OPEN}no call{CLOSE}", [{}]),
        (f'{OPEN}{{"name": "f{CLOSE} {_call({})}', f'{OPEN}{{"name": "f{CLOSE}', [{}]),
        (f'{OPEN}["f"]{CLOSE}', f'{OPEN}["f"]{CLOSE}', []),
        (f'{OPEN}{{"name": "f"}} and{CLOSE}', f'{OPEN}{{"name": "f"}} and{CLOSE}', []),
        (f'{OPEN}{{"name": "f", "arguments": {{"a": {"9" * 5000}}}}}{CLOSE}', None, []),
        (f"{OPEN}{'[' * 100_000}{CLOSE}", None, []),
        (_call({})[:-1], None, []),
        (" No call.\n", None, []),
    ],
    ids=lambda value: str(value)[:40],
)
def test_calls_are_taken_out_of_the_text(answer: str, text: str | None, arguments: list[Any]) -> None:
    """None: all of it stays."""
    said, calls = split_calls(answer)
    assert said == (answer if text is None else text)
    assert [json.loads(call.arguments) for call in calls] == arguments


@given(
    st.lists(st.sampled_from([OPEN, CLOSE, _call({}), _call(MARKED), '{"name": "f"}', *'{}[]"\\,:1 \nx<'])), st.data()
)
def test_an_answer_is_the_same_however_it_streams(parts: list[str], data: st.DataObject) -> None:
    answer = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)))))
    text, calls = split_calls(answer)
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert _streamed(pieces) == _streamed(list(answer) or [""]) == (text, [call.arguments for call in calls])


def test_what_is_no_call_is_told_as_soon_as_that_is_certain() -> None:
    stream = ToolText(True)
    assert stream.push(f"Write {OPEN}a call{CLOSE} around it", last=False)[0] == f"Write {OPEN}a call{CLOSE} around it"
    assert stream.push(f' or{OPEN}{{"name": "{CLOSE}', last=False) == (" or", [])
