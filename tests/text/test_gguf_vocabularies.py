"""Vocabularies of GGUF files: they encode as their source does, and damaged ones are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from sentencepiece import sentencepiece_model_pb2

from headrace.errors import TokenizerError
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer
from headrace.text.tokenizer_gguf import gguf_vocabulary
from tests.text.vocabularies import ANY_TEXT, TEXT, byte_level_metadata, sentencepiece_model


@pytest.mark.parametrize("dummy_prefix", [False, True])
@given(ANY_TEXT)
@settings(max_examples=60, deadline=None)
def test_a_gguf_sentencepiece_vocabulary_encodes_as_its_source(
    tmp_path_factory: pytest.TempPathFactory, dummy_prefix: bool, text: str
) -> None:
    library, tokenizer = _gguf_copy(tmp_path_factory, dummy_prefix)
    assert tokenizer.encode(text) == library.EncodeAsIds(text)
    assert tokenizer.drops_leading_space == dummy_prefix


_COPIES: dict[bool, tuple[sentencepiece.SentencePieceProcessor, Tokenizer]] = {}


def _gguf_copy(folders: pytest.TempPathFactory, dummy_prefix: bool) -> tuple[Any, Tokenizer]:
    if dummy_prefix not in _COPIES:
        library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(dummy_prefix))
        out = folders.mktemp("gguf")
        save_tokenizer(out, sentencepiece_metadata(library, add_space_prefix=dummy_prefix), out)
        _COPIES[dummy_prefix] = library, load_tokenizer(out)
    return _COPIES[dummy_prefix]


def sentencepiece_metadata(library: Any, **changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary as GGUF metadata."""
    ids = range(library.GetPieceSize())
    kinds = [2 if library.IsUnknown(i) else 3 if library.IsControl(i) else 6 if library.IsByte(i) else 1 for i in ids]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [library.IdToPiece(i) for i in ids],
        "tokenizer.ggml.scores": [library.GetScore(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize(("size", "first"), [(64_000, True), (64_256, True), (125_696, False), (125_760, False)])
def test_a_space_before_a_text_of_the_first_baichuan(size: int, first: bool) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    metadata = sentencepiece_metadata(library) | {"general.architecture": "baichuan"}
    more = size - library.GetPieceSize()
    for key, value in (("tokens", ""), ("scores", 0.0), ("token_type", 5)):
        metadata[f"tokenizer.ggml.{key}"] = [*metadata[f"tokenizer.ggml.{key}"], *[value] * more]
    _, content, _ = gguf_vocabulary(metadata)
    assert sentencepiece_model_pb2.ModelProto.FromString(content).normalizer_spec.add_dummy_prefix == first


def test_a_gguf_sentencepiece_vocabulary_with_padding_and_a_loose_end(tmp_path: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    metadata = sentencepiece_metadata(library)
    size = library.GetPieceSize()
    metadata["tokenizer.ggml.tokens"] += ["", "<|end|>", "<|end|>"]
    metadata["tokenizer.ggml.scores"] += [0.0] * 3
    metadata["tokenizer.ggml.token_type"] += [5, 1, 5]
    metadata["tokenizer.ggml.eot_token_id"] = size + 1
    save_tokenizer(tmp_path, metadata, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.eos_ids == (2, size + 1)
    assert tokenizer.encode("sea<|end|>", special=True)[-1] == size + 1
    assert tokenizer.encode("sea<|end|>")[-1] != size + 1
    assert tokenizer.piece_bytes(size + 1) == b""
    assert tokenizer.add_bos  # what llama files do when they do not say
    assert tokenizer.drops_leading_space


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; expected one of llama, gpt2"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "smolm"}, "tokenizer.ggml.pre is 'smolm'; expected one of .*did you mean 'smollm'"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b c"]}, "expected two tokens that make a third"),
        ({"merges": ["xyz"]}, "expected two tokens that make a third"),
        ({"add_bos_token": 1}, "add_bos_token is 1; expected true or false"),
        ({"add_space_prefix": True}, "expected false for a byte-level vocabulary"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000; expected 0"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.0]}, "scores has 1 entries"),
    ],
)
def test_damaged_gguf_vocabularies_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        save_tokenizer(tmp_path, byte_level_metadata(**changes), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_gguf_sentencepiece_vocabulary_needs_its_unknown_token(tmp_path: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    metadata = sentencepiece_metadata(library)
    metadata["tokenizer.ggml.token_type"][0] = 1
    with pytest.raises(TokenizerError, match="has no unknown token"):
        save_tokenizer(tmp_path, metadata, tmp_path)
    metadata["tokenizer.ggml.token_type"][0] = 2
    metadata["tokenizer.ggml.token_type"][5] = 9
    with pytest.raises(TokenizerError, match=r"token 5 is .* of type 9"):
        save_tokenizer(tmp_path, metadata, tmp_path)


def test_padding_that_a_converter_calls_unknown(tmp_path: Path) -> None:
    """Phi-3's files give 53 padding pieces the unknown token's kind, and the unknown token itself that of a mark."""
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    metadata = sentencepiece_metadata(library, unknown_token_id=0)
    size = library.GetPieceSize()
    metadata["tokenizer.ggml.tokens"] += ["[PAD0]", "[PAD1]"]
    metadata["tokenizer.ggml.scores"] += [0.0] * 2
    metadata["tokenizer.ggml.token_type"] += [2, 2]
    metadata["tokenizer.ggml.token_type"][0] = 3
    save_tokenizer(tmp_path, metadata, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = " ".join(TEXT[:4]) + " [PAD0] [PAD1]"
    assert tokenizer.encode(text) == library.EncodeAsIds(" " + text)
    assert (tokenizer.vocab_size, tokenizer.token_id("[PAD1]")) == (size + 2, size + 1)
    assert 0 in tokenizer.special_ids


def test_templates_of_which_none_is_for_conversations(tmp_path: Path) -> None:
    metadata = byte_level_metadata(**{"tokenizer.chat_template": None, "tokenizer.chat_template.rag": "x"})
    with pytest.raises(TokenizerError, match=r"there is tokenizer.chat_template.rag and no tokenizer.chat_template, "):
        save_tokenizer(tmp_path, metadata, tmp_path)
