"""TokenizerConfig: what a vocabulary's file does not say itself: bos, eos, added tokens, the chat template.

Hugging Face folders spread this over tokenizer_config.json, special_tokens_map.json, added_tokens.json,
chat_template.jinja, generation_config.json and config.json; a bundle keeps it in tokenizer_config.json alone, under the
same keys. What wins over what is as in transformers (tokenization_utils_base.py, `from_pretrained`). Knows nothing
about how text is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from headrace.errors import TokenizerError, shown
from headrace.files import read_json, read_text

__all__ = ["MAX_ID", "AddedPiece", "TokenizerConfig", "template_files"]

MAX_ID = (1 << 24) - 1  # the largest vocabularies have some 260,000 tokens
# The tokens that transformers names, and hands to chat templates under these names.
MARKS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDITIONAL = "additional_special_tokens"
TEMPLATE_FILE = "chat_template.jinja"  # the template for conversations
# Hugging Face's own Llama classes put a space before a text only at its very beginning, unless they are told otherwise;
# the SentencePiece classes that models bring along put one before every stretch of text between special tokens.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


class AddedPiece(NamedTuple):
    """A token added to a vocabulary.

    Attributes:
        content: its spelling.
        special: a control token without text.
        lstrip, rstrip: white space before or behind it in a text belongs to it.
        single_word: inside of a word it is text like any other.
        normalized: it is looked for in the normalized text.
    """

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class TokenizerConfig(NamedTuple):
    """A vocabulary's settings; None where the folder does not say.

    Attributes:
        marks: name → spelling of the special tokens, such as "bos_token", and "additional_special_tokens" with a list.
        eos_ids: further ids that end a text.
        add_bos: a prompt begins with bos.
        add_prefix_space: a space is put before a text.
        legacy: that space is put before every stretch of text between special tokens, not only before the first.
        added: id → token added after the vocabulary was trained, or marked as special.
        added_outranks: what `added` says of a token counts more than what a tokenizer.json says of it.
        chat_template: jinja source.
        tool_template: the one that takes its place where there are tools.
        tokenizer_class: Hugging Face's class name, which carries defaults; None too where that class is not used.
    """

    marks: Mapping[str, str | list[str]] = MappingProxyType({})
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    added: Mapping[int, AddedPiece] = MappingProxyType({})
    added_outranks: bool = True
    chat_template: str | None = None
    tool_template: str | None = None
    tokenizer_class: str | None = None

    @property
    def is_llama(self) -> bool:
        """The vocabulary is of Hugging Face's own Llama class."""
        return self.tokenizer_class in LLAMA_CLASSES

    @property
    def space_before_every_stretch(self) -> bool:
        """A space that is put before a text is put before each stretch of it between special tokens."""
        return not self.is_llama if self.legacy is None else self.legacy

    @classmethod
    def from_folder(cls, folder: Path) -> TokenizerConfig:
        """Reads what is there of the files; all are optional.

        Raises:
            TokenizerError: one of them is not the JSON or the text it should be, or of several templates none is the
                one for conversations.
        """
        where = folder / "tokenizer_config.json"
        raw = _read_json(where)
        named = _read_json(folder / "special_tokens_map.json")
        # The map is the older file; once added_tokens_decoder is there, transformers no longer reads it.
        said = {key: value for key, value in raw.items() if value}
        told = {**named, **said} if "added_tokens_decoder" in raw else {**said, **named}
        name = raw.get("tokenizer_class")
        marks = _marks(told)
        templates = _templates(raw.get("chat_template"), folder, where)
        decoder = raw.get("added_tokens_decoder")
        older = folder / "added_tokens.json"  # read where there is no newer list, like the map
        config = cls(
            marks=marks,
            eos_ids=tuple(dict.fromkeys(_ids(raw.get("eos_token_ids")) + _end_ids(folder))),
            add_bos=_flag(raw, "add_bos_token", where),
            add_prefix_space=_flag(raw, "add_prefix_space", where),
            legacy=_flag(raw, "legacy", where),
            added=_named(_read_json(older), marks, older) if decoder is None else _added(decoder, where),
            added_outranks=decoder is not None,
            chat_template=templates.get("default"),
            tool_template=templates.get("tool_use"),
            tokenizer_class=name if isinstance(name, str) else None,
        )
        if config.is_llama and _read_json(folder / "config.json").get("model_type") == "mistral":
            return config._as_mistral(alone=not (folder / "tokenizer.json").is_file())
        return config

    def _as_mistral(self, *, alone: bool) -> TokenizerConfig:
        """The same of a Mistral folder that names Llama's class: a tokenizer.json is read as it stands, and where a
        tokenizer.model stands alone its own space before a text counts, put as Llama's class does it if `legacy` is
        false. Source: transformers, tokenization_auto.py and convert_slow_tokenizer.py."""
        as_llama = alone and self.legacy is False
        return self._replace(add_prefix_space=None, tokenizer_class=self.tokenizer_class if as_llama else None)

    def to_json(self) -> str:
        """The text of a bundle's tokenizer_config.json; `from_folder` reads the same settings back."""
        templates = {"default": self.chat_template, "tool_use": self.tool_template}
        raw = {
            "tokenizer_class": self.tokenizer_class,
            **self.marks,
            "eos_token_ids": list(self.eos_ids) or None,
            "add_bos_token": self.add_bos,
            "add_prefix_space": self.add_prefix_space,
            "legacy": self.legacy,
            "added_tokens_decoder": {str(i): _piece_json(piece) for i, piece in self.added.items()} or None,
            "chat_template": self.chat_template if self.tool_template is None else templates,
        }
        kept = {key: value for key, value in raw.items() if value is not None}
        return json.dumps(kept, ensure_ascii=False, indent=1) + "\n"

    def mark(self, name: str) -> str | None:
        """The spelling of one special token, or None."""
        spelling = self.marks.get(name)
        return spelling if isinstance(spelling, str) else None

    @property
    def special(self) -> tuple[str, ...]:
        """The spellings of all marks."""
        return _spellings(self.marks)


def _spellings(marks: Mapping[str, str | list[str]]) -> tuple[str, ...]:
    listed = ([spelling] if isinstance(spelling, str) else spelling for spelling in marks.values())
    return tuple(dict.fromkeys(spelling for spellings in listed for spelling in spellings))


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, error=TokenizerError, advice="fetch the file again") if path.is_file() else {}


def _spelling(value: object) -> str | None:
    # A token is written as a string or as {"content": "<s>", "lstrip": false, …}.
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _marks(told: Mapping[str, Any]) -> dict[str, str | list[str]]:
    # A model may name marks of its own, image_token and the like; they all end so.
    names = [*MARKS, *sorted(key for key in told if key.endswith("_token") and key not in MARKS)]
    marks: dict[str, str | list[str]] = {}
    for name in names:
        spelling = _spelling(told.get(name))
        if spelling is not None:
            marks[name] = spelling
    more = told.get(ADDITIONAL) or told.get("extra_special_tokens")
    if isinstance(more, list):
        marks[ADDITIONAL] = [spelling for item in more if (spelling := _spelling(item)) is not None]
    elif isinstance(more, dict):  # named ones
        marks |= {name: spelling for name, item in more.items() if (spelling := _spelling(item)) is not None}
    return marks


def _end_ids(folder: Path) -> tuple[int, ...]:
    """What ends a text by generation_config.json, else by config.json, where older folders have it."""
    for name in ("generation_config.json", "config.json"):
        settings = _read_json(folder / name)
        if settings.get("eos_token_id") is not None:
            return _ids(settings["eos_token_id"])
    return ()


def _flag(raw: Mapping[str, Any], name: str, where: Path) -> bool | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{where}: {name} is {value!r}; expected true or false")
    return value


def _piece_json(piece: AddedPiece) -> dict[str, Any]:
    told = piece._asdict()
    always = ("content", "special", "normalized")  # what is left out of the others is false
    return {name: value for name, value in told.items() if value or name in always}


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _templates(told: object, folder: Path, where: Path) -> dict[str, str]:
    """Name → jinja source: those of tokenizer_config.json, and before them those that are files of their own.

    Raises:
        TokenizerError: one is no text, or none is the one for conversations.
    """
    # Several are an object, or a list of {"name", "template"}.
    if isinstance(told, list):
        told = {str(v.get("name")): v.get("template") for v in told if isinstance(v, dict)}
    templates: dict[str, str] = {}
    for name, template in (told if isinstance(told, dict) else {"default": told}).items():
        if template is not None and not isinstance(template, str):
            raise TokenizerError(f"{where}: chat_template is a {type(template).__name__}; expected text")
        if template:
            templates[name] = template
    templates |= {name: read_text(path, error=TokenizerError) for name, path in template_files(folder).items()}
    if templates and "default" not in templates:
        names = ", ".join(map(shown, sorted(templates)))
        raise TokenizerError(
            f"{folder} has chat templates named {names}; expected one named default: copy the one for conversations to "
            f"{folder / TEMPLATE_FILE}"
        )
    return templates


def template_files(folder: Path) -> dict[str, Path]:
    """Chat templates that are files of their own, by name."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    own = folder / TEMPLATE_FILE
    return files | ({"default": own} if own.is_file() else {})


def _named(names: Mapping[str, Any], marks: Mapping[str, str | list[str]], where: Path) -> dict[int, AddedPiece]:
    """The tokens of added_tokens.json, which says no more than their ids: special are those that are marks."""
    special = _spellings(marks)
    pieces = {i: AddedPiece(content, content in special) for content, i in names.items() if _ids(i)}
    return _checked({i: piece._replace(normalized=not piece.special) for i, piece in pieces.items()}, where)


def _added(decoder: object, where: Path) -> dict[int, AddedPiece]:
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder is a {type(decoder).__name__}; expected an object")
    added = {}
    for key, value in decoder.items():
        content = _spelling(value)
        if not key.isdecimal() or len(key) > len(str(MAX_ID)) or content is None:
            raise TokenizerError(f"{where}: added_tokens_decoder has {shown(key)}: {shown(value)}; expected id: token")
        told = value if isinstance(value, dict) else {"special": True}
        flags = {name: bool(told.get(name)) for name in AddedPiece._fields if name != "content"}
        flags["normalized"] = bool(told.get("normalized", not flags["special"]))
        added[int(key)] = AddedPiece(content, **flags)
    return _checked(added, where)


def _checked(added: Mapping[int, AddedPiece], where: Path) -> dict[int, AddedPiece]:
    for i, piece in added.items():
        if i > MAX_ID:
            raise TokenizerError(f"{where}: token {shown(piece.content)} has id {i}; expected at most {MAX_ID}")
    return dict(sorted(added.items()))
