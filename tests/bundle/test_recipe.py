"""Recipes: first match wins, nothing is left unsaid, and every mistake is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.bundle.recipe import Recipe, Rule, load_recipe, parse_block, shipped_recipes
from headrace.errors import RecipeError

NAMES = ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight", "lm_head.weight"]
TABLES = Rule("embed_tokens|lm_head", 8, None, "nearest")
DOWN = Rule(r"down_proj", 8, 32, "nearest")
LINEARS = Rule(r"_proj", 4, None, "gptq")


def test_first_match_wins() -> None:
    chosen = Recipe("r", (TABLES, DOWN, LINEARS)).resolve(NAMES)
    assert list(chosen) == NAMES
    assert [chosen[name] for name in NAMES] == [TABLES, LINEARS, DOWN, TABLES]


def test_a_weight_without_a_rule() -> None:
    with pytest.raises(RecipeError, match=r"recipe .r. has no rule for layers\.0\.self_attn\.q_proj\.weight"):
        Recipe("r", (TABLES, DOWN)).resolve(NAMES)


@pytest.mark.parametrize("rules", [(LINEARS, DOWN, TABLES), (TABLES, LINEARS, Rule("layers.99", 8, None, "nearest"))])
def test_a_rule_that_matches_nothing(rules: tuple[Rule, ...]) -> None:
    with pytest.raises(RecipeError, match="matches no weight that is left by the rules before it") as error:
        Recipe("r", rules).resolve(NAMES)
    number = 2 if rules[1] == DOWN else 3
    assert f"rule {number} of recipe 'r', {rules[number - 1].match!r}" in str(error.value)


def test_other_blocks_and_methods_are_for_linears_of_less_than_eight_bits() -> None:
    linears, recipe = NAMES[1:3], Recipe("r", (TABLES, DOWN, LINEARS))
    changed = recipe.with_linears(linears, block=64, method="nearest")
    assert changed.rules == (TABLES, DOWN, Rule("_proj", 4, 64, "nearest", lpbq=True))
    assert changed.with_linears(linears, block=None).rules[2].block is None
    assert recipe.with_linears(linears) == recipe
    six = Recipe("r", (TABLES, DOWN, Rule("_proj", 6, 32, "gptq")))
    assert six.with_linears(linears, block=64, method="best").rules[2] == Rule("_proj", 6, 64, "best", lpbq=True)
    with pytest.raises(RecipeError, match="6 bits are for blocks; expected a block, such as 32, or 4 or 8 bits"):
        six.with_linears(linears, block=None)
    # Tables of less than 8 bits keep their rule, and what comes after it is the linears' even where it fits tables too.
    tables = Recipe("r", (Rule("embed_tokens|lm_head", 6, 32, "nearest"), Rule(".", 4, None, "gptq")))
    assert tables.with_linears(linears, block=64).rules == (tables.rules[0], Rule(".", 4, 64, "gptq", lpbq=True))


def test_json_and_back() -> None:
    recipe = Recipe("r", (TABLES, DOWN, Rule("q_proj", 4, 32, "gptq", lpbq=True), LINEARS), "float32")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_parse(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.kv == "int8"


def test_what_the_shipped_ones_say() -> None:
    assert {"w4a16", "w4b32"} <= set(shipped_recipes())
    for name, block in (("w4a16", None), ("w4b32", 32)):
        chosen = load_recipe(name).resolve(NAMES)
        assert [(chosen[n].bits) for n in NAMES] == [8, 4, 4, 8]
        assert chosen[NAMES[1]].block == block


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rules": []}, "has no rules"),
        ({}, "'rules' is NoneType; expected a list"),
        ({"rules": {}}, "'rules' is dict; expected a list"),
        ({"rules": [3]}, "rule 1 is 3; expected an object"),
        ({"rules": [{"match": "x"}]}, "rule 1 lacks 'match' or 'bits'"),
        ({"rules": [{"match": "x", "bits": 7}]}, "bits 7 is not possible; expected 4, 5, 6 or 8"),
        ({"rules": [{"match": "x", "bits": 5}]}, "5 bits are for blocks; expected a block, such as 32, or 4 or 8 bits"),
        ({"rules": [{"match": "x", "bits": "4"}]}, "bits 4 is not possible; expected 4, 5, 6 or 8"),
        ({"rules": [{"match": "(", "bits": 4}]}, "rule '(' is not a regular expression"),
        ({"rules": [{"match": "x", "bits": 4, "blok": 32}]}, "unknown key 'blok'; did you mean 'block'?"),
        ({"rules": [{"match": "x", "bits": 4, "block": 33}]}, "block 33 is not possible; expected channel, 16"),
        ({"rules": [{"match": "x", "bits": 4, "block": "row"}]}, "block 'row' is not possible"),
        ({"rules": [{"match": "x", "bits": 4}], "kv": "int4"}, "kv 'int4' is unknown; expected int8 or float32"),
        ({"rules": [{"match": "x", "bits": 4, "block": 32, "lpbq": 1}]}, "rule 1: lpbq is 1; expected true or false"),
        (
            {"rules": [{"match": "x", "bits": 8, "block": 32, "lpbq": True}]},
            "LPBQ scales are for blocks of 4, 5 or 6 bits",
        ),
        ({"rules": [{"match": "x", "bits": 4}], "rotate": "yes"}, "rotate is 'yes'; expected true or false"),
        ({"rule": []}, "unknown key 'rule'; did you mean 'rules'?"),
    ],
)
def test_mistakes(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe 'w4a61' is neither a shipped one \(.*w4a16.*\) nor a file; did you"):
        load_recipe("w4a61")
    path = tmp_path / "mine.json"
    for content, message in (("[]", "holds a list; expected a JSON object"), ("{", "expected a JSON object")):
        path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="expected a JSON object"):
        load_recipe(str(path))


def test_blocks_in_words() -> None:
    assert [parse_block(b) for b in ("channel", None, "32", 32)] == [None, None, 32, 32]
    with pytest.raises(RecipeError, match="block 'row' is not possible; expected channel, 16, 32, 64, 128 or 256"):
        parse_block("row")
