"""LanguageModel: a bundle that talks. What `headrace.load` returns; binds engine, tokenizer and turn format."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.folder import Bundle, open_bundle
from headrace.errors import ContextFull, TargetError, did_you_mean
from headrace.runtime.engine import Engine, Runner
from headrace.runtime.generate import Limits, Token, generate
from headrace.runtime.sampling import SamplingOptions
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from headrace.text.turns import Message, RawTurns, TurnFormat, turn_format

__all__ = ["Chat", "LanguageModel", "Speaker", "load"]

RUNNERS = ("host", "device", "genie")


class Speaker(ABC):
    """A bundle that talks. Who computes, and chooses tokens, is a subclass's matter: LanguageModel's runners, or
    Qualcomm's Genie (genie_model.py).

    Attributes:
        bundle: what it was made from.
        tokenizer: text ↔ ids.
        turns: how a conversation becomes ids.
        sampling: the model's own sampling defaults.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tokenizer: Tokenizer = load_tokenizer(bundle.root)
        self._settings: Mapping[str, Any] = bundle.read_json("generation_config.json")
        self.turns: TurnFormat = turn_format(self.tokenizer, self._settings, self.tokenizer.chat_template)
        self.sampling = SamplingOptions.from_generation_config(self._settings)

    @property
    @abstractmethod
    def context(self) -> int:
        """Tokens of a prompt and its answer that there is room for."""

    @abstractmethod
    def answer(
        self, ids: Sequence[int], options: SamplingOptions, limits: Limits, *, continues: bool = False
    ) -> Iterator[Token]:
        """Continue token ids; see `headrace.runtime.generate.generate`."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory and processes."""

    def sampling_options(self, **overrides: Any) -> SamplingOptions:
        """The model's own sampling, changed where a value is given."""
        return SamplingOptions.from_generation_config(self._settings, overrides)

    def chat(self, system: str | None = None, *, raw: bool = False) -> Chat:
        """A new conversation; `raw` continues the text without a turn format, as for a model that has none."""
        return Chat(self, system, RawTurns(self.tokenizer) if raw else self.turns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class LanguageModel(Speaker):
    """A model ready to run.

    Attributes:
        engine: the sequence in the cache.
    """

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        super().__init__(bundle)
        self.engine = Engine(runner)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of a whole sequence, float32 (len(ids), vocab): row i predicts the token after ids[i].

        Raises:
            ContextFull: the sequence is longer than the context.
        """
        return self.engine.score(ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Token]:
        """Continue a text or token ids, without a turn format.

        Args:
            prompt: text, or ids used as they are.
            max_tokens: most tokens of the answer.
            stop: strings that end it.
            temperature, top_k, top_p, repetition_penalty: the model's own when None; temperature 0 is greedy.
            seed: makes sampling repeatable.

        Yields:
            Tokens with their text.

        Raises:
            ContextFull: the prompt leaves no room.
            UserError: a sampling value is out of range.
        """
        ids = self.encode_raw(prompt) if isinstance(prompt, str) else list(prompt)
        options = self.sampling_options(
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
        )
        return self.answer(ids, options, Limits(max_tokens, self.tokenizer.eos_ids, stop), continues=True)

    @property
    def context(self) -> int:
        return self.engine.context

    def answer(
        self, ids: Sequence[int], options: SamplingOptions, limits: Limits, *, continues: bool = False
    ) -> Iterator[Token]:
        return generate(self.engine, self.tokenizer, ids, options, limits, continues=continues)

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a text to be continued: with the begin token where the model wants one, or when there is no text."""
        ids = self.tokenizer.encode(text)
        bos = self.tokenizer.bos_id
        if bos is not None and (self.tokenizer.add_bos or not ids):
            ids = [bos, *ids]
        return ids

    def close(self) -> None:
        self.engine.close()


class Chat:
    """A conversation: messages, and the model that answers.

    Args:
        model: answers.
        system: what the model is told first, or None for the turn format's own.
        turns: how messages become ids.

    Attributes:
        messages: all turns so far; the newest rounds are sent when the context fills.
    """

    def __init__(self, model: Speaker, system: str | None, turns: TurnFormat) -> None:
        self.model = model
        self.turns = turns
        self.messages: list[Message] = [] if system is None else [Message("system", system)]

    def say(
        self,
        text: str,
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        options: SamplingOptions | None = None,
    ) -> Iterator[Token]:
        """Say something and yield the answer's tokens; closed early, the answer so far stays in the conversation.

        Raises:
            ContextFull: this message alone does not fit.
        """
        model = self.model
        messages = [*self.messages, Message("user", text)]
        reserve = min(max_tokens, model.context // 2)
        try:
            ids = self.turns.render(messages, model.context - reserve)
        except ContextFull:  # then a shorter answer is better than none
            ids = self.turns.render(messages, model.context - 1)
        limits = Limits(max_tokens, self.turns.stop_ids, stop)
        answer: list[Token] = []
        try:
            for token in model.answer(ids, options or model.sampling, limits, continues=self.turns.continues):
                answer.append(token)
                yield token
        finally:
            # The answer's own tokens: the next prompt then begins with what the cache holds. A stop string's tokens
            # are no part of the answer, so then the text decides.
            cut = bool(answer) and answer[-1].finish == "stop" and answer[-1].id not in self.turns.stop_ids
            own = None if cut else tuple(token.id for token in answer if token.id not in self.turns.stop_ids)
            self.messages = [*messages, Message("assistant", "".join(token.text for token in answer), own)]


def load(bundle: str | os.PathLike[str], *, runner: str = "host", threads: int | None = None) -> LanguageModel:
    """Open a bundle and make it ready to run.

    Args:
        bundle: the folder.
        runner: "host" (ONNX Runtime) or "device" (the phone's graphs on this CPU).
        threads: size of the thread pool, physical cores by default.

    Raises:
        BundleError: the bundle is missing, damaged or of a newer format.
        TargetError: there is no such runner.
    """
    opened = open_bundle(Path(bundle))
    if runner == "host":
        from headrace.targets.host.runner import HostRunner

        return LanguageModel(opened, HostRunner(opened, threads=threads))
    if runner == "device":
        from headrace.exporter.snapdragon import kept_device_graphs
        from headrace.targets.device import DeviceRunner

        return LanguageModel(opened, DeviceRunner.open(opened, kept_device_graphs(opened), threads=threads))
    raise TargetError(f"runner {runner!r} is unknown{did_you_mean(runner, RUNNERS)}; expected {', '.join(RUNNERS)}")
