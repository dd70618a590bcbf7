"""A SentencePiece model as tokenizer.json: the same ids for every text, or a refusal."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from headrace.errors import TokenizerError
from headrace.text.tokenizer_convert import sentencepiece_to_tokenizer_json
from headrace.text.tokenizer_folder import load_tokenizer
from tests.text.vocabularies import TEXT, sentencepiece_model

# What texts are made of, from which random strings mix one to several: repeated signs are where the order of joins
# shows, and the rest is what people write.
ALPHABETS = (
    "ab", "aeiou rst\n", "- ", "=-_*#", "0123456789.,", "的一是在不了有和人这中大为上个国我以要他",
    "\t\n \r　▁", "😀👨‍👩‍👧🇨🇳é́", "<>/|h2br", "Ā\u0000\ufeff\x01龘",
)  # fmt: skip
RANDOM_STRINGS = 4000
SYMBOLS = ("<think>", "▁▁", "7")


def random_strings(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    strings = []
    for _ in range(count):
        letters = "".join(rng.sample(ALPHABETS, rng.choice((1, 1, 2, 3, len(ALPHABETS)))))
        strings.append("".join(rng.choices(letters, k=rng.choice((3, 8, 20, 60)))))
    return strings


def converted(folder: Path, model: bytes, special: dict[int, str | None] | None = None) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.model"
    path.write_bytes(model)
    return tokenizers.Tokenizer.from_str(sentencepiece_to_tokenizer_json(path, special))


def assert_equal_ids(theirs: Any, ours: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    ours.encode_special_tokens = True  # SentencePiece takes no spelling of a special token for the token
    for text in texts:
        ids = theirs.EncodeAsIds(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.DecodeIds(ids), repr(text)


@pytest.fixture(scope="module", params=[(False, ()), (True, ()), (False, SYMBOLS), (True, SYMBOLS)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, tokenizers.Tokenizer]:
    """(SentencePiece, its conversion): plain, with a space put before the text, with user-defined pieces."""
    dummy_prefix, symbols = request.param
    model = sentencepiece_model(dummy_prefix, "bpe", symbols)
    ours = converted(tmp_path_factory.mktemp("model"), model)
    return sentencepiece.SentencePieceProcessor(model_proto=model), ours


def test_small_models_encode_equally(pair: tuple[Any, tokenizers.Tokenizer]) -> None:
    texts = [*TEXT[:4], "", " ", "  x  ", "<think>sea</think>", *random_strings(1, 1000)]
    assert_equal_ids(*pair, texts)


@given(st.text(max_size=30))
@settings(max_examples=150, deadline=None)
def test_small_models_encode_any_text_equally(pair: tuple[Any, tokenizers.Tokenizer], text: str) -> None:
    assert_equal_ids(*pair, [text])


@pytest.mark.shared
def test_baichuans_vocabulary_encodes_equally(shared_data: Path, tmp_path: Path) -> None:
    model = (shared_data / "baichuan-7b-tokenizer.model").read_bytes()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = converted(tmp_path, model, {195: None, 196: None})
    names = ("eval_zh.txt", "eval_en.txt", "calibration_zh.txt", "calibration_en.txt")
    texts = [(shared_data / name).read_text(encoding="utf-8") for name in names]
    lines = [line for text in texts for line in text.splitlines()]
    code = Path(__file__).read_text(encoding="utf-8").splitlines()
    rng = random.Random(0)
    pieces = [theirs.IdToPiece(rng.randrange(theirs.GetPieceSize())).replace("▁", " ") for _ in range(8000)]
    rows = ["".join(pieces[i : i + 8]) for i in range(0, len(pieces), 8)]
    assert_equal_ids(theirs, ours, [*lines, *code, *rows, *random_strings(2, RANDOM_STRINGS), texts[0]])


@pytest.mark.parametrize("decoder", ["ByteFallback", "Metaspace"])
@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_a_converted_vocabulary_stands_for_the_same_bytes(tmp_path: Path, decoder: str, dummy_prefix: bool) -> None:
    model = sentencepiece_model(dummy_prefix)
    document = json.loads(converted(tmp_path, model).to_str())
    if decoder == "Metaspace":  # how older conversions write the same
        scheme = "always" if dummy_prefix else "never"
        document["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    before = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    after = load_tokenizer(tmp_path)
    assert type(after) is not type(before)
    assert after.vocab_size == before.vocab_size
    assert after.special_ids == before.special_ids
    assert after.drops_leading_space == before.drops_leading_space == dummy_prefix
    for token in range(before.vocab_size):
        assert after.piece_bytes(token) == before.piece_bytes(token)
    text = "the sea 龘 </s>"
    assert after.encode(text) == before.encode(text)
    assert after.encode(text, special=True) == before.encode(text, special=True)


@pytest.mark.shared
def test_turn_ids_become_special_tokens(shared_data: Path, tmp_path: Path) -> None:
    model = shared_data / "baichuan-7b-tokenizer.model"
    (tmp_path / "tokenizer.json").write_text(sentencepiece_to_tokenizer_json(model, {195: None, 196: None}))
    ours = load_tokenizer(tmp_path)
    user, assistant = (ours.id_to_piece(i) for i in (195, 196))
    assert (user, assistant) == ("<reserved_102>", "<reserved_103>")
    question = ours.encode("你好 world")
    assert ours.encode(f"{user}你好 world{assistant}", special=True) == [195, *question, 196]
    assert {0, 1, 2, 195, 196} == ours.special_ids
    assert ours.vocab_size == 64000
    assert ours.decode([195, *question, 196]) == "你好 world"


def test_unused_padding_is_no_hindrance(tmp_path: Path) -> None:
    """Padding such as Phi-3's stands for no text: no join leads to it, so both sides spell it out."""
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(sentencepiece_model())
    for i in range(3):
        spec.pieces.add(piece=f"[PAD{i}]", score=0.0, type=5)
    model = spec.SerializeToString()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert_equal_ids(theirs, converted(tmp_path, model), [*TEXT[:4], "[PAD1] sea[PAD2]"])


def test_special_tokens_beyond_the_vocabulary_need_a_spelling(tmp_path: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).GetPieceSize()
    ours = converted(tmp_path, sentencepiece_model(), {size: "<|user|>"})
    assert ours.encode("<|user|>").ids == [size]
    with pytest.raises(TokenizerError, match=f"special token {size} is spelled None"):
        converted(tmp_path, sentencepiece_model(), {size: None})
    with pytest.raises(TokenizerError, match=r"special token 5 is spelled '<\|user\|>'; the vocabulary has"):
        converted(tmp_path, sentencepiece_model(), {5: "<|user|>"})


def _change(spec: Any, what: str) -> None:
    if what == "normalization":
        spec.normalizer_spec.precompiled_charsmap = b"\x00"
    elif what == "extra spaces":
        spec.normalizer_spec.remove_extra_whitespaces = True
    elif what == "not escaped":
        spec.normalizer_spec.escape_whitespaces = False
    elif what == "unused":
        spec.pieces[300].type = 5
    elif what == "two unknown":
        spec.pieces[300].type = 2
    elif what == "put behind":
        spec.normalizer_spec.add_dummy_prefix = True
        spec.trainer_spec.treat_whitespace_as_suffix = True


REFUSED: dict[str, str] = {
    "normalization": "has normalization .*cannot say exactly",
    "extra spaces": "has removal of extra spaces",
    "not escaped": "has spaces that are not escaped",
    "unused": "has unused pieces that its joins lead to",
    "two unknown": "has 2 unknown tokens; expected one",
    "put behind": "has a space put behind the text",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_said_exactly_is_refused(tmp_path: Path, what: str) -> None:
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(sentencepiece_model())
    _change(spec, what)
    with pytest.raises(TokenizerError, match=REFUSED[what]):
        converted(tmp_path, spec.SerializeToString())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: sentencepiece_model(kind="unigram"), "is a unigram model; expected BPE"),
        (lambda: b"\xff\xff no model", "is not a SentencePiece model"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, model: Callable[[], bytes], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        converted(tmp_path, model())
    assert "\n" not in str(caught.value)
