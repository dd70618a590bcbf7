"""GenieAnswers: answers from Qualcomm's own Genie on this computer, over a bundle's binaries in HTP emulation.

Genie loads, steps, samples and keeps the cache itself. Knows nothing about how binaries are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from headrace.errors import TargetError
from headrace.runtime.answer import Answer, Token
from headrace.runtime.sampling import SamplingOptions
from headrace.targets.qualcomm.emulation import Emulated
from headrace.targets.qualcomm.genie import genie_config
from headrace.targets.qualcomm.genie_bundle import genie_sampling
from headrace.targets.qualcomm.genie_dialog import End, GenieRunner

__all__ = ["GenieAnswers"]


class GenieAnswers:
    """An `Answerer` over one Genie dialog.

    Args:
        emulated: a bundle's binaries for this computer.
    """

    def __init__(self, emulated: Emulated) -> None:
        self._emulated = emulated
        self._runner: GenieRunner | None = None
        self._options: SamplingOptions | None = None
        self._answering = False

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer that Genie's context rule lets through."""
        return self._emulated.plan.longest_prompt

    def answer(self, ids: Sequence[int], options: SamplingOptions, answer: Answer) -> Iterator[Token]:
        """Continue token ids. The whole conversation is sent each time and what Genie holds of it is kept (rewind),
        so that no end token comes between turns.

        Raises:
            ContextFull: the prompt does not fit.
            TargetError: Genie failed, or is still giving another answer.
        """
        if answer.limits.max_tokens < 1:
            return
        for name in ("min_p", "presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(options, name) != getattr(SamplingOptions, name):
                raise TargetError(
                    f"Genie has no {name}; expected temperature, top_k, top_p, repetition_penalty and seed"
                )
        if answer.logprobs is not None:
            raise TargetError("Genie tells no logprobs; expected another runner, such as host")
        if answer.grammar is not None:
            raise TargetError("Genie follows no grammar; expected another runner, such as host")
        if self._answering:  # one dialog, whose cache holds one conversation
            raise TargetError("Genie is still giving another answer; let it end, or close it")
        self._answering = True
        try:
            yield from self._talk(ids, options, answer)
        finally:
            self._answering = False

    def _talk(self, ids: Sequence[int], options: SamplingOptions, answer: Answer) -> Iterator[Token]:
        plan, runner = self._emulated.plan, self._open(options)
        if plan.bos is not None and ids and ids[0] == plan.bos:
            ids = ids[1:]  # Genie puts it there itself
        answer.usage.prompt_tokens = len(ids)
        last: Token | None = None
        with closing(runner.query_tokens(ids, answer.limits.max_tokens, rewind=True)) as tokens:
            for made in tokens:
                if last is not None:
                    yield last
                last = answer.take(made.id)
                if last.finish is not None:
                    break
        # Why Genie ended is known only behind the last token, which is why one is held back.
        if last is not None and last.finish is None and runner.end is not End.DONE:
            last = answer.end(last, "context")
        if last is not None:
            yield last
        if answer.finish is None:  # at an end token, which Genie keeps to itself
            yield answer.end(Token(plan.eos[0], ""), "stop")

    def close(self) -> None:
        """End Genie's process."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _open(self, options: SamplingOptions) -> GenieRunner:
        """A dialog that samples as asked; Genie takes sampling when a dialog is made."""
        if self._runner is None or self._options != options:
            self.close()
            binaries = self._emulated.config["dialog"]["engine"]["model"]["binary"]["ctx-bins"]
            plan = replace(self._emulated.plan, sampling=genie_sampling(options))
            self._runner = GenieRunner(
                genie_config(plan, binaries), self._emulated.folder, lengths=plan.lengths, contexts=plan.contexts
            )
            self._options = options
        return self._runner
