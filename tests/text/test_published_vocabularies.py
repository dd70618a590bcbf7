"""Published vocabularies of GGUF files against the ids their own tokenizers gave (llama.cpp's test vectors).

The files come from PyPI, in llama-cpp-python's source distribution; run on request: pytest -m reference.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.checkpoint.gguf_file import read_gguf
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer

pytestmark = pytest.mark.reference

VOCABULARIES = (
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3",
    "qwen2", "refact", "starcoder",
)  # fmt: skip
BETWEEN = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="module")
def opened(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = {}
    for name in VOCABULARIES:
        out = tmp_path_factory.mktemp(name)
        save_tokenizer(out, dict(read_gguf(published / f"ggml-vocab-{name}.gguf").metadata), out)
        found[name] = load_tokenizer(out)
    return found


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_vector(published: Path, opened: dict[str, Tokenizer], name: str) -> None:
    texts = (published / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split(BETWEEN)
    lines = (published / f"ggml-vocab-{name}.gguf.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) >= 47
    for text, line in zip(texts, lines):
        assert opened[name].encode(text) == [int(i) for i in line.split()], text


@pytest.mark.parametrize("name", VOCABULARIES)
def test_text_comes_back(published: Path, opened: dict[str, Tokenizer], name: str) -> None:
    import unicodedata

    text = (published / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8")
    expected = unicodedata.normalize("NFC", text) if name == "qwen2" else text
    assert opened[name].decode(opened[name].encode(text)) == expected
