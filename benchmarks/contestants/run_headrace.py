"""headrace as a contestant.  usage: run_headrace.py BUNDLE MODEL THREADS RUNNER SLOTS [huge]"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from contestant import ids_of, serve

from headrace.bundle.folder import open_bundle
from headrace.runners import Options, open_runner
from headrace.runtime.runner import Span


class Headrace:
    """A runner, driven as the engine drives it: chunks of a prompt, then spans of one token."""

    def __init__(self, bundle: Path, model: str, threads: int, runner: str, slots: int, huge: bool) -> None:
        opened = open_bundle(bundle)
        self.runner = open_runner(opened, runner, Options(threads=threads, slots=slots, huge_pages=huge or None))
        self.ids = ids_of(self.runner.context, self.runner.vocab_size)
        self.held = [0] * slots
        self.next = [0] * slots
        self.most_held = [0] * slots
        self.about: dict[str, Any] = {
            "name": f"headrace {runner}{' huge pages' if huge else ''}, {model}",
            "model": model,
            "isa": getattr(self.runner, "isa", "onnxruntime"),
            "weight_bytes": opened.weight_bytes,
            "cache_bytes": 0,
            "prompt_length": self.runner.prompt_length,
        }

    def prompt(self, tokens: int, slot: int = 0) -> None:
        size = self.runner.prompt_length
        for start in range(0, tokens, size):
            ids = tuple(self.ids[start : min(tokens, start + size)])
            last = start + len(ids) == tokens
            logits = self.runner.run([Span(slot, start, ids, (len(ids) - 1,) if last else ())])
        self.next[slot] = int(logits[0].argmax())
        self._hold(slot, tokens)

    def _hold(self, slot: int, tokens: int) -> None:
        self.held[slot] = tokens
        self.most_held[slot] = max(self.most_held[slot], tokens)
        position = self.runner.kv_bytes // (self.runner.slots * self.runner.context)
        self.about["cache_bytes"] = position * sum(self.most_held)

    def rewind(self, tokens: int, slot: int = 0) -> None:
        if self.held[slot] < tokens:
            self.prompt(tokens, slot)
        self.held[slot] = tokens

    def token(self) -> None:
        self.tokens(1)

    def fill(self, tokens: int, slots: int) -> None:
        """Several sequences, each of so many tokens."""
        for slot in range(slots):
            self.rewind(tokens, slot)

    def tokens(self, slots: int) -> None:
        """One token more of each."""
        spans = [Span(slot, self.held[slot], (self.next[slot],), (0,)) for slot in range(slots)]
        for slot, row in enumerate(self.runner.run(spans)):
            self.next[slot] = int(row.argmax())
            self._hold(slot, self.held[slot] + 1)


if __name__ == "__main__":
    bundle, model, threads, runner, slots, *more = sys.argv[1:]
    serve(Headrace(Path(bundle), model, int(threads), runner, int(slots), more == ["huge"]))
