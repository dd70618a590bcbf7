"""JsonTokenizer: a vocabulary in a tokenizer.json file, through the `tokenizers` library.

Encoding is the library's; which texts get a space before them is as transformers has it. Decoding is ours, by the bytes
of each piece, for the two kinds of vocabulary there are: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and
SentencePiece's spelling (▁ for a space, <0xE4> for a byte). Any other decoder is refused. Knows nothing about models
or turns.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from headrace.errors import TokenizerError, shown
from headrace.files import read_json
from headrace.panics import told_as
from headrace.text.tokenizer import Tokenizer, valid_text
from headrace.text.tokenizer_check import check_tokenizer_json
from headrace.text.tokenizer_config import MARKS, MAX_ID, AddedPiece, TokenizerConfig

__all__ = ["JsonTokenizer", "byte_alphabet", "quick_to_read"]

SPACE = "\u2581"  # ▁, how SentencePiece spells a space
_MODEL_OPTIONS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
    "fuse_unk", "byte_fallback", "ignore_merges",
)  # fmt: skip
_ADDED_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized", "special")
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json vocabulary; see `Tokenizer` for the interface.

    Raises:
        TokenizerError: the file is damaged, or its decoder is neither byte-level nor SentencePiece's.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        raw = read_json(path, error=TokenizerError, advice="fetch the file again")
        check_tokenizer_json(path, raw)
        self._path = path
        with told_as(TokenizerError, f"{path} is not a tokenizer.json; fetch the file again"):
            self._library = _library_tokenizer(raw, _added_tokens(raw, config))
        for i, piece in config.added.items():
            if (found := self.token_id(piece.content)) != i:
                raise TokenizerError(
                    f"token {shown(piece.content)} has id {i} in the tokenizer's configuration and {found} by {path}; "
                    "expected files of one vocabulary: fetch them again"
                )
        self._library.no_truncation()
        self._library.no_padding()
        added = self._library.get_added_tokens_decoder()
        self._added = frozenset(added)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._lock = threading.Lock()
        self._byte_level, self.drops_leading_space = _decoder_kind(self._library.decoder, path)
        if config.is_llama and not self._byte_level:
            self.drops_leading_space = config.add_prefix_space is not False
            _restate_spaces(self._library, config)
        self._bytes: dict[int, bytes] = {}

        with self._panics_told():
            begin = _begin_ids(self._library)
        bos, eos = (None if (mark := config.mark(name)) is None else self.token_id(mark) for name in MARKS[:2])
        self.bos_id = begin[0] if bos is None and begin else bos
        self.eos_ids = tuple(dict.fromkeys((() if eos is None else (eos,)) + config.eos_ids))
        # The file's own post-processor decides, as in transformers; the configuration only where there is none.
        says = bool(begin) if self._library.post_processor is not None else bool(config.add_bos)
        self.add_bos = self.bos_id is not None and says
        self.marks = config.marks
        self.chat_template, self.tool_template = config.chat_template, config.tool_template

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. The library hands over its whole vocabulary to tell it, so only on demand."""
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        text = valid_text(text)
        with self._lock, self._panics_told():  # the switch is part of the library's tokenizer
            self._library.encode_special_tokens = not special
            if continues and self.drops_leading_space:
                # The library always takes a text for a whole one: a line break in front keeps the space away.
                before = self._library.encode("\n", add_special_tokens=False).ids
                ids = list(self._library.encode("\n" + text, add_special_tokens=False).ids)
                if ids[: len(before)] == before:
                    return ids[len(before) :]
            return list(self._library.encode(text, add_special_tokens=False).ids)

    def _panics_told(self) -> AbstractContextManager[None]:
        return told_as(TokenizerError, f"{self._path} cannot encode this text; fetch the file again")

    def to_json(self) -> str:
        """The text of a tokenizer.json that encodes as this vocabulary does."""
        return str(self._library.to_str())

    def token_id(self, piece: str) -> int | None:
        """See `Tokenizer.token_id`."""
        found: int | None = self._library.token_to_id(piece)
        return found

    def id_to_piece(self, token: int) -> str:
        """See `Tokenizer.id_to_piece`."""
        if token < 0:
            raise TokenizerError(f"token id {token} is negative; expected 0 … {self.vocab_size - 1}")
        return (self._library.id_to_token(token) or "") if token <= MAX_ID else ""

    def piece_bytes(self, token: int) -> bytes:
        """See `Tokenizer.piece_bytes`."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._piece_bytes(token)
        return known

    def _piece_bytes(self, token: int) -> bytes:
        piece = self.id_to_piece(token)
        if token in self.special_ids:
            return b""
        if self._byte_level:
            if token in self._added:
                return piece.encode()
            try:
                return bytes(BYTES_OF[c] for c in piece)
            except KeyError:  # a piece outside the byte alphabet stands for itself
                return piece.encode()
        if match := BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode()


def _added_tokens(raw: Mapping[str, Any], config: TokenizerConfig) -> list[Mapping[str, Any]]:
    """The added tokens of a tokenizer.json, then those that only its configuration adds, then the marks that neither
    has. Which of them says what a token is like: see TokenizerConfig; a mark is always special."""
    tokens = {token["content"]: token for token in raw.get("added_tokens", [])}
    for _, piece in sorted(config.added.items()):
        if config.added_outranks or piece.content not in tokens:
            tokens[piece.content] = piece._asdict()
    for mark in config.special:
        tokens[mark] = {**tokens.get(mark, AddedPiece(mark, True)._asdict()), "special": True}
    return list(tokens.values())


def _library_tokenizer(raw: Mapping[str, Any], tokens: Sequence[Mapping[str, Any]]) -> Any:
    """The library's tokenizer of what a tokenizer.json says.

    The library could read the file itself. But then it would be read twice, which is most of the time until a small
    model answers, and what was checked would be another reading than what is used. So it reads the settings alone, and
    is given the vocabulary, the merges and the added tokens as they were checked.
    """
    from tokenizers import AddedToken, Tokenizer, models

    model = raw["model"]
    settings = {**raw, "model": {**model, "vocab": {}, "merges": []}, "added_tokens": []}
    made = Tokenizer.from_str(json.dumps(settings))
    options = {name: value for name in _MODEL_OPTIONS if (value := getattr(made.model, name)) is not None}
    made.model = models.BPE(model["vocab"], _pairs(model["merges"]), **options)
    added = [AddedToken(token["content"], **{name: token[name] for name in _ADDED_OPTIONS}) for token in tokens]
    made.add_tokens(added)  # in their order, which gives those their ids that the vocabulary lacks
    return made


def _pairs(merges: Sequence[str | Sequence[str]]) -> list[Any]:
    """Merges in both spellings, "left right" and ["left", "right"], as the library takes them."""
    lines = [merge for merge in merges if isinstance(merge, str)]
    if not lines:
        return [tuple(pair) for pair in merges]
    if len(lines) != len(merges):
        raise ValueError("its merges are spelled in two ways")
    return [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]


def quick_to_read(content: str) -> str:
    """The same tokenizer.json in the spelling that is read fastest: merges as "left right", as all versions of the
    library know them, instead of ["left", "right"] (a quarter less time for 49,000 merges). Where a piece has a space
    in it only the longer spelling is possible."""
    file = json.loads(content)
    merges = file["model"].get("merges", [])
    if merges and all(isinstance(pair, list) and not any(" " in piece for piece in pair) for pair in merges):
        file["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(file, ensure_ascii=False, separators=(",", ":"))


def _begin_ids(library: Any) -> list[int]:
    """What the file's post-processor puts before a text; what it puts behind one is no beginning."""
    whole = library.encode("a", add_special_tokens=True).ids
    plain = library.encode("a", add_special_tokens=False).ids
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return list(whole[:at])
    return []


def _restate_spaces(library: Any, config: TokenizerConfig) -> None:
    """What Hugging Face's own Llama class does with a file of its kind, whatever the file says: ▁ for each space, and
    one before the text, or before every stretch of it, or none. Source: transformers, tokenization_llama.py."""
    from tokenizers import decoders, pre_tokenizers

    prefix = config.add_prefix_space is not False
    scheme = ("always" if config.space_before_every_stretch else "first") if prefix else "never"
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _decoder_kind(decoder: Any, path: Path) -> tuple[bool, bool]:
    """(is byte-level, drops one leading space) of a tokenizers decoder."""
    state = {} if decoder is None else json.loads(decoder.__getstate__())
    steps = state.get("decoders", [state]) if state else []
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    if "Metaspace" in kinds:
        step = kinds["Metaspace"]
        return False, step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
    if "ByteFallback" in kinds:
        strip = kinds.get("Strip")
        return False, strip is not None and strip["content"] == " " and strip["start"] > 0
    raise TokenizerError(
        f"{path}: decoder {'/'.join(kinds) or None!r} is not supported; expected ByteLevel, Metaspace or ByteFallback"
    )


def byte_alphabet() -> dict[int, str]:
    """Byte → the printable character byte-level BPE spells it with.

    Source: GPT-2's encoder.py, `bytes_to_unicode`: printable Latin-1 stands for itself, the rest is counted up from
    U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = sorted({*range(256)} - {*printable})
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(rest)}


BYTES_OF = {character: byte for byte, character in byte_alphabet().items()}
