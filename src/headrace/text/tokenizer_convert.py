"""A SentencePiece BPE model as a tokenizer.json that gives the same ids for every text.

Qualcomm's Genie reads nothing but tokenizer.json, and Baichuan2 comes as SentencePiece alone. What cannot be converted
exactly is refused. Knows nothing about Genie.

SentencePiece joins, again and again, the two neighbours whose joint piece has the highest score; it has no list of
joins. A tokenizer.json has such a list, in order of preference. So every way to cut a piece into two pieces becomes
a join, in order of the piece's score. Neither cuts the text into words first; a space is spelled ▁.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.errors import TokenizerError
from headrace.text.tokenizer_config import TokenizerConfig

__all__ = ["sentencepiece_to_tokenizer_json"]

SPACE = "\u2581"  # ▁, how SentencePiece spells a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Three of Unicode's non-characters, which no text holds; they mark how a user-defined piece is spelled: see `_spaces`.
PIECE_MARK = "\ufdd0\ufdd1\ufdd2"


def sentencepiece_to_tokenizer_json(
    model: Path, special: Mapping[int, str | None] | None = None, config: TokenizerConfig | None = None
) -> str:
    """The text of a tokenizer.json with the same encoding as a tokenizer.model.

    Args:
        model: a SentencePiece file.
        config: says which stretches of text get a space before them; None: every one, if the model says so.
        special: further ids that become special tokens, so that their spelling in a text gives their id (Baichuan2's
            turn ids 195 and 196); None takes the spelling the vocabulary has, and ids beyond the vocabulary need one.

    Returns:
        JSON text.

    Raises:
        TokenizerError: the file is damaged, is no BPE model, or has something that cannot be converted exactly.
    """
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    spec = proto.ModelProto()
    try:
        spec.ParseFromString(model.read_bytes())
    except Exception as error:  # protobuf's DecodeError, without importing protobuf for its name
        raise TokenizerError(f"{model} is not a SentencePiece model ({error}); fetch the file again") from None
    if not all(isinstance(piece.piece, str) for piece in spec.pieces):  # protobuf gives bytes that are no text as bytes
        raise TokenizerError(f"{model} has pieces that are not UTF-8; fetch the file again")
    config = config or TokenizerConfig()
    defined = {i: piece.piece for i, piece in enumerate(spec.pieces) if piece.type == USER_DEFINED}
    prefix = config.add_prefix_space is not False and (config.is_llama or spec.normalizer_spec.add_dummy_prefix)
    _check(model, spec, prefix)
    if defined and prefix:
        if config.is_llama:  # its space comes after these pieces are cut out, so a text that begins with one gets none
            raise TokenizerError(
                f"{model} has user-defined pieces, and {config.tokenizer_class} puts a space before a text, which "
                "tokenizer.json cannot say of both; expected add_prefix_space: false in tokenizer_config.json"
            )
        defined = {i: PIECE_MARK + piece for i, piece in defined.items()}

    vocabulary = {defined.get(i, piece.piece): i for i, piece in enumerate(spec.pieces)}
    added = {i: _added(i, p.piece, True) for i, p in enumerate(spec.pieces) if p.type in (CONTROL, UNKNOWN)}
    # Found after spaces became ▁, as SentencePiece does it.
    added |= {i: _added(i, spelling, False) | {"normalized": True} for i, spelling in defined.items()}
    for i, spelling in (special or {}).items():
        known = spec.pieces[i].piece if 0 <= i < len(spec.pieces) else None
        spelling = spelling or known
        if spelling is None or (known is not None and spelling != known):
            raise TokenizerError(
                f"special token {i} is spelled {spelling!r}; the vocabulary has {known!r} there; "
                "expected the vocabulary's own spelling, or a new one beyond its end"
            )
        added[i] = _added(i, spelling, True)

    steps, before = _spaces(config, prefix, bool(defined))
    ends: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next(p.piece for p in spec.pieces if p.type == UNKNOWN)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added[i] for i in sorted(added)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                *([_replace(PIECE_MARK, "")] if defined else []),
                _replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *ends,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,  # SentencePiece makes one unknown token of neighbours
            "byte_fallback": spec.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _joins(spec),
        },
    }
    return json.dumps(document, ensure_ascii=False)


def _spaces(config: TokenizerConfig, prefix: bool, defined: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The normalizer's steps and the pre-tokenizer that spell spaces ▁ and put one before a text.

    SentencePiece puts it before each stretch between special tokens; so does a normalizer's Prepend. Prepend would also
    be applied to the spelling of a user-defined piece, which then would be found behind a space alone: such a piece is
    spelled with `PIECE_MARK` in front, and "▁" with `PIECE_MARK` behind it, which then only these spellings have, is
    taken away again.
    """
    spell = _replace(" ", SPACE)
    if not prefix:
        return [spell], None
    if config.is_llama:
        scheme = "always" if config.space_before_every_stretch else "first"
        return [spell], {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return [
        {"type": "Prepend", "prepend": SPACE},
        spell,
        *([_replace(SPACE + PIECE_MARK, "")] if defined else []),
    ], None


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _joins(spec: Any) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the best first."""
    rank = {p.piece: i for i, p in enumerate(spec.pieces) if p.type == NORMAL}
    joins = []
    for piece, place in rank.items():
        score = spec.pieces[place].score
        for cut in range(1, len(piece)):
            left, right = rank.get(piece[:cut]), rank.get(piece[cut:])
            if left is not None and right is not None:
                # Equal scores: SentencePiece takes the leftmost pair in the text, which no list can say; the order
                # of the vocabulary stands in, and real vocabularies have no equal scores among joined pieces.
                joins.append((-score, place, left, right, piece[:cut], piece[cut:]))
    return [[left, right] for *_, left, right in sorted(joins)]


def _check(model: Path, spec: Any, prefix: bool) -> None:
    """Refuses what a tokenizer.json cannot say, or not exactly.

    Raises:
        TokenizerError: saying what it is.
    """
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    kinds = [p.type for p in spec.pieces]
    if trainer.model_type != trainer.BPE:
        name = trainer.ModelType.Name(trainer.model_type).lower()
        raise TokenizerError(f"{model} is a {name} model; expected BPE, the one kind that can be converted exactly")
    if kinds.count(UNKNOWN) != 1:
        raise TokenizerError(f"{model} has {kinds.count(UNKNOWN)} unknown tokens; expected one")
    problems = {
        f"normalization {normalizer.name!r}": bool(normalizer.precompiled_charsmap),
        "removal of extra spaces": normalizer.remove_extra_whitespaces,
        "spaces that are not escaped": not normalizer.escape_whitespaces,
        "a space put behind the text": trainer.treat_whitespace_as_suffix and prefix,
        "unused pieces that its joins lead to": _unused_is_joined(spec),
    }
    for what, present in problems.items():
        if present:
            raise TokenizerError(
                f"{model} has {what}, which tokenizer.json cannot say exactly; expected a model without"
            )


def _unused_is_joined(spec: Any) -> bool:
    """Whether two pieces join to an unused one, which SentencePiece then cuts again; padding is never joined."""
    known = {p.piece for p in spec.pieces if p.type in (NORMAL, UNUSED)}
    unused = (p.piece for p in spec.pieces if p.type == UNUSED)
    return any(piece[:cut] in known and piece[cut:] in known for piece in unused for cut in range(1, len(piece)))


def _added(token: int, content: str, special: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": content, **plain, "special": special}
