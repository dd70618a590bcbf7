"""Text to token ids and back: the one interface all vocabularies have, and the two calls that make one.

`save_tokenizer` puts a checkpoint's vocabulary into a bundle's folder as at most two files, whatever it came from;
`load_tokenizer` reads such a folder (or a Hugging Face folder). Two kinds of vocabulary exist at run time:

    tokenizer.json        ── tokenizer_json.py           (the `tokenizers` library)
    tokenizer.model       ── tokenizer_sentencepiece.py  (SentencePiece)
    tokenizer_config.json    bos, eos, whether a prompt begins with bos, the chat template

A vocabulary inside a GGUF file becomes one of the two when a bundle is made (tokenizer_gguf.py). This file knows
nothing about models, turns or sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headrace.errors import TokenizerError
from headrace.text.tokenizer_config import TokenizerConfig

__all__ = ["Tokenizer", "load_tokenizer", "save_tokenizer", "valid_text"]

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"


class Tokenizer(ABC):
    """A vocabulary: text to ids, ids to text.

    Decoding is defined once, here, by the bytes each token stands for, so that decoding token by token and decoding
    at once cannot differ: the bytes are joined and read as UTF-8, every invalid sequence becoming U+FFFD.

    Attributes:
        bos_id: the token a text begins with, or None.
        eos_ids: the tokens that end a text.
        add_bos: a prompt must begin with `bos_id`; `encode` itself never adds it.
        special_ids: tokens without text: control tokens such as bos, eos and turn marks.
        chat_template: the jinja template that came with the vocabulary, or None.
        drops_leading_space: the vocabulary puts a space before a text that is not part of it, so decoding a whole
            text takes one leading space away (SentencePiece's dummy prefix).
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    special_ids: frozenset[int]
    chat_template: str | None
    drops_leading_space: bool

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`, without bos or eos.

        Args:
            text: any text; lone surrogates become U+FFFD.
            special: special tokens spelled out in the text become their ids. Leave it off for text that a user
                typed, so that nobody can forge a turn.
        """

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """The id of the token spelled exactly `piece`, or None."""

    @abstractmethod
    def id_to_piece(self, token: int) -> str:
        """How the vocabulary spells a token, as it stands in its file; an empty string for ids it does not name.

        Raises:
            TokenizerError: the id is negative.
        """

    @abstractmethod
    def piece_bytes(self, token: int) -> bytes:
        """The bytes of text a token stands for: part of a UTF-8 character, whole words, or b"" for special tokens
        and for ids the vocabulary does not name (models pad their vocabulary).

        Raises:
            TokenizerError: the id is negative.
        """

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of `ids`; special tokens have none.

        Args:
            ids: token ids.
            continues: the text goes on from an earlier one, so its leading space is part of it.
        """
        raw = b"".join(map(self.piece_bytes, ids))
        if self.drops_leading_space and not continues:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", errors="replace")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The vocabulary of a bundle or of a Hugging Face folder; tokenizer.json is preferred when both files are there.

    Raises:
        TokenizerError: no vocabulary, a damaged one, or a kind that is not supported.
    """
    folder = Path(folder)
    config = TokenizerConfig.from_folder(folder)
    if (folder / JSON_FILE).is_file():
        from headrace.text.tokenizer_json import JsonTokenizer

        return JsonTokenizer(folder / JSON_FILE, config)
    if (folder / MODEL_FILE).is_file():
        from headrace.text.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(folder / MODEL_FILE, config)
    raise TokenizerError(
        f"{folder} has neither {JSON_FILE} nor {MODEL_FILE}; copy the tokenizer's files into that folder"
    )


def save_tokenizer(source: Path, gguf_metadata: Mapping[str, Any] | None, out: Path) -> list[Path]:
    """Puts a checkpoint's vocabulary into the folder `out`: tokenizer.json or tokenizer.model, and
    tokenizer_config.json. The result is loaded once, so that a damaged vocabulary is found here and not in a bundle.

    Args:
        source: the Hugging Face folder; not read when `gguf_metadata` is given.
        gguf_metadata: GGUF keys with their values as Python numbers, strings and lists; None for a folder.
        out: an existing folder.

    Returns:
        The files written.

    Raises:
        TokenizerError: no vocabulary, a damaged one, or a kind that is not supported.
    """
    if gguf_metadata is not None:
        from headrace.text.tokenizer_gguf import gguf_vocabulary

        name, content, config = gguf_vocabulary(gguf_metadata)
    else:
        config = TokenizerConfig.from_folder(source)
        name = JSON_FILE if (source / JSON_FILE).is_file() else MODEL_FILE
        if not (source / name).is_file():
            raise TokenizerError(
                f"{source} has neither {JSON_FILE} nor {MODEL_FILE}; copy the tokenizer's files into that folder"
            )
        content = (source / name).read_bytes()
    (out / name).write_bytes(content)
    (out / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    load_tokenizer(out)
    return [out / name, out / CONFIG_FILE]


def valid_text(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, as U+FFFD; surrogate pairs become their character."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
