"""Engine: who computes when, and in which slot; sequences in, logits or answers out.

    sequences   A ── B ── C ── D          more of them than slots: the one that waited longest gives its slot up, and
                │    │    │               is computed again when it goes on
    slots       0    1    2

An engine belongs to one thread: the first that makes it work. Three ways to use it:

    engine.answer(ids, options, answer)           one answer; several may be read in turns
    engine.submit(…), engine.step(), request.cancel()     many at once: a step takes every running answer one token
                                                  further, and computes one chunk of one waiting prompt
    sequence = engine.open(ids); engine.extend(sequence, ids); engine.score(ids)      logits

Knows no tokenizer and no turn format.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Items

import numpy as np

from headrace.errors import ContextFull
from headrace.runtime.answer import Answer, Token
from headrace.runtime.request import Request
from headrace.runtime.runner import Logits, Runner, Span
from headrace.runtime.sampling import SamplingOptions
from headrace.runtime.sequence import Sequence, common_prefix

__all__ = ["Engine"]

# A finished conversation's slot is taken over by a prompt that shares all but so many of its tokens; where more would
# be lost, what is shared is copied to another slot.
_LOST = 16


class Engine:
    """Sequences over a runner.

    Args:
        runner: computes.

    Attributes:
        runner: as given.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._slots: list[Sequence | None] = [None] * runner.slots
        self._waited: list[int] = list(range(runner.slots))  # slots, the longest unused first
        self._requests: list[Request] = []
        self._thread: threading.Thread | None = None

    @property
    def context(self) -> int:
        """Positions that a sequence has."""
        return self.runner.context

    # Answers

    def answer(self, ids: Items[int], options: SamplingOptions, answer: Answer) -> Iterator[Token]:
        """Continue token ids; see `Answerer`. Only this answer advances, whatever else was submitted.

        Raises:
            ContextFull: the prompt leaves no room for an answer.
        """
        if answer.limits.max_tokens < 1:
            return
        request = Request(ids, options, answer, self.context)
        try:
            while not request.done:
                for _, token in self._advance([request]):
                    yield token
        finally:
            if request.sequence is not None:
                self.release(request.sequence)

    def submit(self, ids: Items[int], options: SamplingOptions, answer: Answer) -> Request:
        """Queue an answer for `step`.

        Raises:
            ContextFull: the prompt leaves no room for an answer.
        """
        self._own()
        request = Request(ids, options, answer, self.context)
        self._requests.append(request)
        return request

    def step(self) -> list[tuple[Request, Token]]:
        """One step of everything that was submitted: the tokens made, none while prompts are computed. A request that
        finds no free slot waits; they begin in the order they were submitted."""
        for request in self._requests:
            request.done |= request.cancelled
        try:
            return self._advance([request for request in self._requests if not request.done])
        finally:
            for request in self._requests:
                if request.done and request.sequence is not None:
                    self.release(request.sequence)
            self._requests = [request for request in self._requests if not request.done]

    def _advance(self, requests: Items[Request]) -> list[tuple[Request, Token]]:
        """One step of these requests: each whose prompt is done, and one chunk of the first whose prompt is not."""
        self._own()
        work: list[tuple[Request, Sequence]] = []
        busy = {r.sequence.slot for r in requests if r.sequence is not None and r.sequence.slot is not None}
        reading = False  # a prompt has a chunk in this step
        for request in requests:
            sequence = request.sequence
            if sequence is None or sequence.slot is None:
                if reading or len(busy) >= len(self._slots):
                    continue  # its turn comes
                if sequence is None:
                    sequence = request.sequence = self.open(request.prompt, keep=busy)
                    request.cached_tokens = sequence.held
                busy.add(self._place(sequence, busy))
            if sequence.pending > 1:
                if reading:
                    continue
                reading = True
            work.append((request, sequence))
        rows = self._run([sequence for _, sequence in work])
        return [(request, request.take(row)) for (request, _), row in zip(work, rows) if row is not None]

    # Sequences and logits

    def open(self, ids: Items[int] = (), *, keep: Collection[int] = ()) -> Sequence:
        """A new sequence that says `ids`; what another one has in common with it is not computed again.

        Args:
            ids: its first tokens.
            keep: slots that are not to be taken from their sequences.

        Raises:
            ContextFull: they do not fit.
        """
        self._own()
        if len(ids) > self.context:
            raise ContextFull(len(ids), self.context)
        made = Sequence()
        made.extend(ids)
        best, shared = None, 0
        for slot, other in enumerate(self._slots):
            if other is not None and (n := common_prefix(other.tokens[: other.held], ids)) > shared:
                best, shared = slot, n
        shared = min(shared, len(ids) - 1)  # the last token's logits have to be computed
        if best is None or shared < 1:
            return made
        other = self._slots[best]
        assert other is not None
        target = best
        if not other.released or other.held - shared > _LOST:
            if shared < _LOST:
                return made  # not worth a slot
            free = [s for s in self._waited if s != best and s not in keep and self._free(s)]
            if free:
                target = free[0]
                self.runner.copy(best, target, shared)
            elif not other.released:
                return made
        self._give(target, made)
        made.held = shared
        return made

    def extend(self, sequence: Sequence, ids: Items[int] = ()) -> Logits:
        """Say more, and compute what is pending: logits (V,) after the last token.

        Raises:
            ContextFull: the tokens do not fit.
            ValueError: the sequence was released, or has no tokens at all.
        """
        self._own()
        if sequence.released:
            raise ValueError("this sequence was released; open another one")
        if len(sequence.tokens) + len(ids) > self.context:
            raise ContextFull(len(sequence.tokens) + len(ids), self.context)
        sequence.extend(ids)
        if not sequence.tokens:
            raise ValueError("an empty sequence has no logits")
        if sequence.last is None and not sequence.pending:
            sequence.held -= 1  # its logits were those of a sequence that went on, or were never asked for
        while sequence.last is None:
            self._run([sequence])
        return sequence.last

    def score(self, ids: Items[int], chunk: int | None = None) -> Logits:
        """Logits (len(ids), V) of every token of a sequence of its own; nothing is reused.

        Args:
            ids: the tokens, as many as the context at most.
            chunk: tokens a step, the runner's most by default.

        Raises:
            ContextFull: they do not fit.
        """
        self._own()
        if len(ids) > self.context:
            raise ContextFull(len(ids), self.context)
        size = min(chunk or self.runner.prompt_length, self.runner.prompt_length)
        out = np.empty((len(ids), self.runner.vocab_size), np.float32)
        sequence = Sequence()
        try:
            for at in range(0, len(ids), size):
                sequence.extend(ids[at : at + size])
                slot = self._place(sequence, keep=())
                part = tuple(sequence.tokens[at:])
                out[at : at + len(part)] = self.runner.run([Span(slot, at, part, tuple(range(len(part))))])
                sequence.held += len(part)
        finally:
            self.release(sequence)
        return out

    def release(self, sequence: Sequence) -> None:
        """Let a sequence go. Its slot stays as it is, for prompts that begin alike, until another one needs it."""
        sequence.released = True

    def close(self) -> None:
        """Give back the runner's memory and processes."""
        for sequence in self._slots:
            if sequence is not None:
                sequence.released = True
        self.runner.close()

    # Slots

    def _run(self, sequences: Items[Sequence]) -> list[Logits | None]:
        """A chunk of what each has pending: logits after its last token, None where some is left."""
        keep = {sequence.slot for sequence in sequences if sequence.slot is not None}
        spans = []
        for sequence in sequences:
            slot = self._place(sequence, keep)
            keep.add(slot)
            ids = tuple(sequence.tokens[sequence.held : sequence.held + self.runner.prompt_length])
            whole = sequence.held + len(ids) == len(sequence.tokens)
            spans.append(Span(slot, sequence.held, ids, (len(ids) - 1,) if whole else ()))
        rows = iter(self.runner.run(spans) if spans else ())
        out: list[Logits | None] = []
        for sequence, span in zip(sequences, spans):
            sequence.held = span.stop
            sequence.last = next(rows) if span.wanted else None
            out.append(sequence.last)
        return out

    def _place(self, sequence: Sequence, keep: Collection[int]) -> int:
        """The sequence's slot, the most recently used one from now on. Without one it gets a free one, or that of the
        sequence that waited longest, but for the slots `keep`."""
        if sequence.slot is None:
            choices = [slot for slot in self._waited if slot not in keep]
            if not choices:
                raise ValueError(f"{len(self._slots)} slots are too few for so many sequences in one step")
            self._give(next((slot for slot in choices if self._free(slot)), choices[0]), sequence)
        assert sequence.slot is not None
        self._waited.remove(sequence.slot)
        self._waited.append(sequence.slot)
        return sequence.slot

    def _free(self, slot: int) -> bool:
        other = self._slots[slot]
        return other is None or other.released

    def _give(self, slot: int, sequence: Sequence) -> None:
        other = self._slots[slot]
        if other is not None:
            other.slot, other.held, other.last = None, 0, None
        self._slots[slot] = sequence
        sequence.slot = slot

    def _own(self) -> None:
        thread = threading.current_thread()
        if self._thread is None:
            self._thread = thread
        if self._thread is not thread:
            raise RuntimeError(
                f"the engine belongs to the thread {self._thread.name!r}, and {thread.name!r} called it; "
                "give one thread the engine and hand requests to it"
            )
