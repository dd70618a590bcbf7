"""HostRunner: a bundle's host graphs on ONNX Runtime's CPU kernels.

GroupQueryAttention is exact for single tokens of several sequences at different places (batched), and for several
tokens over a past at batch 1. So `run` cuts its spans that way:

    spans   slot 0: 1 token   slot 1: 1 token   slot 2: 40 tokens   slot 3: 1 token
    steps   ╰── slots 0, 1: batch 2 ──╯         ╰── batch 1 ──╯     ╰── batch 1 ──╯

A batch covers slots that lie side by side, since its cache is a slice of rows; slots between that have nothing to do
are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime as ort

from headrace.bundle.folder import Bundle
from headrace.model.rope import rope_tables
from headrace.plan import GraphStyle, ports
from headrace.runtime.runner import Logits, SlotLengths, Span
from headrace.targets.host.cache import HostCache
from headrace.targets.host.sessions import default_threads, make_session
from headrace.targets.host.steps import PartSession, Step, StepShape

__all__ = ["HostRunner"]

_KEPT_STEPS = 16  # bindings of recent shapes: prompt steps and token steps of a few slots, guesses of each length
_KEPT_ROWS = 8  # steps with more wanted rows than a token and its guesses own large logits and are not kept


class HostRunner:
    """The parts of a bundle in one process, sharing one KV cache that is written in place. A `Runner`.

    Args:
        bundle: an opened bundle.
        threads: size of the shared pool; physical cores by default, and the first runner of a process decides.
        slots: sequences held at once.
        context: positions of a slot, the bundle's by default.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, slots: int = 1, context: int | None = None
    ) -> None:
        config = bundle.config
        self.vocab_size = config.vocab_size
        self.context = context or bundle.context
        self.prompt_length = bundle.prompt_length
        self.fine_tokens = 1  # MatMulNBits has a kernel of its own for a single row
        self.slots = slots
        self._held = SlotLengths(slots, self.context, config.vocab_size)
        self._hidden = config.hidden_size
        self._parts = [
            PartSession(
                make_session(str(bundle.graph(part)), threads or default_threads()),
                *ports(config, part, GraphStyle.HOST, kv_dtype=bundle.kv_dtype),
            )
            for part in bundle.parts
        ]
        self.cache = HostCache(config, bundle.kv_dtype, slots, self.context)
        self.kv_bytes = self.cache.nbytes
        cos, sin = rope_tables(config, self.context)
        self._tables = {"cos": ort.OrtValue.ortvalue_from_numpy(cos), "sin": ort.OrtValue.ortvalue_from_numpy(sin)}
        self._keep = (cos, sin)
        self._steps: dict[StepShape, Step] = {}

    def run(self, spans: Sequence[Span]) -> Logits:
        self._held.begin(spans)
        first_row = np.cumsum([0, *(len(span.wanted) for span in spans)])
        out = np.empty((int(first_row[-1]), self.vocab_size), np.float32)
        for batch in _batches(spans):
            members = [spans[i] for i in batch]
            wanted = members[0].wanted if len(members) == 1 else ((0,) if any(s.wanted for s in members) else ())
            shape = StepShape(members[0].slot, len(members), len(members[0].ids), len(wanted))
            ids = np.array([span.ids for span in members], np.int64)
            logits = self._step(shape).run(ids, np.array([span.start for span in members]), wanted)
            for row, (i, span) in enumerate(zip(batch, members)):
                if span.wanted:  # in a batch each token is its span's only one, however often it is wanted
                    out[first_row[i] : first_row[i + 1]] = logits[row]
                self._held.done(span)
        return out

    def copy(self, source: int, target: int, count: int) -> None:
        self._held.copied(source, target, count)
        if source != target:
            self.cache.copy(source, target, count)

    def read(self, slot: int, start: int, stop: int) -> bytes:
        self._held.check_held(slot, start, stop)
        return self.cache.read(slot, start, stop)

    def write(self, slot: int, start: int, content: bytes) -> None:
        self._held.written(slot, start, len(content), self.cache.position_bytes)
        self.cache.write(slot, start, content)

    def close(self) -> None:
        """Drop sessions and buffers."""
        self._steps.clear()
        self._parts.clear()
        self.cache.close()

    def _step(self, shape: StepShape) -> Step:
        step = self._steps.pop(shape, None) or Step(
            shape, self._parts, self._hidden, self.vocab_size, self._tables, self.cache.value
        )
        if shape.rows <= _KEPT_ROWS:
            self._steps[shape] = step  # now the most recent
            if len(self._steps) > _KEPT_STEPS:
                del self._steps[next(iter(self._steps))]
        return step


def _batches(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Numbers of the spans that run together: single tokens of neighbouring slots; every other span alone."""
    singles = sorted((i for i, span in enumerate(spans) if len(span.ids) == 1), key=lambda i: spans[i].slot)
    together: list[int] = []
    for i in singles:
        if together and spans[i].slot != spans[together[-1]].slot + 1:
            yield together
            together = []
        together.append(i)
    if together:
        yield together
    yield from ([i] for i, span in enumerate(spans) if len(span.ids) > 1)
