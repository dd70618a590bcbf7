"""A conversation on a terminal. Ctrl-C stops an answer, Ctrl-D or /exit leaves. Knows no model's inside."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

from headrace.cli.console import note
from headrace.errors import UserError
from headrace.runtime.answer import Token

__all__ = ["Answer", "converse", "print_answer"]


class Answer(Protocol):
    """What answers: text → tokens."""

    def __call__(self, text: str) -> Iterator[Token]: ...


def print_answer(tokens: Iterator[Token]) -> Token | None:
    """Stream an answer to stdout: the last token. Ctrl-C is the caller's."""
    last = None
    for last in tokens:
        sys.stdout.write(last.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return last


def converse(answer: Answer) -> None:
    """Read lines, stream answers, until the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    note("Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D leaves.")
            continue
        if not text.strip():
            continue
        if text.strip() == "/exit":
            return
        tokens = answer(text)
        try:
            last = print_answer(tokens)
            if last is not None and last.finish in ("length", "context"):
                note(f"(cut: {'--max-tokens reached' if last.finish == 'length' else 'the context is full'})")
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except UserError as error:
            note(f"error: {error}")
        finally:
            close = getattr(tokens, "close", None)
            if close is not None:
                close()  # what was said so far stays in the conversation
