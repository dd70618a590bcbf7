"""SentencePieceTokenizer: a vocabulary in a SentencePiece tokenizer.model file, through the SentencePiece library.

Tokens added to it (tokenizer_config.json's added_tokens_decoder) are cut out of the text first; each stretch between
two of them is encoded on its own, as the `tokenizers` library and llama.cpp do. Which stretches get a space before them
is the configuration's matter. Knows nothing about models or turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from headrace.errors import TokenizerError
from headrace.text.tokenizer import Tokenizer, valid_text
from headrace.text.tokenizer_config import AddedPiece, TokenizerConfig

__all__ = ["SentencePieceTokenizer"]

SPACE = "\u2581"  # ▁, how SentencePiece spells a space
UNREADABLE = "\ufffd"  # stands for a piece that is not UTF-8
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Behind a model file: the same model, but it puts no space before a text. ModelProto's field 3 is normalizer_spec, and
# that one's field 3 add_dummy_prefix; a message's field that comes again is merged into what was read of it before
# (Protocol Buffers, Encoding, "Last One Wins"). Source of the numbers: sentencepiece_model.proto.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model vocabulary; see `Tokenizer` for the interface.

    Raises:
        TokenizerError: the file is damaged.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        import sentencepiece

        try:
            content = path.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            size = self._model.GetPieceSize()
            self._bare = self._model
            if has_prefix := _has_dummy_prefix(self._model):
                self._bare = sentencepiece.SentencePieceProcessor(model_proto=content + NO_DUMMY_PREFIX)
        except (RuntimeError, OSError, ValueError) as error:  # among them text that is not UTF-8
            raise TokenizerError(f"{path} is not a SentencePiece model ({error}); fetch the file again") from None
        self._trained = size
        self._added = config.added
        # ids inside the vocabulary keep the vocabulary's spelling; a config cannot rename them
        self._names = {i: piece.content for i, piece in config.added.items() if i >= size}
        self._ids = {content: i for i, content in self._names.items()}
        self._size = max([size - 1, *self._names]) + 1
        self._plain = {i: piece for i, piece in config.added.items() if i >= size and not piece.special}
        self._cut_plain = _Cutter(self._plain)
        wanted = config.add_prefix_space is not False
        self.drops_leading_space = wanted and (config.is_llama or has_prefix)
        self._every_stretch = config.space_before_every_stretch
        self._as_llama = config.is_llama
        self._bytes: list[bytes | None] = [None] * self._size

        self.bos_id, eos, unknown = (
            _mark(self, config.mark(f"{name}_token"), getattr(self._model, f"{name}_id")())
            for name in ("bos", "eos", "unk")
        )
        self.eos_ids = tuple(dict.fromkeys((() if eos is None else (eos,)) + config.eos_ids))
        # Hugging Face's Llama class adds bos unless its configuration says otherwise.
        self.add_bos = self.bos_id is not None and (True if config.add_bos is None else config.add_bos)
        spelled = {"bos_token": self.bos_id, "eos_token": eos, "unk_token": unknown}
        self.marks = {n: self.id_to_piece(i) for n, i in spelled.items() if i is not None} | dict(config.marks)
        self.chat_template, self.tool_template = config.chat_template, config.tool_template

    @cached_property
    def special_ids(self) -> frozenset[int]:  # type: ignore[override]
        """See `Tokenizer`. Every piece is asked, so this is put off until somebody wants them all."""
        return frozenset(filter(self._is_special, range(self._size)))

    def _is_special(self, token: int) -> bool:
        if token in self._added and self._added[token].special:
            return True
        return token < self._trained and (self._model.IsControl(token) or self._model.IsUnknown(token))

    @cached_property
    def _cut_all(self) -> _Cutter:
        """Finds special tokens too."""
        if any(self.id_to_piece(i) == UNREADABLE for i in self.special_ids):
            raise TokenizerError("the vocabulary has a special token that is not UTF-8; fetch the file again")
        told = {i: self._added.get(i, AddedPiece("", True)) for i in self.special_ids}
        marked = {i: piece._replace(content=self.id_to_piece(i)) for i, piece in told.items()}  # none is renamed
        return _Cutter({**marked, **self._plain})

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._size

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        text = valid_text(text)
        cutter = self._cut_all if special else self._cut_plain
        ids: list[int] = []
        for i, stretch in enumerate(cutter.split(text)):  # text, token, text, token, … text
            if i % 2:
                ids.append(cutter.token(stretch))
            elif stretch:
                spaced = self._every_stretch if i else not continues
                ids.extend(self._stretch(stretch, spaced and self.drops_leading_space))
        return ids

    def _stretch(self, text: str, spaced: bool) -> list[int]:
        if spaced and self._as_llama:  # a space that is there already is enough for it
            return list(self._bare.EncodeAsIds(text if text.startswith((" ", SPACE)) else " " + text))
        return list((self._model if spaced else self._bare).EncodeAsIds(text))

    def token_id(self, piece: str) -> int | None:
        """See `Tokenizer.token_id`."""
        if piece in self._ids:
            return self._ids[piece]
        token = int(self._model.PieceToId(piece))  # the unknown token when there is no such piece
        return token if self.id_to_piece(token) == piece else None

    def id_to_piece(self, token: int) -> str:
        """See `Tokenizer.id_to_piece`."""
        if token < 0:
            raise TokenizerError(f"token id {token} is negative; expected 0 … {self._size - 1}")
        if token >= self._trained:
            return self._names.get(token, "")
        try:
            return str(self._model.IdToPiece(token))
        except UnicodeDecodeError:  # a damaged model can have pieces that are no text
            return UNREADABLE

    def piece_bytes(self, token: int) -> bytes:
        """See `Tokenizer.piece_bytes`."""
        if not 0 <= token < self._size:
            self.id_to_piece(token)
            return b""
        known = self._bytes[token]
        if known is None:
            known = self._bytes[token] = self._piece_bytes(token)
        return known

    def _piece_bytes(self, token: int) -> bytes:
        if self._is_special(token):
            return b""
        piece = self.id_to_piece(token)
        if token >= self._trained:
            return piece.encode()
        if self._model.IsByte(token) and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode()


class _Cutter:
    """Finds tokens' spellings in a text, the longest first.

    Of two tokens that are spelled alike the larger id is meant, which a configuration added. The library is not asked:
    it does not find every piece that it has.

    Args:
        pieces: the tokens by id.
    """

    def __init__(self, pieces: Mapping[int, AddedPiece]) -> None:
        found = sorted((p for p in pieces.values() if p.content), key=lambda p: len(p.content), reverse=True)
        spellings = [r"\s*" * p.lstrip + re.escape(p.content) + r"\s*" * p.rstrip for p in found]
        self._pattern = re.compile("(" + "|".join(spellings) + ")") if spellings else None
        ids = {pieces[i].content: i for i in sorted(pieces)}
        self._ids = {p.content: ids[p.content] for p in found}

    def split(self, text: str) -> list[str]:
        """Text, token, text, token, … text."""
        return self._pattern.split(text) if self._pattern else [text]

    def token(self, stretch: str) -> int:
        """The id of a token that was cut out, with white space around it where that belongs to it."""
        known = self._ids.get(stretch)
        return next(i for content, i in self._ids.items() if content in stretch) if known is None else known


def _has_dummy_prefix(model: Any) -> bool:
    """Whether the model puts a space before every text, seen on a text that has none."""
    pieces = model.EncodeAsPieces("a")
    return bool(pieces) and pieces[0].startswith(SPACE)


def _mark(tokenizer: Tokenizer, spelling: str | None, default: int) -> int | None:
    """The id of bos or eos: as the configuration spells it, else as the model file says (-1: none)."""
    token = None if spelling is None else tokenizer.token_id(spelling)
    return token if token is not None else (default if default >= 0 else None)
