"""NativeRunner: a bundle on headrace-kernels. Knows slots and how long a call may be; the engine does the rest.

One call of the engine computes any mixture of spans, but its scratch memory grows with the tokens of the call: longer
spans are cut, and what fits together runs together.

    spans   slot 0: 600 tokens              slot 1: 1   slot 2: 1
    calls   ╰─ 256 ─╯ ╰─ 256 ─╯ ╰─ 88 + 1 + 1 ───────────────────╯
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from headrace.bundle.folder import Bundle
from headrace.errors import TargetError
from headrace.model.rope import rope_tables
from headrace.native.program import COSINES, SINES, record_program
from headrace.runtime.runner import Logits, SlotLengths, Span

__all__ = ["CALL_TOKENS", "FINE_TOKENS", "NativeRunner"]

KERNELS = "0.2.0"  # of headrace-kernels, whose interface changes together with this package
CALL_TOKENS = 256
"""Most tokens of one call: weights are unpacked once a call, so more gain little."""


FINE_TOKENS = 8
"""Spans of so few tokens have fine activations, longer ones coarse ones (kShort in kernels/native/activations.h)."""


class NativeRunner:
    """The whole decoder in one engine, whose weights are the bundle's files, mapped. A `Runner`.

    Args:
        bundle: an opened bundle.
        threads: of the engine; physical cores by default.
        slots: sequences held at once.
        context: positions of a slot, the bundle's by default.
        isa: one of `headrace_kernels.available_isas()`; the best by default, or what HEADRACE_ISA says.
        huge_pages: copy files that lie in small pages into huge ones: True now, None while it runs, False never.

    Attributes:
        isa: the instruction set that runs.

    Raises:
        TargetError: headrace-kernels is not installed, or HEADRACE_ISA names what this machine lacks.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        slots: int = 1,
        context: int | None = None,
        isa: str | None = None,
        huge_pages: bool | None = None,
    ) -> None:
        config = bundle.config
        self.vocab_size = config.vocab_size
        self.context = context or bundle.context
        self.slots = slots
        self.prompt_length = CALL_TOKENS
        self.fine_tokens = FINE_TOKENS
        self._held = SlotLengths(slots, self.context, config.vocab_size)
        self._position_bytes = 2 * config.num_layers * config.kv_size * (1 if bundle.kv_scales else 4)
        self.kv_bytes = slots * self.context * self._position_bytes
        try:
            import headrace_kernels
        except ImportError as error:
            raise TargetError(
                f"runner 'native' needs headrace-kernels, which is not installed ({error}); "
                "run: pip install ./kernels, or take --runner host"
            ) from None
        if headrace_kernels.__version__ != KERNELS:
            raise TargetError(
                f"headrace-kernels {headrace_kernels.__version__} is installed, and this headrace needs {KERNELS}; "
                "run: pip install ./kernels, or take --runner host"
            )
        recorded = record_program(bundle, self.context)
        cos, sin = rope_tables(config, self.context)
        try:
            self.engine = headrace_kernels.Engine(
                recorded.to_dict(),
                {COSINES: cos, SINES: sin},
                slots=slots,
                threads=threads or 0,
                isa=isa,
                huge_pages=huge_pages,
            )
        except headrace_kernels.ProgramError as error:
            raise TargetError(f"{bundle.root} cannot run natively: {error}; take --runner host") from None
        self.isa: str = self.engine.isa
        self.threads: int = self.engine.threads

    def run(self, spans: Sequence[Span]) -> Logits:
        self._held.begin(spans)
        calls = list(_calls(spans))
        if len(calls) == 1:
            logits: Logits = self.engine.run([(s.slot, s.start, s.ids, s.wanted) for s in spans])
        else:
            logits = np.empty((sum(len(span.wanted) for span in spans), self.vocab_size), np.float32)
            for pieces in calls:
                rows = [row for piece in pieces for row in piece.rows]
                logits[rows] = self.engine.run([piece.arguments for piece in pieces])
        for span in spans:
            self._held.done(span)
        return logits

    def copy(self, source: int, target: int, count: int) -> None:
        self._held.copied(source, target, count)
        if source != target:
            self.engine.copy(source, target, count)

    def read(self, slot: int, start: int, stop: int) -> bytes:
        self._held.check_held(slot, start, stop)
        content: bytes = self.engine.read(slot, start, stop)
        return content

    def write(self, slot: int, start: int, content: bytes) -> None:
        count = self._held.written(slot, start, len(content), self._position_bytes)
        self.engine.write(slot, start, start + count, content)

    def cancel(self) -> None:
        """From another thread: the running call ends soon with `headrace_kernels.Cancelled`."""
        self.engine.cancel()

    def close(self) -> None:
        """Give back memory, mappings and threads."""
        self.engine.close()


class _Piece:
    """A stretch of a span, and the rows of the answer that its wanted tokens have."""

    def __init__(self, span: Span, first_row: int, begin: int, stop: int) -> None:
        inside = [i for i, place in enumerate(span.wanted) if begin <= place < stop]
        self.slot = span.slot
        self.length = stop - begin
        self.rows = [first_row + i for i in inside]
        self.arguments = span.slot, span.start + begin, span.ids[begin:stop], [span.wanted[i] - begin for i in inside]


def _calls(spans: Sequence[Span]) -> Iterator[list[_Piece]]:
    """The spans in pieces, and these in calls: in order, no slot twice, at most CALL_TOKENS together."""
    call: list[_Piece] = []
    for piece in _pieces(spans):
        full = sum(p.length for p in call) + piece.length > CALL_TOKENS
        if full or piece.slot in {p.slot for p in call}:
            yield call
            call = []
        call.append(piece)
    if call:
        yield call


def _pieces(spans: Sequence[Span]) -> Iterator[_Piece]:
    row = 0
    for span in spans:
        for begin in range(0, len(span.ids), CALL_TOKENS):
            yield _Piece(span, row, begin, min(begin + CALL_TOKENS, len(span.ids)))
        row += len(span.wanted)
