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
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Items

import numpy as np

from headrace.errors import ContextFull
from headrace.runtime.answer import Answer, Token
from headrace.runtime.prefixes import BLOCK, Prefixes
from headrace.runtime.request import Request
from headrace.runtime.runner import Logits, Runner, Span
from headrace.runtime.sampling import SamplingOptions
from headrace.runtime.sequence import Sequence, common_prefix

__all__ = ["PREFIX_BYTES", "Engine"]

PREFIX_BYTES = 1 << 29  # of a 7B model 2,000 tokens, of SmolLM2 46,000

# A finished conversation's slot is taken over by a prompt that shares all but so many of its tokens; where more would
# be lost, what is shared is copied to another slot.
_LOST = 16


class Engine:
    """Sequences over a runner.

    Args:
        runner: computes.
        prefix_bytes: most bytes of caches that are kept in memory when their slots are needed, so that a conversation
            goes on, and prompts that begin alike start, where they can; 0 keeps none.

    Attributes:
        runner: as given.
        prefixes: these caches.
    """

    def __init__(self, runner: Runner, *, prefix_bytes: int = PREFIX_BYTES) -> None:
        self.runner = runner
        self.prefixes = Prefixes(prefix_bytes)
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
        return Request(ids, options, answer, **sizes, after=after)

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
                if reading or request.waits or len(busy) >= len(self._slots):
                    continue  # its turn comes
                busy.add(self._place(sequence, busy))
                if not request.answer.usage.tokens:
                    request.answer.usage.cached_tokens = sequence.held
            if sequence.pending > 1:
                if reading:
                    continue
                reading = True
            work.append(request)
        rows = self._run([request.sequence for request in work])
        made = [(request, request.take(row)) for request, row in zip(work, rows) if row is not None]
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
                slot = self._place(sequence, keep=())
                part = tuple(sequence.tokens[at:])
                out[at : at + len(part)] = self.runner.run([Span(slot, at, part, tuple(range(len(part))))])
                sequence.held += len(part)
        finally:
            self.release(sequence)
        return out

    def held(self, ids: Items[int]) -> tuple[int, bytes]:
        """How many of these first tokens are held anywhere, and their cache as the runner reads it."""
        self._own()
        sequence = Sequence([*ids, 0])  # one more, so that all of them may be held
        slot = self._place(sequence, keep=())
        self.release(sequence)
        return sequence.held, self.runner.read(slot, 0, sequence.held)

    def hold(self, ids: Items[int], content: bytes) -> None:
        """Put the cache of these tokens, as `held` gave it, into a slot, for a prompt that begins with them.

        Raises:
            ValueError: it is no cache of so many tokens.
        """
        self._own()
        sequence = Sequence(reuses=False)
        slot = self._place(sequence, keep=())
        self.runner.write(slot, 0, content)
        if len(ids) and len(ids) * len(self.runner.read(slot, len(ids) - 1, len(ids))) != len(content):
            raise ValueError(f"{len(content)} bytes are no cache of {len(ids)} tokens")
        sequence.extend(ids)
        sequence.held, sequence.reuses = len(ids), True
        self.release(sequence)

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
        """The sequence's slot, the most recently used one from now on. One without a slot is given one, but none of
        `keep`, and in it what is held anywhere of its tokens."""
        if sequence.slot is None:
            self._settle(sequence, keep)
        assert sequence.slot is not None
        self._waited.remove(sequence.slot)
        self._waited.append(sequence.slot)
        return sequence.slot

    def _settle(self, sequence: Sequence, keep: Collection[int]) -> None:
        ids = sequence.tokens
        most = max(len(ids) - 1, 0)  # the last token's logits have to be computed
        best, shared = None, 0
        for slot, other in enumerate(self._slots if sequence.reuses else ()):
            if other is not None and other.reuses and (n := common_prefix(other.tokens[: other.held], ids)) > shared:
                best, shared = slot, n
        stored = self.prefixes.match(ids) if sequence.reuses else 0
        if best is not None and shared >= stored:
            other = self._slots[best]
            assert other is not None
            if other.released and best not in keep and other.held - shared <= _LOST:
                self._give(best, sequence, min(shared, most))
                return
            if shared >= _LOST and (another := self._vacant(keep, best)) is not None:
                self.runner.copy(best, another, min(shared, most))
                self._give(another, sequence, min(shared, most))
                return
        taken = self._vacant(keep)
        if taken is None:  # all run: the one that waited longest makes room
            taken = next((slot for slot in self._waited if slot not in keep), None)
            if taken is None:
                raise ValueError(f"{len(self._slots)} slots are too few for so many sequences in one step")
            self._save(taken)
        stored = self.prefixes.match(ids) if sequence.reuses else 0  # with what was just saved
        if taken == best and shared >= stored:
            stored = shared
        else:
            for number, content in enumerate(self.prefixes.take(ids[:stored])):
                self.runner.write(taken, number * BLOCK, content)
        self._give(taken, sequence, min(stored, most))

    def _vacant(self, keep: Collection[int], but: int | None = None) -> int | None:
        """A slot that no running sequence needs, its cache saved: an empty one, else the one unused for longest."""
        choices = [slot for slot in self._waited if slot != but and slot not in keep]
        for slot in sorted(choices, key=lambda slot: self._slots[slot] is not None):  # stable: the longest unused first
            other = self._slots[slot]
            if other is None or other.released:
                self._save(slot)
                return slot
        return None

    def _save(self, slot: int) -> None:
        """Keep what a slot holds before it is given to somebody else."""
        other = self._slots[slot]
        if other is not None and other.reuses and other.held:
            self.prefixes.put(other.tokens[: other.held], lambda start, stop: self.runner.read(slot, start, stop))

    def _give(self, slot: int, sequence: Sequence, held: int) -> None:
        other = self._slots[slot]
        if other is not None:
            other.slot, other.held, other.last = None, 0, None
        self._slots[slot] = sequence
        sequence.slot, sequence.held = slot, held

    def _own(self) -> None:
        thread = threading.current_thread()
        if self._thread is None:
            self._thread = thread
        if self._thread is not thread:
            raise RuntimeError(
                f"the engine belongs to the thread {self._thread.name!r}, and {thread.name!r} called it; "
                "give one thread the engine and hand requests to it"
            )
