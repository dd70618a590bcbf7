"""TokenizerConfig: what a vocabulary's file does not say itself: bos, eos, added tokens, the chat template.

Hugging Face folders spread this over tokenizer_config.json, special_tokens_map.json, added_tokens.json,
generation_config.json and chat_template.jinja; a bundle keeps it in tokenizer_config.json alone, under the same keys.
Knows nothing about how text is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.errors import TokenizerError
from headrace.files import read_json

__all__ = ["AddedPiece", "TokenizerConfig"]


@dataclass(frozen=True)
class AddedPiece:
    """A token added to a vocabulary: its spelling, and whether it is a control token without text."""

    content: str
    special: bool


@dataclass(frozen=True)
class TokenizerConfig:
    """A vocabulary's settings.

    Attributes:
        bos: spelling of the token a text begins with, or None when not said.
        eos: spelling of the token a text ends with, or None when not said.
        eos_ids: further ids that end a text.
        add_bos: a prompt begins with bos; None when not said.
        added: id → token added after the vocabulary was trained, or marked as special.
        chat_template: jinja source, or None.
        tokenizer_class: Hugging Face's class name, which carries defaults, or None.
    """

    bos: str | None = None
    eos: str | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    added: Mapping[int, AddedPiece] = field(default_factory=dict)
    chat_template: str | None = None
    tokenizer_class: str | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> TokenizerConfig:
        """Reads what is there of the five files; all are optional.

        Raises:
            TokenizerError: one of them is not the JSON it should be.
        """
        raw = _read_json(folder / "tokenizer_config.json")
        marks = {**_read_json(folder / "special_tokens_map.json"), **{k: v for k, v in raw.items() if v}}
        generation = _read_json(folder / "generation_config.json")
        where = folder / "tokenizer_config.json"
        add_bos = raw.get("add_bos_token")
        if add_bos is not None and not isinstance(add_bos, bool):
            raise TokenizerError(f"{where}: add_bos_token is {add_bos!r}; expected true or false")
        template = _template(raw.get("chat_template"), where)
        jinja = folder / "chat_template.jinja"
        if template is None and jinja.is_file():
            template = jinja.read_text(encoding="utf-8")
        name = raw.get("tokenizer_class")
        return cls(
            bos=_spelling(marks.get("bos_token")),
            eos=_spelling(marks.get("eos_token")),
            eos_ids=tuple(dict.fromkeys(_ids(raw.get("eos_token_ids")) + _ids(generation.get("eos_token_id")))),
            add_bos=add_bos,
            added=_added(raw.get("added_tokens_decoder"), _read_json(folder / "added_tokens.json"), where),
            chat_template=template,
            tokenizer_class=name if isinstance(name, str) else None,
        )

    def to_json(self) -> str:
        """The text of a bundle's tokenizer_config.json; `from_folder` reads the same settings back."""
        raw = {
            "tokenizer_class": self.tokenizer_class,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "eos_token_ids": list(self.eos_ids) or None,
            "add_bos_token": self.add_bos,
            "added_tokens_decoder": {
                str(i): {"content": piece.content, "special": piece.special} for i, piece in self.added.items()
            }
            or None,
            "chat_template": self.chat_template,
        }
        kept = {key: value for key, value in raw.items() if value is not None}
        return json.dumps(kept, ensure_ascii=False, indent=1) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, error=TokenizerError, advice="fetch the file again") if path.is_file() else {}


def _spelling(value: object) -> str | None:
    # A token is written as a string or as {"content": "<s>", "lstrip": false, …}.
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _template(value: object, where: Path) -> str | None:
    # Several named templates are a list of {"name", "template"}; the one for conversation is "default".
    if isinstance(value, list):
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default")
    if value is None or isinstance(value, str):
        return value
    raise TokenizerError(f"{where}: chat_template is a {type(value).__name__}; expected text")


def _added(decoder: object, names: Mapping[str, Any], where: Path) -> dict[int, AddedPiece]:
    added = {i: AddedPiece(content, True) for content, i in names.items() if _ids(i)}
    if decoder is None:
        return added
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder is a {type(decoder).__name__}; expected an object")
    for key, value in decoder.items():
        content = _spelling(value)
        if not key.isdecimal() or content is None:
            raise TokenizerError(f"{where}: added_tokens_decoder has {key!r}: {value!r}; expected id: token")
        added[int(key)] = AddedPiece(content, not isinstance(value, dict) or bool(value.get("special")))
    return dict(sorted(added.items()))
