"""Grammars: an answer that is always valid JSON of a schema, or matches a regular expression or a Lark grammar.

    Grammars (of a vocabulary) ─► Grammar (compiled) ─► GrammarState (of one answer): which tokens may come next

llguidance does the work (`pip install headrace[grammar]`). The answer ends as soon as nothing may follow. Where it ends
at max_tokens or the context's end it is not whole, and its finish says so. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import UserError, did_you_mean
from headrace.panics import told_as
from headrace.text.tokenizer import Tokenizer

__all__ = ["KINDS", "Grammar", "GrammarState", "Grammars"]

KINDS = ("json_schema", "json_object", "regex", "lark")
# Between JSON's tokens: enough for indented text, too little for a model that would put spaces for ever.
WHITESPACE = r"[ \n\t]{1,32}"
MAX_SOURCE = 1 << 18  # characters
# Of LLParserLimits. Fixed text is copied whole with each of its characters, 165 MB for what the library's own million
# of initial fuel lets through; schemas of 200,000 characters need 150,000.
LIMITS = {"initial_lexer_fuel": 250_000, "max_lexer_states": 100_000}
# Where only one byte can follow, llguidance seeks the next one too: for ever in a grammar without an end, /x+/ /x+/.
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'


class Grammars:
    """Compiles grammars for one vocabulary.

    Args:
        tokenizer: the vocabulary; tokens without text of their own never come.
        vocab_size: V, the width of the logits.
        stop_ids: tokens that end an answer; they may come where the grammar is complete.

    Raises:
        UserError: llguidance is not installed, or there is no token that could end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> None:
        self._library = _llguidance()
        self.vocab_size = vocab_size
        known = min(tokenizer.vocab_size, vocab_size)
        self.stop_ids = tuple(sorted(i for i in stop_ids if i < known))
        if not self.stop_ids:
            raise UserError("a grammar needs a token that ends an answer, and this model has none; it cannot be used")
        pieces = [tokenizer.piece_bytes(i) for i in range(known)]
        special = [i for i, piece in enumerate(pieces) if not piece]
        for i in special:  # a name that no text can spell: it begins with a byte that UTF-8 does not have
            pieces[i] = b"\xff<%d>" % i
        vocabulary = _Vocabulary(tokenizer, pieces, special, self.stop_ids[0])
        self.tokenizer = self._library.LLTokenizer(
            self._library.TokenizerWrapper(vocabulary), eos_token=list(self.stop_ids)
        )
        vocabulary.spell = lambda raw: [int(i) for i in self.tokenizer.greedy_tokenize(raw.decode("utf-8", "replace"))]

    def compile(self, kind: str, source: str = "") -> Grammar:
        """A grammar.

        Args:
            kind: "json_schema", "json_object" (any object), "regex" or "lark".
            source: the schema as JSON text, the expression (of the whole answer) or the grammar.

        It is tried in a child process first (`grammar_trial.py`), since what it takes cannot be told from its text.

        Raises:
            UserError: there is no such kind, the source is wrong, or it takes too much memory or time.
        """
        if kind not in KINDS:
            raise UserError(f"grammar {kind!r} is unknown{did_you_mean(kind, KINDS)}; expected {', '.join(KINDS)}")
        if len(source) > MAX_SOURCE:
            raise UserError(f"the {kind} grammar has {len(source)} characters; expected at most {MAX_SOURCE}")
        with told_as(UserError, f"the {kind} grammar is not possible"):
            return self._compiled(kind, source)

    def _compiled(self, kind: str, source: str) -> Grammar:
        # Late, since a chat without a grammar need not wait for what starts processes.
        from headrace.runtime.grammar_source import check_lark, check_regex, check_schema
        from headrace.runtime.grammar_trial import try_grammar

        matcher = self._library.LLMatcher
        if kind == "regex":
            check_regex(source)
            text = matcher.grammar_from_regex(source)
        elif kind == "lark":
            check_lark(source)
            text = matcher.grammar_from_lark(source + NO_FORCING)
        else:
            try:
                schema = json.loads(source) if kind == "json_schema" else {"type": "object"}
                check_schema(schema)
                text = matcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"the JSON schema cannot be read ({_line(error)}); expected a JSON object") from None
        try_grammar(text, LIMITS)
        compiled = matcher(self.tokenizer, text, log_level=0, limits=self._library.LLParserLimits(**LIMITS))
        compiled.compute_bitmask()  # where answers begin: what cannot be followed there is told before one is begun
        if compiled.is_error():
            raise UserError(f"the {kind} grammar is not possible: {_line(compiled.get_error())}")
        return Grammar(self, compiled)


class Grammar:
    """A compiled grammar; each answer begins a state of its own."""

    def __init__(self, grammars: Grammars, compiled: Any) -> None:
        self._grammars = grammars
        self._compiled = compiled  # at its beginning, for ever

    def start(self) -> GrammarState:
        """The state of a new answer."""
        return GrammarState(self._grammars.vocab_size, self._compiled.deep_copy())

    def accepts(self, text: str) -> bool:
        """Whether the text is complete by this grammar."""
        matcher = self._compiled.deep_copy()
        return bool(matcher.consume_tokens(self._grammars.tokenizer.tokenize_str(text)) and matcher.is_accepting())


class GrammarState:
    """Where one answer is in its grammar."""

    def __init__(self, vocab_size: int, matcher: Any) -> None:
        self._vocab_size = vocab_size
        self._matcher = matcher
        self._allowed = np.zeros(vocab_size, np.bool_)

    def allowed(self) -> NDArray[np.bool_]:
        """bool (V,): the tokens that may come next; overwritten by the next call.

        Raises:
            UserError: the grammar has more possibilities here than llguidance follows.
        """
        with told_as(UserError, "the grammar cannot be followed here"):
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._failed()
        found = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        self._allowed[: len(found)] = found
        return self._allowed

    def take(self, token: int) -> bool:
        """The token came: whether the answer is complete and nothing can follow.

        Raises:
            UserError: the token was not allowed, or there are more possibilities behind it than llguidance follows.
        """
        with told_as(UserError, "the grammar cannot be followed here"):
            taken = self._matcher.consume_token(token)
        if not taken:
            raise self._failed()
        return bool(self._matcher.is_stopped())

    def _failed(self) -> UserError:
        return UserError(f"the grammar cannot be followed here; make it simpler: {_line(self._matcher.get_error())}")


class _Vocabulary:
    """A vocabulary as llguidance wants it.

    Attributes:
        spell: bytes → some ids of exactly these bytes; set once the library knows the vocabulary.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self.spell: Callable[[bytes], list[int]] | None = None
        self._tokenizer = tokenizer

    def __call__(self, raw: bytes) -> list[int]:
        """The ids that the vocabulary has for these bytes: those the model would write. SentencePiece may put a space
        before a text, which then is no part of it."""
        ids = self._tokenizer.encode(raw.decode("utf-8", "replace"))
        pieces = [self.tokens[i] for i in ids]
        if b"".join(pieces) == raw or self.spell is None:
            return ids
        if b"".join(pieces) == b" " + raw:
            return [*self.spell(pieces[0][1:]), *ids[1:]]
        return self.spell(raw)


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UserError(
            "grammars need llguidance, which is not installed; run: pip install 'headrace[grammar]'"
        ) from None
    module: ModuleType = llguidance
    return module


def _line(message: object) -> str:
    return " ".join(str(message).split())[:300]
