"""A GGUF file's vocabulary as the files a bundle carries, so that running needs no GGUF.

    tokenizer.ggml.model "llama"  →  tokenizer.model, a SentencePiece BPE with the same pieces, scores and kinds
    tokenizer.ggml.model "gpt2"   →  tokenizer.json, byte-level BPE with the same merges and the pre-tokenizer that
                                     tokenizer.ggml.pre names

Works on plain metadata; knows nothing about reading GGUF files. Keys: the GGUF specification in ggml-org/ggml,
docs/gguf.md; kinds of token are SentencePiece's own numbers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from headrace.baichuan import is_second_generation
from headrace.errors import TokenizerError, did_you_mean, shown
from headrace.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from headrace.text.tokenizer_config import AddedPiece, TokenizerConfig

__all__ = ["gguf_vocabulary"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

LARGEST_SCORE = 3e38  # of a float32
MARK_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_vocabulary(metadata: Mapping[str, Any]) -> tuple[str, bytes, TokenizerConfig]:
    """The file name, the file's content and the settings of a GGUF file's vocabulary.

    Args:
        metadata: GGUF keys with their values as Python numbers, strings and lists.

    Raises:
        TokenizerError: the vocabulary is missing, contradicts itself, or is of a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"llama": _sentencepiece, "gpt2": _byte_level}
    if not isinstance(kind, str) or kind not in makers:
        raise TokenizerError(f"tokenizer.ggml.model is {kind!r}; expected one of {', '.join(makers)}")
    pieces = _list(metadata, "tokens", str)
    kinds = _list(metadata, "token_type", int) if "tokenizer.ggml.token_type" in metadata else [NORMAL] * len(pieces)
    if len(kinds) != len(pieces):
        raise TokenizerError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(pieces)} tokens")
    name, content = makers[kind](metadata, pieces, kinds)
    return name, content, _config(metadata, kind, pieces, kinds)


def _sentencepiece(metadata: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> tuple[str, bytes]:
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    scores = _list(metadata, "scores", (float, int))
    if len(scores) != len(pieces):
        raise TokenizerError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(pieces)} tokens")
    if not all(abs(score) < LARGEST_SCORE for score in scores):
        raise TokenizerError("tokenizer.ggml.scores has a score beyond float32; convert the model again")
    unknown = _unknown(metadata, pieces, kinds)
    model = proto.ModelProto()
    seen: set[str] = set()
    for i, (piece, score, kind) in enumerate(zip(pieces, scores, kinds, strict=True)):
        if not piece or piece in seen:  # padding; SentencePiece wants every spelling once
            piece, kind = f"<unused{i}>", UNUSED
        if i == unknown or kind == UNKNOWN:
            kind = UNKNOWN if i == unknown else UNUSED
        if piece in seen or not NORMAL <= kind <= BYTE:
            raise TokenizerError(f"token {i} is {piece!r} of type {kind}; expected a new spelling of type 1 … 6")
        seen.add(piece)
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = BYTE in kinds
    trainer.unk_id, trainer.pad_id = unknown, -1
    trainer.unk_piece = pieces[unknown]
    for mark in ("bos", "eos"):
        token = _token(metadata, f"{mark}_token_id", pieces)
        usable = token is not None and kinds[token] == CONTROL
        setattr(trainer, f"{mark}_id", token if usable else -1)
        if token is not None and usable:
            setattr(trainer, f"{mark}_piece", pieces[token])
    normalizer.name = "identity"
    # Files that do not say so: llama.cpp puts a space before a text, and so does the first Baichuan (its published ids
    # match only with one), but not the second.
    second = _is_baichuan(metadata) and is_second_generation(len(pieces))
    normalizer.add_dummy_prefix = _flag(metadata, "add_space_prefix", not second)
    normalizer.remove_extra_whitespaces = _flag(metadata, "remove_extra_whitespaces", False)
    normalizer.escape_whitespaces = True
    return "tokenizer.model", model.SerializeToString(deterministic=True)


def _unknown(metadata: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> int:
    """The one unknown token that SentencePiece wants: as the file names it, else the first of that kind.

    Converters give padding at a vocabulary's end that kind too (Phi-3: 53 of them); it stands for no text.
    """
    named = _token(metadata, "unknown_token_id", pieces)
    if named is not None and kinds[named] in (UNKNOWN, CONTROL):
        return named
    if UNKNOWN not in kinds:
        raise TokenizerError("the vocabulary has no unknown token (token_type 2); expected one")
    return kinds.index(UNKNOWN)


def _byte_level(metadata: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> tuple[str, bytes]:
    pre = _pre_tokenizer(metadata)
    vocabulary: dict[str, int] = {}
    added = []
    for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        if piece and piece not in vocabulary:
            vocabulary[piece] = i
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and piece:
            added.append(_added_token(i, piece, special=kind != USER_DEFINED))
    merges = []
    for merge in _list(metadata, "merges", str):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise TokenizerError(f"tokenizer.ggml.merges has {merge!r}; expected two tokens that make a third")
        merges.append([left, right])
    cuts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    prefix = _flag(metadata, "add_space_prefix", False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": False}
    if prefix:  # the space has to be there before the text is cut
        raise TokenizerError("tokenizer.ggml.add_space_prefix is true; expected false for a byte-level vocabulary")
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre.composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.whole_words_first,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return "tokenizer.json", json.dumps(document, ensure_ascii=False).encode()


def _added_token(token: int, content: str, *, special: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": content, **plain, "special": special}


def _config(metadata: Mapping[str, Any], kind: str, pieces: list[str], kinds: list[int]) -> TokenizerConfig:
    marks = {name: _token(metadata, key, pieces) for name, key in MARK_KEYS.items()}
    bos = marks["bos_token"]
    ends = [_token(metadata, key, pieces) for key in EOS_KEYS]
    keys = ("tokenizer.chat_template", "tokenizer.chat_template.tool_use")
    template, with_tools = (text if isinstance(text := metadata.get(key), str) and text else None for key in keys)
    if template is None and (others := sorted(key for key in metadata if key.startswith(f"{keys[0]}."))):
        raise TokenizerError(
            f"there is {others[0]} and no {keys[0]}, the one for conversations; convert the model again"
        )
    # SentencePiece vocabularies begin a text with bos, but not Baichuan's; few byte-level ones do.
    begins = not _is_baichuan(metadata) if kind == "llama" else _pre_tokenizer(metadata).begins
    # SentencePiece keeps control tokens in the model; one that ends a text must be special whatever its kind says.
    loose = {i for i in ends if i is not None and kinds[i] != CONTROL}
    return TokenizerConfig(
        marks={name: pieces[i] for name, i in marks.items() if i is not None},
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        add_bos=_flag(metadata, "add_bos_token", begins) and bos is not None,
        added={i: AddedPiece(pieces[i], True) for i in sorted(loose)},
        chat_template=template,
        tool_template=with_tools,
    )


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        hint = did_you_mean(str(name), PRE_TOKENIZERS)
        raise TokenizerError(f"tokenizer.ggml.pre is {name!r}; expected one of {known}{hint}")
    return PRE_TOKENIZERS[name]


def _is_baichuan(metadata: Mapping[str, Any]) -> bool:
    # Baichuan's texts begin with no bos; its early GGUF files do not say so.
    return metadata.get("general.architecture") == "baichuan"


def _list(metadata: Mapping[str, Any], name: str, of: type | tuple[type, ...]) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values or not all(isinstance(v, of) for v in values):
        raise TokenizerError(f"tokenizer.ggml.{name} is missing or not a list of one kind; convert the model again")
    return values


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer.ggml.{name} is {value!r}; expected true or false")
    return value


def _token(metadata: Mapping[str, Any], name: str, pieces: list[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < len(pieces):
        raise TokenizerError(f"tokenizer.ggml.{name} is {shown(value)}; expected 0 … {len(pieces) - 1}")
    return value
