"""Tool calls: what a required one must be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headrace.runtime.grammar import Grammars
from headrace.server.generation import Refused
from headrace.server.tools import tool_use
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
