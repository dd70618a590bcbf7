"""Tokenizer: text to token ids and back, the one interface all vocabularies have.

Knows nothing about files, models, turns or sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from headrace.errors import TokenizerError

__all__ = ["Tokenizer", "check_ids", "valid_text"]


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
        tool_template: the one that takes its place where there are tools, or None.
        marks: name → spelling of the special tokens that a chat template can write: "bos_token", "pad_token" and so on,
            and "additional_special_tokens" with a list of them.
        drops_leading_space: the vocabulary puts a space before a text that is not part of it, so decoding a whole
            text takes one leading space away (SentencePiece's dummy prefix).
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    special_ids: frozenset[int]
    chat_template: str | None
    tool_template: str | None
    marks: Mapping[str, str | list[str]]
    drops_leading_space: bool

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @abstractmethod
    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """The ids of `text`, without bos or eos.

        Args:
            text: any text; lone surrogates become U+FFFD.
            special: special tokens spelled out in the text become their ids. Leave it off for text that a user
                typed, so that nobody can forge a turn.
            continues: the text goes on from an earlier one, so no space is put before it.
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

    def close(self) -> None:  # noqa: B027
        """Give back what is held beside memory: nothing, but for a vocabulary in another process."""

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


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids that a model of `vocab_size` tokens does not have.

    Raises:
        TokenizerError: naming the first.
    """
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise TokenizerError(
            f"the text has token {wrong}, but the model knows {vocab_size} tokens, 0 to {vocab_size - 1}; "
            "expected the vocabulary that the model was trained with: copy its own tokenizer files"
        )


def valid_text(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, as U+FFFD; surrogate pairs become their character."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
