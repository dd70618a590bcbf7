"""GenieModel: a bundle that talks through Qualcomm's own Genie on this computer, over binaries in HTP emulation.

The same prompts and conversations as LanguageModel; Genie loads, steps, samples and keeps the cache itself. Knows
nothing about how binaries are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from headrace.bundle.folder import Bundle, open_bundle
from headrace.exporter.snapdragon import Emulated, beside, emulate, genie_sampling
from headrace.language_model import Speaker
from headrace.progress import Progress, silent
from headrace.runtime.generate import Limits, Token
from headrace.runtime.sampling import SamplingOptions
from headrace.targets.qualcomm.genie import genie_config
from headrace.targets.qualcomm.genie_dialog import End, GenieRunner
from headrace.text.streaming import TextStream

__all__ = ["GenieModel", "load_genie"]


class GenieModel(Speaker):
    """A bundle in Genie.

    Args:
        bundle: an opened bundle.
        emulated: its binaries for this computer.
    """

    def __init__(self, bundle: Bundle, emulated: Emulated) -> None:
        super().__init__(bundle)
        self._emulated = emulated
        self._runner: GenieRunner | None = None
        self._options: SamplingOptions | None = None

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer that Genie's context rule lets through."""
        return self._emulated.plan.longest_prompt

    def answer(
        self, ids: Sequence[int], options: SamplingOptions, limits: Limits, *, continues: bool = False
    ) -> Iterator[Token]:
        """Continue token ids. The whole conversation is sent each time and what Genie holds of it is kept (rewind),
        so that no end token comes between turns."""
        plan, runner = self._emulated.plan, self._open(options)
        if plan.bos is not None and ids and ids[0] == plan.bos:
            ids = ids[1:]  # Genie puts it there itself
        stream = TextStream(self.tokenizer, limits.stops, continues=continues)
        last: Token | None = None
        said = 0
        with closing(runner.query_tokens(ids, limits.max_tokens, rewind=True)) as tokens:
            for made in tokens:
                if last is not None:
                    yield last
                    last = None
                if made.id in limits.stop_ids:
                    yield Token(made.id, stream.finish(), "stop")
                    return
                said += 1
                text = stream.push(made.id)
                if stream.stopped:
                    yield Token(made.id, text, "stop")
                    return
                last = Token(made.id, text)
        if runner.end is End.DONE and said < limits.max_tokens:  # at an end token, which Genie keeps to itself
            if last is not None:
                yield last
            yield Token(plan.eos[0], stream.finish(), "stop")
        elif last is not None:
            yield Token(last.id, last.text + stream.finish(), "length" if runner.end is End.DONE else "context")

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


def load_genie(path: Path, progress: Progress = silent) -> GenieModel:
    """Open a bundle in Genie; its emulation binaries are compiled once and kept beside it (BUNDLE.emulation).

    Raises:
        BundleError: the bundle cannot be opened.
        TargetError: headrace[qnn] is not installed, or compiler or Genie refused.
    """
    bundle = open_bundle(path)
    return GenieModel(bundle, emulate(bundle, beside(bundle, "emulation"), progress=progress))
