"""What a Hugging Face folder says about its vocabulary: which file wins, and what a bundle keeps of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from headrace.errors import TokenizerError
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_config import AddedPiece, TokenizerConfig
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer
from tests.text.vocabularies import byte_level_tokenizer, sentencepiece_model, sentencepiece_tokenizer

NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "talk"}]


def write(folder: Path, name: str, content: object) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


# The template


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "file"}, "file"),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "talk"),
        ({"tokenizer_config.json": {"chat_template": {"default": "talk", "rag": "x"}}}, "talk"),
        ({"additional_chat_templates/default.jinja": "more"}, "more"),
        ({"additional_chat_templates/tool_use.jinja": "x", "tokenizer_config.json": {"chat_template": "c"}}, "c"),
        ({"additional_chat_templates/default.jinja": "more", "chat_template.jinja": "file"}, "file"),
        ({}, None),
    ],
)
def test_which_template_wins(tmp_path: Path, files: dict[str, object], template: str | None) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    assert TokenizerConfig.from_folder(tmp_path).chat_template == template


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"chat_template": NAMED}},
        {"tokenizer_config.json": {"chat_template": {"default": "talk", "tool_use": "tools"}}},
        {"additional_chat_templates/tool_use.jinja": "tools", "chat_template.jinja": "talk"},
        {"additional_chat_templates/tool_use.jinja": "tools", "tokenizer_config.json": {"chat_template": "talk"}},
        {"additional_chat_templates/tool_use.jinja": "tools", "tokenizer_config.json": {"chat_template": NAMED}},
    ],
)
def test_a_template_for_tools_stands_beside_the_other(tmp_path: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    config = TokenizerConfig.from_folder(tmp_path)
    assert (config.chat_template, config.tool_template) == ("talk", "tools")
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle", "tokenizer_config.json", config.to_json())
    assert TokenizerConfig.from_folder(tmp_path / "bundle") == config


def test_templates_of_which_none_is_for_conversations(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": {"rag": "x", "chat": "y"}})
    write(tmp_path, "additional_chat_templates/tool_use.jinja", "z")
    named = (
        "has chat templates named 'chat', 'rag', 'tool_use'; expected one named default: copy .*chat_template.jinja$"
    )
    with pytest.raises(TokenizerError, match=named):
        TokenizerConfig.from_folder(tmp_path)
    write(tmp_path, "chat_template.jinja", "mine")
    assert TokenizerConfig.from_folder(tmp_path).chat_template == "mine"


def test_a_template_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes("{{ '川' }}".encode("gbk"))
    with pytest.raises(TokenizerError, match=r"chat_template.jinja is not UTF-8 text \(invalid .* at byte 4\)"):
        TokenizerConfig.from_folder(tmp_path)


# Special tokens


def test_every_special_token_has_its_name(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {
        "bos_token": "<s>", "pad_token": {"content": "<pad>", "special": True}, "unk_token": None,
        "image_token": "<im>", "additional_special_tokens": ["<a>", {"content": "<b>"}], "add_bos_token": True,
    })  # fmt: skip
    config = TokenizerConfig.from_folder(tmp_path)
    assert config.marks == {
        "bos_token": "<s>", "pad_token": "<pad>", "image_token": "<im>", "additional_special_tokens": ["<a>", "<b>"],
    }  # fmt: skip
    write(tmp_path, "tokenizer_config.json", config.to_json())
    assert TokenizerConfig.from_folder(tmp_path) == config


def test_the_older_map_counts_until_there_is_the_newer_list(tmp_path: Path) -> None:
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<map>", "eos_token": "</map>"})
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<config>"})
    assert TokenizerConfig.from_folder(tmp_path).marks == {"bos_token": "<map>", "eos_token": "</map>"}
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<config>", "added_tokens_decoder": {}})
    assert TokenizerConfig.from_folder(tmp_path).marks == {"bos_token": "<config>", "eos_token": "</map>"}


def test_a_templates_marks_come_from_the_vocabulary_where_nothing_else_says(tmp_path: Path) -> None:
    assert sentencepiece_tokenizer(tmp_path).marks == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    bundle = byte_level_tokenizer(tmp_path, padding_token_id=0)
    assert bundle.marks == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_white_space_that_belongs_to_a_token(tmp_path: Path) -> None:
    size = sentencepiece_tokenizer(tmp_path).vocab_size
    added = {str(size): {"content": "<|end|>", "special": True, "rstrip": True, "lstrip": True}}
    tokenizer = sentencepiece_tokenizer(tmp_path, added_tokens_decoder=added)
    sea, river = tokenizer.encode("sea"), tokenizer.encode("river")
    assert tokenizer.encode("sea \n<|end|>\n\nriver", special=True) == [*sea, size, *river]
    assert TokenizerConfig.from_folder(tmp_path).added == {size: AddedPiece("<|end|>", True, True, True)}


def vocabulary(folder: Path, config: dict[str, object], **files: object) -> tuple[Tokenizer, int]:
    """A byte-level vocabulary whose tokenizer.json has one added token, <|endoftext|>, and its size."""
    size = byte_level_tokenizer(folder).vocab_size
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] == "<|endoftext|>"]
    write(folder, "tokenizer.json", document | files)
    write(folder, "tokenizer_config.json", config)
    return load_tokenizer(folder), size


def both(tokenizer: Tokenizer, folder: Path) -> list[Tokenizer]:
    """The vocabulary of a folder, and what a bundle has of it."""
    (folder / "bundle").mkdir(exist_ok=True)
    save_tokenizer(folder, None, folder / "bundle")
    return [tokenizer, load_tokenizer(folder / "bundle")]


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "special": True}},
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        {"added_tokens_decoder": {str(i): {"content": c, "special": True} for i, c in enumerate(
            ["<|im_start|>", "<|im_end|>"], 1)}},
        {"added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": False}}, "eos_token": "<|im_end|>",
         "start_token": "<|im_start|>"},
    ],
)  # fmt: skip
def test_a_token_that_only_the_configuration_names_is_one(tmp_path: Path, config: dict[str, object]) -> None:
    tokenizer, size = vocabulary(tmp_path, config)
    for one in both(tokenizer, tmp_path):
        assert one.encode("<|im_start|>river<|im_end|>", special=True) == [1, *one.encode("river"), 2]
        assert (one.special_ids, one.vocab_size) == ({0, 1, 2}, size)
        assert not one.special_ids & set(one.encode("<|im_start|>river<|im_end|>"))


def test_tokens_behind_the_vocabulary_come_from_the_configuration(tmp_path: Path) -> None:
    size = byte_level_tokenizer(tmp_path).vocab_size
    told = {str(size + 1): {"content": "<b>", "special": True}, str(size): {"content": "<think>", "special": False}}
    tokenizer, _ = vocabulary(tmp_path, {"added_tokens_decoder": told, "pad_token": "<pad>"})
    for one in both(tokenizer, tmp_path):
        ids = one.encode("<b><think><pad>", special=True)
        assert (ids, one.decode(ids), one.vocab_size) == ([size + 1, size, size + 2], "<think>", size + 3)


def test_what_the_configuration_says_of_a_token_wins(tmp_path: Path) -> None:
    told: dict[str, object] = {"content": "<|endoftext|>", "special": True, "rstrip": True, "single_word": True}
    tokenizer, _ = vocabulary(tmp_path, {"added_tokens_decoder": {"0": told}})
    for one in both(tokenizer, tmp_path):
        assert one.encode("a <|endoftext|>  b", special=True) == [*one.encode("a "), 0, *one.encode("b")]
        assert 0 not in one.encode("a<|endoftext|>b", special=True), "it is no word of its own there"


def test_a_token_with_two_ids_is_refused(tmp_path: Path) -> None:
    size = byte_level_tokenizer(tmp_path).vocab_size
    for given, found in ((("<|im_end|>", 3), 2), (("<x>", size + 4), size)):
        told = {str(given[1]): {"content": given[0], "special": True}}
        with pytest.raises(TokenizerError, match=f"token '{re.escape(given[0])}' has id {given[1]} .* and {found} by"):
            vocabulary(tmp_path, {"added_tokens_decoder": told})


@pytest.mark.parametrize("kind", ["json", "model"])
def test_of_the_older_lists_tokens_only_marks_are_special(tmp_path: Path, kind: str) -> None:
    config: dict[str, Any] = {"eos_token": "<end>", "additional_special_tokens": ["<user>"]}
    if kind == "model":
        size = sentencepiece_tokenizer(tmp_path, **config).vocab_size
    else:
        _, size = vocabulary(tmp_path, config)
    write(tmp_path, "added_tokens.json", {"<user>": size, "<end>": size + 1, "<think>": size + 2})
    for one in both(load_tokenizer(tmp_path), tmp_path):
        ids = one.encode("<user>sea<think><end>", special=True)
        assert ids == [size, *one.encode("sea"), size + 2, size + 1]
        assert one.decode(ids) == "sea<think>"
        assert one.encode("<think>")[-1] == size + 2
    document = {"added_tokens_decoder": {}, **config}  # the newer list, though it is empty
    write(tmp_path, "tokenizer_config.json", document)
    assert size + 2 not in load_tokenizer(tmp_path).encode("<think>")


def test_a_tokenizer_json_says_more_than_the_older_list(tmp_path: Path) -> None:
    vocabulary(tmp_path, {})
    write(tmp_path, "added_tokens.json", {"<|endoftext|>": 0})
    for one in both(load_tokenizer(tmp_path), tmp_path):
        assert one.special_ids == {0}


# End tokens


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"config.json": {"eos_token_id": 7}}, (2, 7)),
        ({"config.json": {"eos_token_id": [7, 8]}}, (2, 7, 8)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [9]}}, (2, 9)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"temperature": 1}}, (2, 7)),
        ({"config.json": {"eos_token_id": None}}, (2,)),
        ({"config.json": {"eos_token_id": "7"}}, (2,)),
        ({"config.json": {"eos_token_id": [True, -1, 5]}}, (2, 5)),
    ],
)
def test_where_end_tokens_come_from(tmp_path: Path, files: dict[str, object], ends: tuple[int, ...]) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    assert sentencepiece_tokenizer(tmp_path).eos_ids == ends


# Spaces; transformers' own ids are compared in test_prompts_as_transformers.py


def spaced(folder: Path, **config: Any) -> Tokenizer:
    return sentencepiece_tokenizer(folder, dummy_prefix=True, **config)


def test_after_a_special_token_a_llama_vocabulary_puts_no_space(tmp_path: Path) -> None:
    the, bare = spaced(tmp_path).encode("the"), spaced(tmp_path, add_prefix_space=False).encode("the")
    assert the != bare
    text = "the</s>the"
    llama = spaced(tmp_path, tokenizer_class="LlamaTokenizer", legacy=False)
    assert llama.encode(text, special=True) == [*the, 2, *bare]
    assert llama.encode(text, special=True, continues=True) == [*bare, 2, *bare]
    assert llama.decode(llama.encode("the")) == "the"
    legacy = spaced(tmp_path, tokenizer_class="LlamaTokenizer", legacy=True)
    assert legacy.encode(text, special=True) == [*the, 2, *the]
    assert legacy.encode(text, special=True, continues=True) == [*bare, 2, *the]
    own = spaced(tmp_path, tokenizer_class="BaichuanTokenizer")  # a class that came with its model
    assert own.encode(text, special=True) == [*the, 2, *the]
    none = spaced(tmp_path, add_prefix_space=False)
    assert none.encode(text, special=True) == [*bare, 2, *bare]
    assert not none.drops_leading_space
    assert none.decode(none.encode(" the")) == " the"


def test_a_bundle_keeps_where_spaces_go(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for told in ({"legacy": False, "tokenizer_class": "LlamaTokenizer"}, {"add_prefix_space": False}, {}):
        before = spaced(tmp_path, **told)
        save_tokenizer(tmp_path, None, tmp_path / "out")
        after = load_tokenizer(tmp_path / "out")
        text = "the</s>the sea"
        assert after.encode(text, special=True) == before.encode(text, special=True)
        assert after.drops_leading_space == before.drops_leading_space


def test_a_llama_folders_tokenizer_json_is_read_as_the_class_reads_it(tmp_path: Path) -> None:
    from headrace.text.tokenizer_convert import sentencepiece_to_tokenizer_json

    model = spaced(tmp_path, tokenizer_class="LlamaTokenizer")
    write(tmp_path, "tokenizer.json", sentencepiece_to_tokenizer_json(tmp_path / "tokenizer.model"))
    whole = load_tokenizer(tmp_path)
    assert type(whole) is not type(model)
    for text in ("the</s>the sea", " the", "</s>the", ""):
        for continues in (False, True):
            expected = model.encode(text, special=True, continues=continues)
            assert whole.encode(text, special=True, continues=continues) == expected


@pytest.mark.parametrize("legacy", [None, False, True])
def test_a_mistral_folder_that_names_llamas_class(tmp_path: Path, legacy: bool | None) -> None:
    from headrace.text.tokenizer_convert import sentencepiece_to_tokenizer_json

    the, bare = spaced(tmp_path).encode("the"), spaced(tmp_path, add_prefix_space=False).encode("the")
    write(tmp_path, "config.json", {"model_type": "mistral"})
    alone = spaced(tmp_path, tokenizer_class="LlamaTokenizer", legacy=legacy, add_prefix_space=False)
    for one in both(alone, tmp_path):
        assert one.encode("the</s>the", special=True) == [*the, 2, *(bare if legacy is False else the)]
    write(tmp_path, "tokenizer.json", sentencepiece_to_tokenizer_json(tmp_path / "tokenizer.model"))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for one in both(load_tokenizer(tmp_path), tmp_path):
        for text in ("the</s>the sea", " the", "</s>the", ""):
            assert one.encode(text, special=True) == library.encode(text).ids


def processed(folder: Path, before: bool, behind: bool) -> Tokenizer:
    """A byte-level vocabulary whose file puts a token before a text, or one behind it."""
    byte_level_tokenizer(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    mark = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*[mark] * before, {"Sequence": {"id": "A", "type_id": 0}}, *[mark] * behind],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    write(folder, "tokenizer.json", document)
    (folder / "tokenizer_config.json").unlink()
    return load_tokenizer(folder)


@pytest.mark.parametrize(("before", "behind", "bos"), [(1, 0, 0), (1, 1, 0), (0, 1, None), (0, 0, None)])
def test_what_stands_behind_a_text_is_no_beginning(tmp_path: Path, before: int, behind: int, bos: int | None) -> None:
    tokenizer = processed(tmp_path, bool(before), bool(behind))
    assert (tokenizer.bos_id, tokenizer.add_bos) == (bos, bos is not None)


@pytest.mark.parametrize("name", ["add_bos_token", "legacy", "add_prefix_space"])
def test_a_switch_is_true_or_false(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write(tmp_path, "tokenizer_config.json", {name: "yes"})
    with pytest.raises(TokenizerError, match=f"{name} is 'yes'; expected true or false"):
        load_tokenizer(tmp_path)
