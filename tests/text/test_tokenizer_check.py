"""Bombs in a tokenizer.json are named before the library reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import TokenizerError
from headrace.text.pre_tokenizers import PRE_TOKENIZERS
from headrace.text.tokenizer_folder import load_tokenizer
from tests.text.vocabularies import byte_level_metadata, byte_level_tokenizer


def _split(expression: str) -> Callable[[Any], Any]:
    step = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return lambda raw: raw["pre_tokenizer"]["pretokenizers"].insert(0, step)


def _normalize(*steps: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda raw: raw.update(normalizer={"type": "Sequence", "normalizers": list(steps)})


TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
UNDEFINED = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
             "special_tokens": {}}  # fmt: skip
BOMBS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tries for ever": (_split("(a+)+$"), "repeats what repeats"),
    "tries for ever by ways": (_split("(?:a|b|ab)*c"), "repeats what repeats"),
    "tries for ever, deep": (_split("((a*))*b"), "repeats what repeats"),
    "counts far": (_split("a{1,99999}"), "counts above 1000"),
    "matches nothing": (_split(""), "has a pattern"),
    "grows without end": (_normalize(*[TENFOLD] * 12), "times longer"),
    "has many steps": (_normalize(*[{"type": "NFC"}] * 17), "more than 16 steps"),
    "has an unknown step": (_normalize({"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "'Precompiled'"),
    "is of another kind": (lambda raw: raw["model"].update(type="Unigram"), "of type 'Unigram'; expected BPE"),
    "has an id beyond all": (lambda raw: raw["model"]["vocab"].update(x=1 << 32), "has id 4294967296"),
    "has an id that is none": (lambda raw: raw["model"]["vocab"].update(x=True), "has id True"),
    "has an added id beyond all": (lambda raw: raw["added_tokens"][0].update(id=1 << 31), "has id 2147483648"),
    "puts what it does not define": (lambda raw: raw.update(post_processor=UNDEFINED), "which it does not define"),
    "makes the library abort": (lambda raw: raw["model"].update(continuing_subword_prefix="a"), "expected none"),
    "has an unknown unknown": (lambda raw: raw["model"].update(unk_token="?!"), "which is no token"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_is_one_line(tmp_path: Path, what: str) -> None:
    change, message = BOMBS[what]
    byte_level_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    change(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_familys_expressions_pass(tmp_path: Path, name: str) -> None:
    assert byte_level_tokenizer(tmp_path, pre=name).encode("the sea")


def test_an_added_id_beyond_all(tmp_path: Path) -> None:
    byte_level_tokenizer(tmp_path, **{key: byte_level_metadata()[f"tokenizer.ggml.{key}"] for key in ("pre",)})
    config = {"added_tokens_decoder": {"100000000000": {"content": "x"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="expected id: token"):
        load_tokenizer(tmp_path)
