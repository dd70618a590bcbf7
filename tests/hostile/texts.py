"""Hostile vocabularies, chat templates and grammars: what comes with a model, or from whoever asks it something."""

from __future__ import annotations

import importlib
import json
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import HeadraceError, UserError
from headrace.runtime.grammar import Grammars
from headrace.text import sandbox
from headrace.text.template import ChatTemplate
from headrace.text.tokenizer_convert import sentencepiece_to_tokenizer_json
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer
from headrace.text.turns import Message, turn_format
from tests.hostile.chance import NAMES, NUMBERS, Good, Rng, any_json, changed_json, damaged
from tests.hostile.format import Format
from tests.text.vocabularies import byte_level_metadata, byte_level_tokenizer, sentencepiece_model

SAID = (
    "",
    "a",
    " the river\n\n百川 😀 <|im_end|> </s> 12345",
    "\ud800<0x0A>\x00▁ \ufdd0",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
)


def prepare(folder: Path) -> Good:
    """Two vocabularies, in folders of their own."""
    for name in ("json", "model"):
        (folder / name).mkdir(parents=True)
    byte_level_tokenizer(folder / "json")
    (folder / "model" / "tokenizer.model").write_bytes(sentencepiece_model())
    added = {"420": {"content": "<tool>", "special": True}, "421": {"content": "word", "lstrip": True}}
    config = {"add_bos_token": False, "added_tokens_decoder": added, "chat_template": "{{ messages }}"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "json", folder / "byte")
    return {
        "tokenizer.json": (folder / "json" / "tokenizer.json").read_bytes(),
        "tokenizer.model": (folder / "model" / "tokenizer.model").read_bytes(),
        "tokenizer_config.json": (folder / "model" / "tokenizer_config.json").read_bytes(),
        "gguf": json.dumps(byte_level_metadata()).encode(),
    }


def _open(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert 0 <= tokenizer.vocab_size < 1 << 24
    for text in SAID:
        for special in (False, True):
            ids = tokenizer.encode(text, special=special, continues=special)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids)
    for i in (0, 1, tokenizer.vocab_size - 1, tokenizer.vocab_size, 1 << 40):
        tokenizer.piece_bytes(i)
        tokenizer.id_to_piece(i)
    tokenizer.token_id("a")
    with suppress(UserError):
        turn_format(tokenizer, {}).render([Message("user", "a")], 1000)


# tokenizer.json

PARTS: tuple[Any, ...] = (
    None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "(?=(a*)*b)"}, "behavior": "Removed", "invert": True},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Contiguous", "invert": False},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}, {"type": "BertPreTokenizer"},
    {"type": "Punctuation", "behavior": "Isolated"}, {"type": "NFC"}, {"type": "Lowercase"}, {"type": "Nmt"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "a" * 1000},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "Prepend", "prepend": "▁"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Precompiled", "precompiled_charsmap": ""},
    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
     "special_tokens": {"x": {"id": "x", "ids": [1 << 31], "tokens": ["x"]}}},
    {"type": "BPEDecoder", "suffix": ""}, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "CTC"},
)  # fmt: skip
MODELS = (
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", 1e300], ["", 0.0]], "byte_fallback": True},
    {"type": "WordLevel", "vocab": {"a": 0, "b": 1 << 31}, "unk_token": "a"},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 1 << 40,
     "continuing_subword_prefix": "##"},
    {"type": "BPE", "vocab": {"a": 0, "aa": 4294967295}, "merges": [["a", "a"]], "dropout": 2.0},
    {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"], "byte_fallback": True},
)  # fmt: skip


def tokenizer_json(rng: Rng, good: Good) -> bytes:
    """Steps in any order, models of other kinds, ids and spellings that do not fit each other."""
    if rng.randrange(8) == 0:
        return damaged(rng, good["tokenizer.json"])
    raw = json.loads(good["tokenizer.json"])
    for step in rng.sample(("normalizer", "pre_tokenizer", "post_processor", "decoder"), rng.randrange(3)):
        parts = [rng.choice(PARTS) for _ in range(rng.randrange(4))]
        names = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
        raw[step] = rng.choice((*parts, {"type": "Sequence", names.get(step, "processors"): parts}))
    kind = rng.randrange(8)
    if kind == 0:
        raw["model"] = rng.choice(MODELS)
    elif kind == 1:
        raw["added_tokens"] = changed_json(rng, raw["added_tokens"])
    elif kind == 2:
        raw["model"]["vocab"] |= {rng.choice(NAMES): rng.choice(NUMBERS) & 0xFFFFFFFF for _ in range(3)}
    elif kind == 3:
        raw["model"]["merges"] = changed_json(rng, raw["model"]["merges"])
    elif kind == 4:
        raw["truncation"] = {"max_length": rng.choice(NUMBERS), "strategy": "LongestFirst", "stride": 9,
                             "direction": "Right"}  # fmt: skip
    elif kind == 5:
        raw["model"] |= {rng.choice(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                                     "fuse_unk", "byte_fallback", "ignore_merges")): any_json(rng)}  # fmt: skip
    elif kind == 6:
        raw = changed_json(rng, raw)
    return json.dumps(raw).encode()


# tokenizer.model


@cache
def _proto() -> Any:
    return importlib.import_module("sentencepiece.sentencepiece_model_pb2")


def tokenizer_model(rng: Rng, good: Good) -> bytes:
    """A SentencePiece model with odd pieces, ids and rules of normalization."""
    if rng.randrange(3) == 0:
        return damaged(rng, good["tokenizer.model"])
    model = _proto().ModelProto()
    model.ParseFromString(good["tokenizer.model"])
    spellings = ("", "a", "▁", "<0x41>", "<0xZZ>", "\x00", "😀", "a" * 9000, "</s>", "<unk>")
    scores = (0.0, -1e38, 1e38, float("inf"), float("-inf"), float("nan"), -3.5)
    for _ in range(rng.randint(1, 5)):
        piece = rng.choice(model.pieces)
        kind = rng.randrange(9)
        if kind == 0:
            piece.piece = rng.choice(spellings)
        elif kind == 1:
            piece.score = rng.choice(scores)
        elif kind == 2:
            piece.type = rng.randint(1, 6)
        elif kind == 3:
            model.pieces.add(piece=rng.choice(spellings), score=rng.choice(scores), type=rng.randint(1, 6))
        elif kind == 4:
            del model.pieces[rng.randrange(len(model.pieces)) :]
            model.pieces.add(piece="<unk>", score=0, type=2)
        elif kind == 5:
            name = rng.choice(("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size", "model_type", "byte_fallback",
                               "treat_whitespace_as_suffix"))  # fmt: skip
            setattr(model.trainer_spec, name, rng.choice((1, 1, 2, 3)))
        elif kind == 6:
            name = rng.choice(("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"))
            setattr(model.normalizer_spec, name, bool(rng.randrange(2)))
        elif kind == 7:
            model.normalizer_spec.precompiled_charsmap = rng.choice((
                b"", b"\0", b"\4\0\0\0" + rng.randbytes(4) + b"a\0b\0", (1024).to_bytes(4,
                "little") + rng.randbytes(1100),
                rng.randbytes(40), b"\xff" * 40,
            ))  # fmt: skip
        else:
            model.denormalizer_spec.precompiled_charsmap = rng.randbytes(rng.choice((0, 4, 40)))
    data = model.SerializeToString()
    return bytes(data if rng.randrange(4) else damaged(rng, data))


def _open_model(path: Path) -> None:
    _open(path.parent)
    sentencepiece_to_tokenizer_json(path)


def tokenizer_config(rng: Rng, good: Good) -> bytes:
    """What stands beside a vocabulary."""
    if rng.randrange(8) == 0:
        return damaged(rng, good["tokenizer_config.json"])
    raw = json.loads(good["tokenizer_config.json"])
    keys = ("bos_token", "eos_token", "legacy", "tokenizer_class", "additional_special_tokens", "eos_token_ids",
            "add_prefix_space", "extra_special_tokens", "image_token", "99999999999", "422", "-1", "٣")  # fmt: skip
    if rng.randrange(3) == 0:
        raw["tokenizer_class"] = "LlamaTokenizer"
    if rng.randrange(3) == 0:
        where = rng.choice((raw, raw["added_tokens_decoder"]))
        where[rng.choice(keys)] = rng.choice((any_json(rng), {"content": rng.choice(NAMES), "rstrip": True}))
    value = changed_json(rng, raw, keys) if rng.randrange(20) else any_json(rng)
    return json.dumps(value).encode()


def gguf_vocabulary(rng: Rng, good: Good) -> bytes:
    """The metadata of a GGUF file, as JSON."""
    raw = json.loads(good["gguf"])
    if rng.randrange(2):
        raw |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5] * len(raw["tokenizer.ggml.tokens"])}
        raw["tokenizer.ggml.token_type"][5] = 2
    keys = tuple(f"tokenizer.ggml.{n}" for n in ("unknown_token_id", "pre", "add_space_prefix", "eot_token_id"))
    return json.dumps(changed_json(rng, raw, keys)).encode()


def _open_gguf_vocabulary(path: Path) -> None:
    out = path.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    save_tokenizer(path, json.loads(path.read_bytes()), out)
    _open(out)


# Templates

VALUES = (
    "ns.a", "ns.b", "messages", "messages[0].content", "1", "0", "-1", "99999", "2.5", "'a'", "''", "[]", "()", "{}",
    "range(99999)", "none", "true", "loop", "loop.index", "varargs", "kwargs", "cycler(1, 2)", "joiner", "namespace",
    "x", "bos_token", "f", "caller", "self", "dict", "lipsum", "'%s' * 9", "'{:>9}'", "''.__class__", "'a'.format",
)  # fmt: skip
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or", "is")
FILTERS = (
    "list", "length", "join", "join('a')", "batch(2)", "slice(3)", "center(99)", "sort", "unique", "groupby('a')",
    "sum",
    "map('upper')", "map(attribute='x')", "select('in', ns.a)", "reject", "tojson", "tojson(indent=9)", "string", "int",
    "int(0, 16)", "float", "round(3)", "round(99)", "replace('a', ns.b)", "reverse", "first", "last", "min", "max",
    "dictsort", "items", "attr('__class__')", "format(1)", "indent(9)", "wordwrap(1)", "wordcount", "title", "trim",
    "default(1)", "random", "truncate(3)", "escape", "urlencode", "filesizeformat", "abs", "capitalize", "no_such",
    "sum(start=[])", "tojson | length", "selectattr('a', 'equalto', ns.a)", "map('list')", "xmlattr",
)  # fmt: skip
METHODS = (
    "upper()", "split('a')", "join(ns.a)", "replace('a', ns.b)", "format(ns.a)", "format(*ns.a)", "zfill(99)",
    "items()",
    "get('a')", "startswith('a')", "splitlines()", "count('a')", "index(1)", "append(1)", "update({})",
    "translate({97: ns.a})",
    "encode()", "expandtabs(99)", "ljust(99)", "partition('a')", "__init__", "__class__.__mro__", "mro()", "gi_frame",
    "__globals__", "copy()", "keys()", "strip('a')", "format_map({})",
)  # fmt: skip


def _expression(rng: Rng, depth: int = 0) -> str:
    kind = rng.randrange(8 if depth < 4 else 2)
    if kind <= 1:
        return rng.choice(VALUES)
    inner = _expression(rng, depth + 1)
    if kind == 2:
        return f"({inner} {rng.choice(OPERATORS)} {_expression(rng, depth + 1)})"
    if kind == 3:
        return f"{inner} | {rng.choice(FILTERS)}"
    if kind == 4:
        return f"({inner}).{rng.choice(METHODS)}"
    if kind == 5:
        other = _expression(rng, depth + 1)
        return rng.choice((f"[{inner}, {other}]", f"({inner}, {other})", f"{{{inner}: {other}}}", f"dict(a={inner})"))
    if kind == 6:
        return f"f({inner})"
    return rng.choice(
        (f"({inner})[{_expression(rng, depth + 1)}]", f"({inner})[::-1]", f"(not {inner})", f"({inner}) is string")
    )


def _statement(rng: Rng, depth: int = 0) -> str:
    kind = rng.randrange(9 if depth < 3 else 3)
    value = _expression(rng)
    if kind == 0:
        return f"{{{{ {value} }}}}"
    if kind <= 2:
        return _tag(f"set ns.{rng.choice('ab')} = {value}")
    body = "".join(_statement(rng, depth + 1) for _ in range(rng.randrange(3)))
    if kind == 3:
        many = rng.choice(("range(60)", "range(3)", "messages", value, "range(99999)"))
        return _tag(f"for x in {many} {rng.choice(('', 'recursive', 'if x'))}") + body + _tag("endfor")
    if kind <= 7:
        name, more = (("if", value), ("macro", "f(x)"), ("set", "y"), ("filter", rng.choice(FILTERS)))[kind - 4]
        return _tag(f"{name} {more}") + body + _tag(f"end{name}")
    return rng.choice(
        (
            *map(_tag, ("break", "endfor", "include 'x'", "import 'x' as y")),
            _tag("generation") + "a" + _tag("endgeneration"),
            _tag("raw") + "{{{" + _tag("endraw"),
            _tag("call f(1)") + "a" + _tag("endcall"),
            "{# a #}",
        )
    )


def _tag(text: str) -> str:
    return f"{{% {text} %}}"


def template(rng: Rng, good: Good) -> bytes:
    """Statements of a template in any order."""
    body = "".join(_statement(rng) for _ in range(rng.randint(1, 6)))
    text = "{% set ns = namespace(a=['a', {'x': 1}], b='ab') %}" + body
    return text.encode("utf-8", "replace") if rng.randrange(8) else damaged(rng, text.encode())


def _open_template(path: Path) -> None:
    seconds, steps = sandbox.MAX_SECONDS, sandbox.MAX_STEPS
    sandbox.MAX_SECONDS, sandbox.MAX_STEPS = (
        0.2,
        20_000,
    )  # so that many are tried; one operation is what can be too long
    try:
        talk = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "the sea"}]
        made = ChatTemplate(path.read_bytes().decode("utf-8", "replace"))
        text = made.render(talk, ask=True, marks={"bos_token": "<s>"})
        assert len(text) <= sandbox.MAX_CHARACTERS
    finally:
        sandbox.MAX_SECONDS, sandbox.MAX_STEPS = seconds, steps


# Grammars

TERMS = (
    "a", ".", "[a-z]", "[^a]", r"\d", r"\w", r"\p{L}", "(?i:a)", "^", "$", r"\b", "(?=a)", r"\1", "é", "百",
    r"\x{10FFFF}", r"\u0041",
)  # fmt: skip
LARK = (
    'start: "a"', "start: a b", "a: /x+/", "b: a | b", "start: start start", "start: (a|b)*", 'B: "b"~1..9999',
    "%ignore /x/",
    "start: /((a*)*)*/", "%import common.INT", "start: a~3", "a: a", "a:", "start: %json {}", 'start: "a" "b"?',
    "%llguidance {}",
    "start[max_tokens=1]: /.*/", 'x[lazy]: /.*?/', "start: <|im_end|>", "start: <[1-9]>", "start: @a",
    "B: /[^\\n]{1,99999}/",
)  # fmt: skip


def _regex(rng: Rng, depth: int = 0) -> str:
    kind = rng.randrange(6 if depth < 6 else 1)
    if kind == 0:
        return rng.choice(TERMS)
    if kind == 1:
        return _regex(rng, depth + 1) + _regex(rng, depth + 1)
    if kind == 2:
        return f"({_regex(rng, depth + 1)}|{_regex(rng, depth + 1)})"
    bound = rng.choice(("*", "+", "?", "{2}", "{0,99}", "{1000}", "{5,}", "{99999}", "*?", "&", "~"))
    return f"({_regex(rng, depth + 1)}){bound}"


def _schema(rng: Rng, depth: int = 0) -> Any:
    if depth > 4 or rng.randrange(8) == 0:
        return any_json(rng)
    kinds = ("string", "integer", "number", "boolean", "null", "array", "object")
    out: dict[str, Any] = {"type": rng.choice((*kinds, list(kinds[:3])))}
    for _ in range(rng.randrange(4)):
        key = rng.choice(("properties", "items", "anyOf", "oneOf", "allOf", "required", "enum", "const", "pattern",
        "format",
                          "minimum", "maximum", "multipleOf", "minLength", "maxLength", "minItems", "maxItems", "$ref",
                          "$defs",
                          "additionalProperties", "patternProperties", "prefixItems", "not", "if",
                          "uniqueItems"))  # fmt: skip
        if key in ("properties", "$defs", "patternProperties"):
            out[key] = {rng.choice(("a", "b", *NAMES)): _schema(rng, depth + 1) for _ in range(rng.randrange(4))}
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            out[key] = [_schema(rng, depth + 1) for _ in range(rng.randrange(4))]
        elif key in ("items", "additionalProperties", "not", "if"):
            out[key] = _schema(rng, depth + 1)
        elif key == "pattern":
            out[key] = _regex(rng)
        elif key == "$ref":
            out[key] = rng.choice(("#", "#/$defs/a", "#/properties/a", "http://x/y", "file:///etc/passwd", "#/$defs"))
        elif key == "format":
            out[key] = rng.choice(("date-time", "email", "uuid", "ipv6", "uri", "regex", "x"))
        else:
            out[key] = rng.choice((*NUMBERS, -1, 0.1, 1e-30, 1e308, any_json(rng)))
    return out


def _many(rng: Rng) -> tuple[str, str]:
    """A kind, and a source that has much of one thing: parts in a row, members, what names one another."""
    times = rng.choice((20, 100, 500, 3000))
    shape = rng.randrange(8)
    if shape == 0:
        return "regex", "a" * rng.choice((0, 5, 200)) + _regex(rng, 5) * times
    if shape == 1:
        return "regex", "|".join(f"({_regex(rng, 5)}{i})" for i in range(min(times, 500)))
    if shape == 2:
        return "json_schema", json.dumps({rng.choice(("allOf", "anyOf")): [_schema(rng, 3) for _ in range(times // 5)]})
    if shape == 3:
        patterns = [{"type": "string", "pattern": _regex(rng, 5) + str(i)} for i in range(times // 5)]
        return "json_schema", json.dumps({rng.choice(("allOf", "anyOf")): patterns})
    if shape == 4:
        named = {f"{_regex(rng, 5)}{i}": _schema(rng, 4) for i in range(times // 5)}
        where = rng.choice(("properties", "patternProperties"))
        return "json_schema", json.dumps({"type": "object", where: named, "required": rng.choice(([], list(named)))})
    if shape == 5:
        key = rng.choice(("items", "anyOf", "allOf", "prefixItems", "additionalProperties"))
        refer = [{"$ref": f"#/$defs/a{i + 1}"} for i in range(times)]
        alone = key in ("items", "additionalProperties")
        steps = {f"a{i}": {key: each if alone else [each] * rng.randint(1, 2)} for i, each in enumerate(refer)}
        return "json_schema", json.dumps({"$ref": "#/$defs/a0", "$defs": steps | {f"a{times}": _schema(rng)}})
    name = rng.choice(("a", "A"))
    behind = rng.choice(("{0}", "{0} {0}", "{0} |", "{0}?", "{0}~2..9"))
    rules = "\n".join(
        f"{name}{i}: {behind.format(f'{name}{i + 1}')}" for i in range(times // 5 if name == "A" else times)
    )
    return "lark", f"start: {name}0\n{rules}\n{name}{rules.count(':')}: /{_regex(rng, 5)}/"


def grammar(rng: Rng, good: Good) -> bytes:
    """A kind, a space, and a source."""
    kind = rng.choice(("json_schema", "regex", "lark"))
    if rng.randrange(40) == 0:  # such a one can take two seconds
        kind, source = _many(rng)
    elif kind == "json_schema":
        source = json.dumps(_schema(rng))
    elif kind == "regex":
        source = _regex(rng)
    else:
        source = "\n".join(rng.choice(LARK) for _ in range(rng.randint(1, 5)))
        if rng.randrange(3) == 0:
            source += f"\nA: /{_regex(rng)}/"
    data = f"{kind} {source}".encode("utf-8", "replace")
    return data if rng.randrange(8) else damaged(rng, data)


@cache
def _grammars(folder: Path) -> Grammars:
    tokenizer = load_tokenizer(folder / "byte")
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


def _open_grammar(path: Path) -> None:
    kind, _, source = path.read_bytes().decode("utf-8", "replace").partition(" ")
    state = _grammars(path.parent).compile(kind, source).start()
    rng = np.random.default_rng(0)
    for _ in range(8):
        allowed = np.flatnonzero(state.allowed())
        if not len(allowed) or state.take(int(rng.choice(allowed))):
            break


FORMATS = {
    "tokenizer.json": Format(prepare, tokenizer_json, "json/tokenizer.json", lambda path: _open(path.parent)),
    "tokenizer.model": Format(prepare, tokenizer_model, "model/tokenizer.model", _open_model),
    "tokenizer_config.json": Format(
        prepare, tokenizer_config, "model/tokenizer_config.json", lambda path: _open(path.parent)
    ),
    "gguf vocabulary": Format(prepare, gguf_vocabulary, "gguf.json", _open_gguf_vocabulary),
    "template": Format(prepare, template, "template", _open_template),
    "grammar": Format(prepare, grammar, "grammar", _open_grammar, harmless=(HeadraceError,)),
}
