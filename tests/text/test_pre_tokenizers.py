"""How each family's vocabulary cuts a text, against words cut by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from headrace.text.pre_tokenizers import PRE_TOKENIZERS
from tests.text.vocabularies import byte_level_tokenizer

# Each family once: the test below sees that none is missing.
WORDS = {
    "gpt-2": ("it's 2024  ok!", ["it", "'s", " 2024", " ", " ok", "!"]),
    "smollm": ("it's 2024  ok!", ["it", "'s", " ", "2", "0", "2", "4", " ", " ok", "!"]),
    "default": ("a=1234 $b", ["a", "=", "123", "4", " ", "$", "b"]),
    "falcon": ("a=`1234 $b", ["a", "=`", "123", "4", " ", "$", "b"]),
    "llama-bpe": ("IT'S 12345\n\n x?!\n", ["IT", "'S", " ", "123", "45", "\n\n", " x", "?!\n"]),
    "smaug-bpe": ("IT'S 12345\n\n x?!\n", ["IT", "'S", " ", "123", "45", "\n\n", " x", "?!\n"]),
    "qwen2": ("don't 123 (ok)", ["don", "'t", " ", "1", "2", "3", " (", "ok", ")"]),
    "seed-coder": ("a 12;\n\nb", ["a", " ", "1", "2", ";", "\n\n", "b"]),
    "minicpm5": ("it's 12345;\n", ["it", "'s", " ", "123", "45", ";\n"]),
    "tekken": (
        "camelCase HTTPServer it's 123\n//\n/x",
        ["camel", "Case", " HTTPServer", " it", "'s", " ", "1", "2", "3", "\n", "//\n/", "x"],
    ),
    "gpt-4o": ("camelCase it's 12345", ["camel", "Case", " it's", " ", "123", "45"]),
    "deepseek-llm": (
        "it's 12\n\nλ aա! 你好。Ok 𝐀b",
        ["it", "'", "s", " ", "12", "\n", "\n", "λ", " a", "ա", "!", " ", "你好", "。", "Ok", " 𝐀", "b"],
    ),
    "deepseek-coder": ("it's 12\n你好。x=1", ["it", "'", "s", " ", "1", "2", "\n", "你好", "。", "x", "=", "1"]),
    "deepseek-v3": ("it's 12345 你好x.y\n", ["it", "'s", " ", "123", "45", " ", "你好", "x", ".y", "\n"]),
}


def words(folder: Path, pre: str, text: str) -> list[str]:
    byte_level_tokenizer(folder, pre=pre)
    cutter = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer
    assert cutter is not None
    return [text[a:b] for _, (a, b) in cutter.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", WORDS)
def test_each_family_cuts_as_published(tmp_path: Path, pre: str) -> None:
    text, expected = WORDS[pre]
    assert words(tmp_path, pre, text) == expected


def test_every_family_is_tested() -> None:
    tested = {PRE_TOKENIZERS[pre].patterns for pre in WORDS}
    assert {pre.patterns for pre in PRE_TOKENIZERS.values()} == tested


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_the_text(tmp_path: Path, pre: str) -> None:
    tokenizer = byte_level_tokenizer(tmp_path, pre=pre)
    text = "  it's 12345\n\n\tdef f(x):  # 百川 😀é   "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_that_is_a_token_needs_no_joins(tmp_path: Path) -> None:
    """Smaug's files, which Llama-3-8B's were called for a time, join bytes; Llama 3's take a whole word first."""
    from tests.text.vocabularies import byte_level_metadata

    metadata = byte_level_metadata()
    pieces, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    changes = {"tokens": [*pieces, "full"], "token_type": [*kinds, 1]}  # no join leads to it
    whole = byte_level_tokenizer(tmp_path, pre="llama-bpe", **changes)
    assert whole.encode("full") == [len(pieces)]
    joined = byte_level_tokenizer(tmp_path, pre="smaug-bpe", **changes)
    assert joined.encode("full") == [pieces.index(c) for c in "full"]


def test_who_begins_with_bos(tmp_path: Path) -> None:
    for pre, begins in (("tekken", True), ("falcon3", True), ("smaug-bpe", False), ("deepseek-llm", False)):
        assert byte_level_tokenizer(tmp_path, pre=pre, add_bos_token=None).add_bos is begins
