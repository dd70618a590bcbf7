"""LanguageModel: a bundle that talks. What `headrace.load` returns; binds who answers, tokenizer and turn format."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.folder import Bundle, open_bundle
from headrace.errors import BundleError, TargetError, UserError
from headrace.progress import Progress, silent
from headrace.runners import Opener, Options, default_runner, find_runner
from headrace.runtime.answer import Answer, Answerer, Limits, Token
from headrace.runtime.chat import Chat
from headrace.runtime.context import WhenFull
from headrace.runtime.draft_model import draft_model
from headrace.runtime.engine import PREFIX_BYTES, Engine
from headrace.runtime.grammar import Grammar, Grammars
from headrace.runtime.runner import Runner
from headrace.runtime.sampling import SamplingOptions, usable_settings
from headrace.runtime.session import Session
from headrace.runtime.speculation import Speculation, prompt_lookup
from headrace.text.tokenizer import Tokenizer, check_ids
from headrace.text.tokenizer_folder import load_tokenizer
from headrace.text.turns import Message, RawTurns, TurnFormat, turn_format

__all__ = ["LanguageModel", "load"]

ReadTokenizer = Callable[[Path], Tokenizer]
SLOTS = 4
LOOKUP = "lookup"


class LanguageModel:
    """A bundle that talks, whoever computes it.

    Args:
        bundle: an opened bundle.
        answerer: continues token ids: an Engine over a runner, or Genie.
        runner: the runner's name, for saved conversations.
        read_tokenizer: gives the vocabulary in a folder.

    Attributes:
        runner: as given.
        bundle: what it was made from.
        tokenizer: text ↔ ids.
        sampling: the model's own sampling defaults.
        notes: what of the bundle's settings cannot be used and is ignored, one line each.
    """

    def __init__(
        self, bundle: Bundle, answerer: Answerer, runner: str = "", read_tokenizer: ReadTokenizer = load_tokenizer
    ) -> None:
        self.bundle = bundle
        self.runner = runner
        self.tokenizer = read_tokenizer(bundle.root)
        self._settings: Mapping[str, Any] = bundle.read_json("generation_config.json")
        self.sampling = SamplingOptions.from_generation_config(self._settings)
        self.notes = usable_settings(self._settings)[1]
        self._answerer = answerer
        self._grammars: Grammars | None = None
        self._compiling = threading.Lock()

    @cached_property
    def turns(self) -> TurnFormat:
        """How a conversation becomes ids; a template is compiled when it is first asked for.

        Raises:
            UserError: the turn ids are not the vocabulary's, or the template does not compile.
        """
        return turn_format(self.tokenizer, self._settings)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer that there is room for."""
        return self._answerer.context

    @property
    def engine(self) -> Engine:
        """What computes logits.

        Raises:
            TargetError: the runner chooses tokens by itself and gives no logits (genie).
        """
        if not isinstance(self._answerer, Engine):
            raise TargetError(
                "Genie chooses tokens by itself and gives no logits; expected another runner, such as host"
            )
        return self._answerer

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of a whole sequence, float32 (len(ids), vocab): row i predicts the token after ids[i].

        Raises:
            ContextFull: the sequence is longer than the context.
            UserError: it has a token that the model does not have.
        """
        check_ids(ids, self.bundle.config.vocab_size)
        return self.engine.score(ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        **sampling: Any,
    ) -> Iterator[Token]:
        """Continue a text or token ids, without a turn format.

        Args:
            prompt: text, or ids used as they are.
            max_tokens: most tokens of the answer.
            stop: strings that end it.
            logprobs: tell how likely each token was, and so many of the likeliest; None: tell nothing.
            grammar: what the answer must be, from `grammar`.
            sampling: fields of `SamplingOptions`: temperature (0 is greedy), top_k, top_p, min_p, seed and so on; the
                model's own where none is given.

        Yields:
            Tokens with their text.

        Raises:
            ContextFull: the prompt leaves no room.
            UserError: a sampling value is out of range, or there is no such field.
        """
        ids = self.encode_raw(prompt) if isinstance(prompt, str) else list(prompt)
        limits = Limits(max_tokens, self.tokenizer.eos_ids, stop)
        made = Answer(self.tokenizer, limits, continues=True, logprobs=logprobs, grammar=grammar)
        return self.stream(ids, self.sampling_options(**sampling), made)

    def answer(
        self,
        ids: Sequence[int],
        options: SamplingOptions,
        limits: Limits,
        *,
        continues: bool = False,
        logprobs: int | None = None,
    ) -> Iterator[Token]:
        """Continue token ids.

        The prompt is computed when the first token is asked for; what is already held of it is kept. Several answers
        may be read in turns: each is what it would be alone. The end token itself is given as the last Token.

        Args:
            ids: the prompt.
            options: how tokens are chosen; the repetition penalty sees prompt and answer.
            limits: where the answer ends.
            continues: the answer goes on from the prompt's text (see `Tokenizer.decode`).
            logprobs: tell how likely each token was, and so many of the likeliest; None: tell nothing.

        Raises:
            ContextFull: the prompt leaves no room for an answer.
            UserError: the prompt is empty, or has a token that the model does not have.
        """
        return self.stream(ids, options, Answer(self.tokenizer, limits, continues=continues, logprobs=logprobs))

    def stream(self, ids: Sequence[int], options: SamplingOptions, answer: Answer) -> Iterator[Token]:
        """`answer`, for a caller that looks at the Answer while it is made."""
        if not ids:
            raise UserError("the prompt is empty; expected at least one token: say something")
        check_ids(ids, self.bundle.config.vocab_size)
        return self._answerer.answer(ids, options, answer)

    def sampling_options(self, **overrides: Any) -> SamplingOptions:
        """The model's own sampling, changed where a value is given."""
        return SamplingOptions.from_generation_config(self._settings, overrides)

    def chat(
        self,
        system: str | None = None,
        *,
        raw: bool = False,
        when_full: str = "newest",
        session: str | os.PathLike[str] | None = None,
    ) -> Chat:
        """A new conversation, or a saved one.

        Args:
            system: what the model is told first, or None for the turn format's own.
            raw: continue the text without a turn format, as for a model that has none.
            when_full: what goes when the conversation no longer fits: "stop", "newest" or "window" (context.py).
            session: a file that `Chat.save` wrote: go on with that conversation, as if it had never been left.

        Raises:
            UserError: there is no such choice, Genie shall keep a window, or the session is damaged or another model's.
        """
        chosen = WhenFull.named(when_full)
        if chosen is WhenFull.WINDOW and not isinstance(self._answerer, Engine):
            raise UserError("Genie keeps no window; expected --when-full stop or newest, or another runner")
        chat = Chat(self, system, RawTurns(self.tokenizer) if raw else self.turns, chosen)
        if session is not None:
            chat.restore(Path(session))
        return chat

    def grammar(self, kind: str, source: str = "") -> Grammar:
        """What an answer must be, for `generate` and `Chat.say`; compiled once, used as often as one likes.

        Args:
            kind: "json_schema", "json_object" (any object), "regex" or "lark".
            source: the schema as JSON text, the expression (of the whole answer) or the grammar.

        Raises:
            UserError: llguidance is not installed, there is no such kind, or the source is wrong.
        """
        with self._compiling:  # from any thread, one at a time
            if self._grammars is None:
                stop_ids = {*self.turns.stop_ids, *self.tokenizer.eos_ids}
                self._grammars = Grammars(self.tokenizer, self.bundle.config.vocab_size, stop_ids)
            return self._grammars.compile(kind, source)

    def session(self, messages: Sequence[Message], tokens: Sequence[int]) -> Session:
        """A conversation to be saved, with what is held of its tokens; no tokens where no engine answered."""
        held, cache = self.engine.held(tokens) if tokens else (0, b"")
        return Session(self.fingerprint, self.runner, tuple(messages), tuple(tokens[:held]), cache)

    def hold(self, session: Session, path: Path) -> None:
        """Hold the cache of a saved conversation, for a prompt that goes on with it; `path` is for the message.

        Raises:
            UserError: another model or runner made it, or it is damaged.
        """
        session.check(self.fingerprint, self.runner, path)
        if session.tokens:
            try:
                self.engine.hold(session.tokens, session.cache)
            except (ValueError, UserError) as error:
                raise UserError(f"{path} does not fit this model ({error}); delete it to begin anew") from None

    @property
    def fingerprint(self) -> str:
        """sha256 over the model's geometry, weights, cache scales and vocabulary, hexadecimal."""
        files = {
            name: f["sha256"] for name, f in self.bundle.files.items() if name.startswith(("weights/", "tokenizer"))
        }
        content = [self.bundle.config.to_dict(), self.bundle.kv_scales, self.bundle.context, files]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a text to be continued: with the begin token where the model wants one, or when there is no text."""
        ids = self.tokenizer.encode(text)
        bos = self.tokenizer.bos_id
        if bos is not None and (self.tokenizer.add_bos or not ids):
            ids = [bos, *ids]
        return ids

    def close(self) -> None:
        """Give back memory and processes."""
        self.tokenizer.close()
        self._answerer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def load(
    bundle: str | os.PathLike[str],
    *,
    runner: str | None = None,
    threads: int | None = None,
    huge_pages: bool | None = None,
    slots: int = SLOTS,
    prefix_bytes: int = PREFIX_BYTES,
    speculate: str | os.PathLike[str] | None = None,
    read_tokenizer: ReadTokenizer = load_tokenizer,
    progress: Progress = silent,
) -> LanguageModel:
    """Open a bundle and make it ready to run.

    Args:
        bundle: the folder.
        runner: one of `headrace.runners.RUNNERS`: "native" (headrace-kernels), "host" (ONNX Runtime), "device" (the
            phone's graphs on this CPU), "genie" (Qualcomm's Genie over binaries in HTP emulation); None takes the first
            of them that is installed.
        threads: size of the thread pool, physical cores by default.
        huge_pages: native: weights whose files lie in small pages are copied into pages of 2 MB, which are read faster:
            True now, None once the engine has worked for a second, False never.
        slots: conversations held at once; their cache takes memory only as it fills.
        prefix_bytes: most bytes of caches kept of conversations whose slots were needed; see `Engine`.
        speculate: guess ahead; it changes no answer, only its speed. "lookup" guesses that the text repeats itself; a
            bundle of the same vocabulary guesses by its own model; None does not guess.
        read_tokenizer: gives the vocabulary in the bundle's folder.
        progress: told what is being made before the first use (emulation binaries).

    Raises:
        BundleError: the bundle is missing, damaged, of a newer format, or was replaced meanwhile.
        TargetError: there is no such runner, or what it needs is not installed.
    """
    name = default_runner() if runner is None else runner
    opener = find_runner(name)
    opened = open_bundle(Path(bundle))
    made = opener(opened, Options(threads=threads, slots=slots, huge_pages=huge_pages, progress=progress))
    if not isinstance(made, Runner):
        if speculate is not None:
            raise TargetError(f"runner {name!r} chooses tokens by itself and cannot speculate; expected another runner")
        return _of_one_bundle(LanguageModel(opened, made, name, read_tokenizer))
    guesses: Callable[[], Speculation] | None = None
    if speculate == LOOKUP:
        guesses = prompt_lookup()
    elif speculate is not None:
        guesses = draft_model(_draft_engine(Path(speculate), opened, opener, Options(threads=threads, slots=slots)))
    engine = Engine(made, prefix_bytes=prefix_bytes, speculation=guesses)
    return _of_one_bundle(LanguageModel(opened, engine, name, read_tokenizer))


def _of_one_bundle(model: LanguageModel) -> LanguageModel:
    """The model, when all that was read of its bundle is of the same one."""
    try:
        model.bundle.refuse_replaced()
    except BundleError:
        model.close()
        raise
    return model


def _draft_engine(path: Path, bundle: Bundle, opener: Opener, options: Options) -> Engine:
    draft = open_bundle(path)
    ours, theirs = load_tokenizer(bundle.root), load_tokenizer(draft.root)
    probe = "A river, 百川, 42 😀\n\tdef f(x): return x"
    same = ours.vocab_size == theirs.vocab_size and ours.encode(probe) == theirs.encode(probe)
    if not same or draft.config.vocab_size > bundle.config.vocab_size:
        raise BundleError(f"{path} has another vocabulary than {bundle.root}; a draft model needs the very same one")
    made = opener(draft, options)
    assert isinstance(made, Runner)
    return Engine(made, prefix_bytes=0)
