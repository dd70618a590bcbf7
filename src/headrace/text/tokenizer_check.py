"""What a tokenizer.json may hold, looked at before the `tokenizers` library reads it.

The library panics on some files, and a short file can make it repeat text, or try one way to match after the other,
for ever. Allowed is what the vocabularies of this family of models have: BPE, the steps listed here, and regular
expressions of bounded cost (expression_cost.py). A file that passes can still be wrong in ways the library tells. Knows
nothing about what the steps do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.errors import TokenizerError, shown
from headrace.text.expression_cost import expression_problem
from headrace.text.tokenizer_config import MAX_ID

__all__ = ["check_tokenizer_json"]

MAX_STEPS = 16  # of one section; published ones have up to 8
MAX_GROWTH = 64  # how many times longer all replacements together may make a text
MAX_PATTERN = 20_000  # characters; the longest published one, which lists letters, has some 3,000
MAX_WORD = 1 << 16  # characters of a token's spelling
STEPS: Mapping[str, tuple[str, frozenset[str]]] = {
    "normalizer": (
        "normalizers",
        frozenset(
            {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend", "ByteLevel"}
        ),
    ),
    "pre_tokenizer": (
        "pretokenizers",
        frozenset({"ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"}),
    ),
    "post_processor": ("processors", frozenset({"ByteLevel", "TemplateProcessing"})),
    "decoder": ("decoders", frozenset({"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"})),
}


def check_tokenizer_json(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse what is beyond the above.

    Args:
        path: of the file, for the message.
        raw: its content.

    Raises:
        TokenizerError: naming what it is.
    """
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise TokenizerError(f"{path}: the model is of type {shown(kind)}; expected BPE")
    _check_vocabulary(path, model, raw.get("added_tokens"))
    growth = 1.0
    for section, (inner, allowed) in STEPS.items():
        for number, step in enumerate(_steps(raw.get(section), inner)):
            kind = step.get("type")
            if number >= MAX_STEPS:
                raise TokenizerError(f"{path}: {section} has more than {MAX_STEPS} steps")
            if not isinstance(kind, str) or kind not in allowed:
                known = ", ".join(sorted(allowed))
                raise TokenizerError(f"{path}: {section} {shown(kind)} is not supported; expected one of {known}")
            growth *= _growth(path, step)
            if kind == "TemplateProcessing":
                _check_template(path, step)
    if growth > MAX_GROWTH:
        raise TokenizerError(f"{path} makes a text {growth:.0f} times longer; expected at most {MAX_GROWTH} times")


def _steps(section: Any, inner: str, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The steps of a section, those inside sequences too."""
    if section is None:
        return
    if isinstance(section, dict) and section.get("type") == "Sequence" and isinstance(section.get(inner), list):
        for step in section[inner] if depth < 3 else [{}]:
            yield from _steps(step, inner, depth + 1)
    else:
        yield section if isinstance(section, dict) else {}


def _check_vocabulary(path: Path, model: Mapping[str, Any], added: Any) -> None:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{path}: the vocabulary is {shown(vocab)}; expected an object of tokens and ids")
    unknown = model.get("unk_token")
    if unknown is not None and not (isinstance(unknown, str) and unknown in vocab):
        raise TokenizerError(f"{path}: the unknown token is {shown(unknown)}, which is no token")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):  # the library aborts over some of them
        if model.get(key):
            raise TokenizerError(f"{path}: {key} is {shown(model[key])}; expected none")
    ids = vocab.values()
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > MAX_ID:
        piece, token = next((p, i) for p, i in vocab.items() if type(i) is not int or not 0 <= i <= MAX_ID)
        raise TokenizerError(f"{path}: token {shown(piece)} has id {shown(token)}; expected 0 to {MAX_ID}")
    if max(map(len, vocab)) > MAX_WORD:
        raise TokenizerError(f"{path}: a token has more than {MAX_WORD} characters")
    for entry in added if isinstance(added, list) else []:
        token, content = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if type(token) is not int or not 0 <= token <= MAX_ID or not isinstance(content, str) or not content:
            raise TokenizerError(f"{path}: added token {shown(content)} has id {shown(token)}; expected 0 to {MAX_ID}")


def _growth(path: Path, step: Mapping[str, Any]) -> float:
    """How many times longer a step can make a text; its expression is looked at on the way."""
    pattern = step.get("pattern")
    given = pattern.get("String", pattern.get("Regex")) if isinstance(pattern, dict) else None
    if pattern is not None and (not isinstance(given, str) or not given or len(given) > MAX_PATTERN):
        raise TokenizerError(f"{path} has a pattern {shown(pattern)}; expected 1 to {MAX_PATTERN} characters")
    expression = given if isinstance(pattern, dict) and "String" not in pattern else None
    if expression is not None and (problem := expression_problem(expression)):
        raise TokenizerError(f"{path} {problem}, which can take for ever")
    if step.get("type") != "Replace":
        return 1.0
    content = step.get("content")
    least = len(given) if isinstance(pattern, dict) and "String" in pattern and given else 1
    return max(1.0, len(content) / least) if isinstance(content, str) else 1.0


def _check_template(path: Path, step: Mapping[str, Any]) -> None:
    """The library takes it on trust that a template's tokens are there, and that each has as many ids as spellings."""
    known = step.get("special_tokens")
    for part in [*_list(step.get("single")), *_list(step.get("pair"))]:
        named = part.get("SpecialToken") if isinstance(part, dict) else None
        if named is not None and not (isinstance(known, dict) and isinstance(named, dict) and named.get("id") in known):
            raise TokenizerError(f"{path}: the post-processor puts {shown(named)}, which it does not define")
    for name, token in known.items() if isinstance(known, dict) else ():
        ids = _list(token.get("ids")) if isinstance(token, dict) else []
        tokens = _list(token.get("tokens")) if isinstance(token, dict) else []
        if len(ids) != len(tokens) or not all(type(i) is int and 0 <= i <= MAX_ID for i in ids):
            raise TokenizerError(
                f"{path}: the post-processor's token {shown(name)} has ids {shown(ids)}; expected one a piece"
            )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
