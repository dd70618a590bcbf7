"""Every error a caller can meet.

    HeadraceError
    ├── UserError                 a value the user can change; the command line prints one line and exits 2
    │   ├── ConfigError           a model's config.json or GGUF header
    │   ├── CheckpointError       a checkpoint's files
    │   ├── TokenizerError        a tokenizer's files
    │   ├── RecipeError           a quantization recipe, a budget
    │   ├── CalibrationError      calibration or evaluation text
    │   ├── BundleError           a bundle on disk
    │   ├── ContextFull           a prompt that does not fit the context
    │   └── TargetError           a compiler, an emulator, a device
    └── VerificationFailed        a check that was asked for found a difference; exit 1

A message says what was wrong, with the value, then what was expected, then what to do, in one printable line, whatever
a stranger's file or request put into it. This file does not know who prints the messages.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

__all__ = [
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "ContextFull",
    "HeadraceError",
    "RecipeError",
    "TargetError",
    "TokenizerError",
    "UserError",
    "VerificationFailed",
    "did_you_mean",
    "one_line",
    "reason",
    "shown",
]


LONGEST_LINE = 1500  # characters of a message: a long path, and a sentence


class HeadraceError(Exception):
    """Base of all errors raised on purpose; its message is one line that can be printed."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class UserError(HeadraceError):
    """A value the user can change."""


class ConfigError(UserError):
    """A model's geometry is missing, contradictory or not supported."""


class CheckpointError(UserError):
    """A checkpoint's files are missing, damaged or hostile."""


class TokenizerError(UserError):
    """A tokenizer's files are missing, damaged or of an unknown kind."""


class RecipeError(UserError):
    """A recipe, rule or budget cannot be carried out."""


class CalibrationError(UserError):
    """Calibration or evaluation text is missing or too short."""


class BundleError(UserError):
    """A bundle is missing, damaged or of a newer format."""


class ContextFull(UserError):
    """The tokens do not fit the context that is left."""

    def __init__(self, needed: int, context: int, before: str = "") -> None:
        super().__init__(
            f"the prompt has {before}{needed} tokens, but the context holds {context} and one place is needed for the "
            f"answer; shorten it to {context - 1} tokens or export with a longer --context"
        )
        self.needed = needed
        self.context = context
        self._before = before

    def __reduce__(self) -> tuple[type[ContextFull], tuple[int, int, str]]:
        """So that it can come from another process."""
        return type(self), (self.needed, self.context, self._before)


class TargetError(UserError):
    """A compiler, an emulator or a device refused."""


class VerificationFailed(HeadraceError):
    """A check that was asked for found a difference."""


def one_line(text: str) -> str:
    """A message on one line, without what cannot be printed, at most `LONGEST_LINE` characters of it."""
    line = " ".join(text.split()) if "\n" in text else text
    if not line.isprintable():
        line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    # What is long is a foreign value; what to do stands at the end.
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 501]}…{line[-500:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: `"; did you mean 'x'?"`, or an empty string when nothing is near."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def reason(error: Exception) -> str:
    """What went wrong, for a message that names the file itself: `[Errno 2] No such file or directory: 'x'` without the
    number and the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def shown(value: object, longest: int = 80) -> str:
    """A foreign value for a message: its repr on one line, at most `longest` characters, however large it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 2, longest, longest, longest
    text = short.repr(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
