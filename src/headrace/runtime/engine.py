"""Engine: who computes when, and in which slot; sequences in, logits or answers out.

    sequences   A ── B ── C ── D          more of them than slots: the one that waited longest gives its slot up; its
                │    │    │               cache is kept in memory (prefixes.py) or computed again when it goes on
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
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from itertools import zip_longest

import numpy as np

from headrace.errors import ContextFull
from headrace.runtime.answer import Answer, Token
from headrace.runtime.request import Request
from headrace.runtime.runner import Logits, Runner, Span
from headrace.runtime.sampling import SamplingOptions
from headrace.runtime.sequence import Sequence
from headrace.runtime.slots import Slots
from headrace.runtime.speculation import Speculation

__all__ = ["PREFIX_BYTES", "Engine"]

PREFIX_BYTES = 1 << 29  # of a 7B model 2,000 tokens, of SmolLM2 46,000


class Engine:
    """Sequences over a runner.

    Args:
        runner: computes.
        prefix_bytes: most bytes of caches that are kept in memory when their slots are needed, so that a conversation
            goes on, and prompts that begin alike start, where they can; 0 keeps none.

        speculation: makes what guesses ahead for each answer (speculation.py); None guesses nothing.

    Attributes:
        runner: as given.
        slots: who has which slot.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        prefix_bytes: int = PREFIX_BYTES,
        speculation: Callable[[], Speculation] | None = None,
    ) -> None:
        self.runner = runner
        self.slots = Slots(runner, prefix_bytes)
        self._speculation = speculation
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
        request = self._request(ids, options, answer)
        try:
            while not request.done:
                for _, token in self._advance([request]):
                    yield token
            if request.error is not None:
                raise request.error
        finally:
            self.release(request.sequence)

    def submit(
        self, ids: Items[int], options: SamplingOptions, answer: Answer, *, after: Request | None = None
    ) -> Request:
        """Queue an answer for `step`.

        Args:
            ids: the prompt.
            options: how tokens are chosen; each request has random numbers of its own, whatever else runs.
            answer: becomes text and reason to end.
            after: an earlier request of the same prompt: this one waits until that prompt is computed, and takes over
                its cache. So `n` answers need one prefill.

        Raises:
            ContextFull: the prompt leaves no room for an answer.
            UserError: max_tokens is below 1, or a bias is on a token that the model does not have.
        """
        self._own()
        request = self._request(ids, options, answer, after)
        self._requests.append(request)
        return request

    def _request(
        self, ids: Items[int], options: SamplingOptions, answer: Answer, after: Request | None = None
    ) -> Request:
        sizes = {"context": self.context, "vocab_size": self.runner.vocab_size}
        return Request(ids, options, answer, **sizes, after=after, speculation=self._new_speculation())

    def _new_speculation(self) -> Speculation | None:
        return None if self._speculation is None else self._speculation()

    def step(self) -> list[tuple[Request, Token]]:
        """One step of everything that was submitted: the tokens made, none while prompts are computed. A request that
        finds no free slot waits; they begin in the order they were submitted."""
        self._own()
        for request in self._requests:
            request.done |= request.cancelled
        self._sweep()
        try:
            return self._advance(self._requests)
        finally:
            self._sweep()

    @property
    def idle(self) -> bool:
        """Nothing was submitted that is not done."""
        return not self._requests

    def _sweep(self) -> None:
        """Free the slots of what is done."""
        for request in self._requests:
            if request.done:
                self.release(request.sequence)
        self._requests = [request for request in self._requests if not request.done]

    def _advance(self, requests: Items[Request]) -> list[tuple[Request, Token]]:
        """One step of these requests: each whose prompt is done, and one chunk of the first whose prompt is not."""
        self._own()
        work: list[Request] = []
        busy = {r.sequence.slot for r in requests if r.sequence.slot is not None}
        reading = False  # a prompt has a chunk in this step
        for request in requests:
            sequence = request.sequence
            if sequence.slot is None:
                if reading or request.waits or len(busy) >= len(self.slots):
                    continue  # its turn comes
                busy.add(self.slots.place(sequence, busy))
                if not request.answer.usage.tokens:
                    request.answer.usage.cached_tokens = sequence.held
            if sequence.pending > 1:
                if reading:
                    continue
                reading = True
            work.append(request)
        # Apart: a runner may compute few tokens in a finer arithmetic than a prompt, and an answer shall be what it is
        # alone, whether or not a prompt is read beside it.
        steady = [request for request in work if request.sequence.pending == 1]
        prompts = [request for request in work if request.sequence.pending > 1]
        made = []
        for group in (steady, prompts):
            started = time.perf_counter()
            # Guesses of one answer cost little more than its next token; those of several would part a batch.
            drafts = [group[0].draft()] if len(group) == 1 else []
            rows = self._run([request.sequence for request in group], drafts)
            if len(group) == 1:
                group[0].timed(time.perf_counter() - started)
            made += [(request, request.take(row)) for request, row in zip(group, rows) if row is not None]
        return [(request, token) for request, tokens in made for token in tokens]

    # Sequences and logits

    def open(self, ids: Items[int] = (), *, reuse: bool = True) -> Sequence:
        """A new sequence that says `ids`; it takes a slot when it is first computed.

        Args:
            ids: its first tokens.
            reuse: what another one has in common with it is not computed again.

        Raises:
            ContextFull: they do not fit.
        """
        self._own()
        if len(ids) > self.context:
            raise ContextFull(len(ids), self.context)
        return Sequence(ids, reuses=reuse)

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
        sequence = Sequence(reuses=False)
        try:
            for at in range(0, len(ids), size):
                sequence.extend(ids[at : at + size])
                slot = self.slots.place(sequence, keep=())
                part = tuple(sequence.tokens[at:])
                out[at : at + len(part)] = self.runner.run([Span(slot, at, part, tuple(range(len(part))))])
                sequence.held += len(part)
        finally:
            self.release(sequence)
        return out

    def held(self, ids: Items[int]) -> tuple[int, bytes]:
        """How many of these first tokens are held anywhere, and their cache as the runner reads it."""
        self._own()
        return self.slots.held(ids)

    def hold(self, ids: Items[int], content: bytes) -> None:
        """Put the cache of these tokens, as `held` gave it, into a slot, for a prompt that begins with them.

        Raises:
            ValueError: it is no cache of so many tokens.
        """
        self._own()
        self.slots.hold(ids, content)

    def release(self, sequence: Sequence) -> None:
        """Let a sequence go. Its slot stays as it is, for prompts that begin alike, until another one needs it."""
        sequence.released = True

    def close(self) -> None:
        """Give back the runner's memory and processes."""
        self.slots.release_all()
        self.runner.close()

    def _run(self, sequences: Items[Sequence], drafts: Items[Items[int]] = ()) -> list[Logits | None]:
        """A chunk of what each has pending, and its drafts: logits (1 + drafts, V) after its last token and after each
        draft; None where some is still pending. What the slot holds of the drafts is not counted as held."""
        keep = {sequence.slot for sequence in sequences if sequence.slot is not None}
        spans = []
        for sequence, draft in zip_longest(sequences, drafts, fillvalue=()):
            assert isinstance(sequence, Sequence)
            slot = self.slots.place(sequence, keep)
            keep.add(slot)
            ids = tuple(sequence.tokens[sequence.held : sequence.held + self._chunk(sequence.pending)])
            whole = len(ids) == sequence.pending
            first = 0 if sequence.hears is not None else len(ids) - 1 if whole else len(ids)
            wanted = tuple(range(first, len(ids) + len(draft)))
            spans.append(Span(slot, sequence.held, (*ids, *draft), wanted))
        if not spans:
            return []
        logits = self.runner.run(spans)
        out: list[Logits | None] = []
        at = 0
        for sequence, span in zip(sequences, spans):
            sequence.held = min(span.stop, len(sequence.tokens))
            rows = logits[at : at + len(span.wanted)]
            at += len(rows)
            if sequence.hears is not None:
                count = sequence.held - span.start
                sequence.hears(span.start, rows[:count])
                rows = rows[count if sequence.pending else count - 1 :]
                if not sequence.pending:  # from now on it is a sequence like any other
                    sequence.hears, sequence.reuses = None, True
            sequence.last = rows[0] if len(rows) else None
            sequence.answered = sequence.answered or bool(len(rows))
            out.append(rows if len(rows) else None)
        return out

    def _chunk(self, pending: int) -> int:
        """How many of the pending tokens are computed next. A prompt's last chunk is never so short that a runner would
        compute it in another arithmetic than the rest."""
        size, fine = self.runner.prompt_length, self.runner.fine_tokens
        rest = pending - size
        return size - (fine + 1 - rest) if 0 < rest <= fine < size // 2 else size

    def _own(self) -> None:
        thread = threading.current_thread()
        if self._thread is None:
            self._thread = thread
        if self._thread is not thread:
            raise RuntimeError(
                f"the engine belongs to the thread {self._thread.name!r}, and {thread.name!r} called it; "
                "give one thread the engine and hand requests to it"
            )
