"""Vocabularies: round trips, special tokens, settings, and the files a bundle gets from each kind of source."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers as tokenizers_library
from hypothesis import given, settings

from headrace.errors import TokenizerError
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer
from headrace.text.tokenizer_json import JsonTokenizer, quick_to_read
from tests.text.vocabularies import (
    ANY_TEXT,
    CHATML,
    byte_level_metadata,
    byte_level_tokenizer,
    sentencepiece_model,
    sentencepiece_tokenizer,
)

KINDS = ("sentencepiece", "sentencepiece with a space before", "byte-level")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folders = [tmp_path_factory.mktemp("vocabulary") for _ in KINDS]
    return {
        KINDS[0]: sentencepiece_tokenizer(folders[0]),
        KINDS[1]: sentencepiece_tokenizer(folders[1], dummy_prefix=True),
        KINDS[2]: byte_level_tokenizer(folders[2]),
    }


# The interface


@pytest.mark.parametrize("kind", KINDS)
@given(ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_text_comes_back(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    # SentencePiece spells a space ▁, so the two cannot be told apart
    expected = text if kind == "byte-level" else text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize("dummy_prefix", [False, True])
@given(ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_decoding_by_bytes_is_sentencepieces_own(
    tokenizers: dict[str, Tokenizer], dummy_prefix: bool, text: str
) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(dummy_prefix))
    tokenizer = tokenizers[KINDS[dummy_prefix]]
    ids = tokenizer.encode(text)
    assert ids == library.EncodeAsIds(text)
    assert tokenizer.decode(ids) == library.DecodeIds(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_has_bytes_and_every_piece_its_id(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for token in range(tokenizer.vocab_size):
        assert tokenizer.token_id(tokenizer.id_to_piece(token)) == token
        assert bool(tokenizer.piece_bytes(token)) == (token not in tokenizer.special_ids)
    assert tokenizer.piece_bytes(tokenizer.vocab_size + 7) == b""  # a model may pad its vocabulary
    assert tokenizer.id_to_piece(tokenizer.vocab_size + 7) == ""
    assert tokenizer.token_id("no such piece") is None
    with pytest.raises(TokenizerError, match="token id -1 is negative"):
        tokenizer.piece_bytes(-1)


def test_added_tokens_that_are_no_marks_have_text(tmp_path: Path) -> None:
    metadata = byte_level_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<think 1>", "of no byte: 百"]
    metadata["tokenizer.ggml.token_type"] += [4, 1]
    save_tokenizer(tmp_path, metadata, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("sea<think 1>")[-1] == size
    assert tokenizer.decode([size, size + 1]) == "<think 1>of no byte: 百"


def test_threads_do_not_share_the_switch_for_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    text = "the<|im_end|>" * 50
    expected = [tokenizer.encode(text, special=bool(i % 2)) for i in range(2)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: tokenizer.encode(text, special=bool(i % 2)), range(400)))
    assert found == expected * 200


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_are_replaced(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc80")) == "a\ufffdb\ufffd"


@pytest.mark.parametrize(("kind", "mark"), [(KINDS[0], "</s>"), (KINDS[1], "</s>"), (KINDS[2], "<|im_end|>")])
def test_special_tokens_in_text_only_on_request(tokenizers: dict[str, Tokenizer], kind: str, mark: str) -> None:
    tokenizer = tokenizers[kind]
    text = f"the{mark}sea{mark}"
    token = tokenizer.token_id(mark)
    assert token in tokenizer.special_ids
    plain = tokenizer.encode(text)
    assert token not in plain
    assert tokenizer.decode(plain) == text
    the, sea = tokenizer.encode("the"), tokenizer.encode("sea")
    assert tokenizer.encode(text, special=True) == [*the, token, *sea, token]


def test_a_leading_space_stays_when_a_text_continues(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[KINDS[1]]
    ids = tokenizer.encode("the sea")
    assert tokenizer.drops_leading_space
    assert tokenizer.decode(ids) == "the sea"
    assert tokenizer.decode(ids, continues=True) == " the sea"


# Settings of a folder


def test_marks_and_ends_come_from_the_folders_files(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 421]}')
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 420}')
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokenizer = sentencepiece_tokenizer(tmp_path, bos_token="<s>", add_bos_token=True)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (420, 2, 421), True)
    assert tokenizer.chat_template == CHATML


def test_tokens_added_to_sentencepiece(tmp_path: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).GetPieceSize()
    added = {
        str(size): {"content": "<|user|>", "special": True},
        str(size + 1): {"content": "<think>", "special": False},
    }
    tokenizer = sentencepiece_tokenizer(tmp_path, added_tokens_decoder=added)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.token_id("<think>") == size + 1
    assert tokenizer.piece_bytes(size) == b""
    assert tokenizer.piece_bytes(size + 1) == b"<think>"
    sea = tokenizer.encode("sea")
    assert tokenizer.encode("<|user|>sea<think>", special=True) == [size, *sea, size + 1]
    plain = tokenizer.encode("<|user|>sea<think>")
    assert size not in plain
    assert plain[-1] == size + 1


def test_a_llama_folder_that_says_nothing_begins_with_bos(tmp_path: Path) -> None:
    assert sentencepiece_tokenizer(tmp_path, add_bos_token=None).add_bos
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_ids) == (True, 1, (2,))


def test_a_tokenizer_json_says_itself_whether_it_begins_with_bos(tmp_path: Path) -> None:
    byte_level_tokenizer(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.add_bos, tokenizer.bos_id) == (True, 0)
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("kind", ["model", "json"])
def test_saving_a_folder_gives_the_same_vocabulary_in_two_files(tmp_path: Path, kind: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    if kind == "model":
        before = sentencepiece_tokenizer(
            source, bos_token="<s>", chat_template=[{"name": "default", "template": CHATML}]
        )
    else:
        before = byte_level_tokenizer(source)
    written = save_tokenizer(source, None, out)
    assert sorted(written) == sorted(out.iterdir())
    assert {p.name for p in written} == {f"tokenizer.{kind}", "tokenizer_config.json"}
    after = load_tokenizer(out)
    text = "the sea 百川😀</s><|im_end|> 12"
    for special in (False, True):
        assert after.encode(text, special=special) == before.encode(text, special=special)
    for name in ("bos_id", "eos_ids", "add_bos", "special_ids", "chat_template", "vocab_size"):
        assert getattr(after, name) == getattr(before, name)
    assert after.chat_template == CHATML


def test_merges_are_spelled_shortly_where_that_says_the_same(tmp_path: Path) -> None:
    byte_level_tokenizer(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    merges = file["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)
    file["model"]["merges"] = [merge.split(" ") for merge in merges]
    assert json.loads(quick_to_read(json.dumps(file)))["model"]["merges"] == merges
    one = file["model"]["vocab"]
    one |= {"a b": len(one), "a bc": len(one) + 1}
    file["model"]["merges"].append(["a b", "c"])
    assert json.loads(quick_to_read(json.dumps(file))) == file, "a piece with a space in it needs the longer spelling"


@pytest.mark.parametrize("spelling", ["left right", "pairs"])
def test_the_library_is_given_what_it_would_read(tmp_path: Path, spelling: str) -> None:
    before = byte_level_tokenizer(tmp_path).encode("the sea <|im_end|> 百川", special=True)
    path = tmp_path / "tokenizer.json"
    file = json.loads(path.read_text(encoding="utf-8"))
    file["model"] |= {"ignore_merges": True, "unk_token": next(iter(file["model"]["vocab"]))}
    file["added_tokens"] += [
        {"id": 999, "content": "<tool>", "single_word": False, "lstrip": True, "rstrip": True, "normalized": True,
         "special": False},
    ]  # fmt: skip
    if spelling == "pairs":
        file["model"]["merges"] = [merge.split(" ") for merge in file["model"]["merges"]]
    path.write_text(json.dumps(file), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, JsonTokenizer)
    assert json.loads(tokenizer.to_json()) == json.loads(tokenizers_library.Tokenizer.from_file(str(path)).to_str())
    assert tokenizer.encode("the sea <|im_end|> 百川", special=True) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file["model"]["merges"].append(["t", "h"]), "merges are spelled in two ways"),
        (lambda file: file["model"]["merges"].append("t h e"), "is not a tokenizer.json"),
        (lambda file: file["model"]["merges"].append("☃ ☃"), "is not a tokenizer.json"),
        (lambda file: file["model"].update(merges=[["t"]]), "is not a tokenizer.json"),
        (lambda file: file["model"].update(merges={"t": 1}), "is not a tokenizer.json"),
        (lambda file: file["model"].update(merges=None), "is not a tokenizer.json"),
        (lambda file: file["model"].pop("merges"), "is not a tokenizer.json"),
        (lambda file: file["model"].update(byte_fallback="yes"), "is not a tokenizer.json"),
        (lambda file: file["added_tokens"][0].update(lstrip="yes"), "is not a tokenizer.json"),
        (lambda file: file["added_tokens"][0].pop("special"), "is not a tokenizer.json"),
        (lambda file: file.update(added_tokens=5), "is not a tokenizer.json"),
        (lambda file: file.update(normalizer={"type": "Strip"}), "is not a tokenizer.json"),
    ],
)
def test_what_the_library_would_refuse_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    byte_level_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    file = json.loads(path.read_text(encoding="utf-8"))
    change(file)
    path.write_text(json.dumps(file), encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": "{"}, "is not JSON"),
        ({"tokenizer.json": "{}"}, "the model is of type None; expected BPE"),
        ({"tokenizer.model": "no model"}, "is not a SentencePiece model"),
        ({"tokenizer_config.json": "[1]"}, "holds a list; expected a JSON object"),
        ({"tokenizer_config.json": "{"}, "is not JSON"),
        ({"tokenizer_config.json": '{"add_bos_token": "yes"}'}, "add_bos_token is 'yes'; expected true or false"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "chat_template is a int; expected text"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"x": "a"}}'}, "expected id: token"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": []}'}, "expected an object"),
    ],
)
def test_damaged_folders_are_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for attempt in (load_tokenizer, lambda folder: save_tokenizer(folder, None, tmp_path)):
        with pytest.raises(TokenizerError, match=message.replace("[", r"\[")) as caught:
            attempt(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_decoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    byte_level_tokenizer(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match="decoder 'WordPiece' is not supported"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_in_place_of_a_vocabulary(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2001107\n")
    with pytest.raises(TokenizerError, match=f"{name} is a git-lfs pointer.*; run: git lfs pull$"):
        load_tokenizer(tmp_path)


def test_a_config_cannot_rename_a_special_token(tmp_path: Path) -> None:
    """Its other spelling is text like any other."""
    added = {"1": {"content": "sea", "special": True}}
    tokenizer = sentencepiece_tokenizer(tmp_path, added_tokens_decoder=added)
    text = "the sea <s>"
    assert tokenizer.decode(tokenizer.encode("the sea", special=True)) == "the sea"
    assert tokenizer.encode(text, special=True)[-1] == 1


def test_a_special_token_that_the_library_does_not_find_is_still_itself(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    model.pieces[0].piece = "\0"  # of the unknown token; asked for it, the library says it is not there
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    added = {"0": {"content": "<unk>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert load_tokenizer(tmp_path).encode("\0", special=True) == [0]


def test_white_space_around_a_token_that_has_some_itself(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    size = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).GetPieceSize()
    added = {str(size): {"content": " <a> ", "lstrip": True, "rstrip": True, "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert load_tokenizer(tmp_path).encode("b   <a>   ")[-1] == size
