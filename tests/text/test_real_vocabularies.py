"""Real vocabularies against their definitions: the embedded model's byte-level one, and Baichuan's in both forms."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings

from headrace.checkpoint.gguf_file import read_gguf
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer
from headrace.text.tokenizer_json import byte_alphabet
from tests.text.vocabularies import ANY_TEXT


def gguf_metadata(path: Path) -> dict[str, Any]:
    """A GGUF file's metadata."""
    return dict(read_gguf(path).metadata)


def is_letter(c: str) -> bool:
    return unicodedata.category(c)[0] == "L"


def is_number(c: str) -> bool:
    return unicodedata.category(c)[0] == "N"


def gpt2_words(text: str) -> Iterator[str]:
    """GPT-2's pattern, scanned by hand: contractions, words, numbers and signs with one space before, white space."""
    kinds = (is_letter, is_number, lambda c: not (c.isspace() or is_letter(c) or is_number(c)))
    at = 0
    while at < len(text):
        contraction = next((s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s, at)), None)
        if contraction:
            yield contraction
            at += len(contraction)
            continue
        begin = at + (text[at] == " " and at + 1 < len(text))
        kind = next((k for k in kinds if k(text[begin])), None)
        end = begin
        if kind:
            while end < len(text) and kind(text[end]):
                end += 1
        else:
            end = at
            while end < len(text) and text[end].isspace():
                end += 1
            if end < len(text) and end - at > 1:
                end -= 1  # the last space belongs to the word behind it
        yield text[at:end]
        at = end


def smollm_words(text: str) -> Iterator[str]:
    """SmolLM2: every digit on its own, GPT-2's pattern between them."""
    stretch = ""
    for c in text:
        if is_number(c):
            yield from gpt2_words(stretch)
            yield c
            stretch = ""
        else:
            stretch += c
    yield from gpt2_words(stretch)


ALPHABET = byte_alphabet()


def merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding by its definition: again and again the best neighbours everywhere."""
    parts = [ALPHABET[b] for b in word.encode()]
    while True:
        pairs = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(parts)]
        if not pairs or min(pairs) == len(ranks):
            return parts
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2: Path) -> dict[str, Any]:
    return gguf_metadata(smollm2)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_metadata: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("smollm2")
    save_tokenizer(out, smollm2_metadata, out)
    return load_tokenizer(out)


@pytest.mark.embedded
class TestSmolLM2:
    """The embedded model's vocabulary: byte-level BPE from GGUF."""

    def test_settings(self, smollm2_tokenizer: Tokenizer) -> None:
        assert smollm2_tokenizer.vocab_size == 49152
        assert (smollm2_tokenizer.bos_id, smollm2_tokenizer.eos_ids, smollm2_tokenizer.add_bos) == (1, (2,), False)
        assert smollm2_tokenizer.token_id("<|im_start|>") == 1
        assert smollm2_tokenizer.chat_template is not None
        assert not smollm2_tokenizer.drops_leading_space

    def test_known_ids(self, smollm2_tokenizer: Tokenizer) -> None:
        assert smollm2_tokenizer.encode("<|im_start|>assistant\n", special=True) == [1, 520, 9531, 198]
        assert smollm2_tokenizer.encode("Hello")[0] == 19556  # no space before a text

    def test_encoding_is_the_definitions(self, smollm2_tokenizer: Tokenizer, smollm2_metadata: dict[str, Any]) -> None:
        from pydoc_data.topics import topics

        ranks = {tuple(m.split(" ", 1)): i for i, m in enumerate(smollm2_metadata["tokenizer.ggml.merges"])}
        text = "".join(topics.values())[:20_000] + "他们在2024年说：“你好！” 😀👍🏽  it's  I'll\t\n\n  café naïve ½ ²"
        words = list(smollm_words(text))
        parts = {word: merged(word, ranks) for word in set(words)}
        expected = [part for word in words for part in parts[word]]
        assert [smollm2_tokenizer.id_to_piece(i) for i in smollm2_tokenizer.encode(text)] == expected

    @given(ANY_TEXT)
    @settings(max_examples=150, deadline=None)
    def test_text_comes_back(self, smollm2_tokenizer: Tokenizer, text: str) -> None:
        # The vocabulary itself lacks six control characters and the bytes of unassigned planes.
        lost = {"\x04", "\x06", "\x13", "\x14", "\x16", "\x1d"}
        kept = "".join(c for c in text if c not in lost and not 0x40000 <= ord(c) < 0x100000)
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(kept)) == kept


@pytest.mark.shared
class TestBaichuan:
    """Baichuan-7B's vocabulary, as SentencePiece and as GGUF."""

    def test_gguf_and_sentencepiece_are_one_vocabulary(self, shared_data: Path, tmp_path: Path) -> None:
        save_tokenizer(tmp_path, gguf_metadata(shared_data / "baichuan-7b-vocab.gguf"), tmp_path)
        ours = load_tokenizer(tmp_path)
        # The SentencePiece file here was derived without the space before a text, as the second generation has it.
        library = sentencepiece.SentencePieceProcessor(str(shared_data / "baichuan-7b-tokenizer.model"))
        assert ours.drops_leading_space
        assert ours.encode("你好") == [9875, 31213]  # as published for Baichuan-13B-Chat
        for name in ("eval_zh.txt", "eval_en.txt"):
            for line in (shared_data / name).read_text(encoding="utf-8").splitlines():
                ids = library.EncodeAsIds(" " + line) if line else []
                assert ours.encode(line) == ids
                assert ours.decode(ids) == line

    def test_tiny_baichuan2(self, shared_data: Path) -> None:
        tokenizer = load_tokenizer(shared_data / "tiny-baichuan2")
        assert tokenizer.vocab_size == 64000
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), False)
        assert tokenizer.encode("</s>", special=True) == [2]
        assert tokenizer.decode(tokenizer.encode("百川东到海 12345 😀")) == "百川东到海 12345 😀"
