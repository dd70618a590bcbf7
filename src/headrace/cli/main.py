"""The command line: one program, verbs in the order data flows. What a verb does is in the files beside this one.

Exit status: 0 done, 1 a check that was asked for failed, 2 an error told in one line, 130 Ctrl-C. No error shows a
traceback unless HEADRACE_TRACEBACK is set.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType

from headrace import __version__
from headrace.cli.command import Parser, Verb, call
from headrace.cli.console import note
from headrace.cli.streams import flush_output, prepare_streams
from headrace.errors import HeadraceError, UserError, VerificationFailed, did_you_mean, reason

__all__ = ["VERBS", "find_verb", "main"]

TRACEBACK = "HEADRACE_TRACEBACK"  # the environment's name for: show where an error came from
COLLECT_EVERY = 100_000
"""New objects between two looks for unused cycles. Python's own 700 make it look again and again while modules and a
vocabulary are loaded: 9 of the 300 ms until a small model's first token."""
NO_THREADS = ("can't start new thread", "pthread_create failed")
"""How Python and ONNX Runtime say that the system starts no more of them; it is told by nothing else."""
MORE_PROCESSES = (
    "the system starts no further thread; expected room for some: allow more processes (ulimit -u, a container's limit)"
)
VERBS = {  # in the order data flows: verb → the file beside this one that has it
    "pull": "making",
    "inspect": "making",
    "plan": "making",
    "export": "making",
    "verify": "measuring",
    "chat": "running",
    "generate": "serving",
    "serve": "serving",
    "bench": "measuring",
    "evaluate": "measuring",
    "card": "measuring",
    "push": "running",
}


def main() -> None:
    """Run the program and exit with its status."""
    if sys.argv[1:2] == ["chat"]:  # a job of hours has large arrays to lose, and is looked through as Python does
        gc.set_threshold(COLLECT_EVERY)
    prepare_streams()
    status = _run(sys.argv[1:], CtrlC())
    error = flush_output()
    if error is not None and not isinstance(error, BrokenPipeError):
        status = _report("error", error, reason(error))
    gc.freeze()  # the system takes all memory back at once; Python would look through it three times before
    sys.exit(status)


def find_verb(name: str) -> Verb:
    """The function of a verb; its file is imported now, and no other verb's.

    Raises:
        UserError: there is no such verb.
    """
    if name not in VERBS:
        raise UserError(f"there is no command {name!r}{did_you_mean(name, VERBS)}; see: headrace --help")
    verb: Verb = getattr(import_module(f"headrace.cli.{VERBS[name]}"), name)
    return verb


class CtrlC:
    """Ctrl-C ends the program as ever, and is remembered. Where it is ignored, as in the background, it stays so.

    Attributes:
        came: it was pressed.
    """

    def __init__(self) -> None:
        self.came = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


def _run(arguments: Sequence[str], ctrl_c: CtrlC | None = None) -> int:
    try:
        first, *rest = arguments or ["--help"]
        if first.startswith("-"):
            _overview().parse_args([first])
        call(find_verb(first), f"headrace {first}", rest)
        return 0
    except VerificationFailed as error:
        return _report("failed", error, status=1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # whoever read our output has gone
    except OSError as error:
        return _report("error", error, f"{error.filename}: {reason(error)}" if error.filename else reason(error))
    except (HeadraceError, MemoryError) as error:
        return _report("error", error)
    except SystemExit as shown:  # argparse has shown help or the version
        return int(shown.code or 0)
    except GeneratorExit:
        raise
    except BaseException as error:  # a mistake of ours, or of a library; Rust's panics are no Exception
        if ctrl_c is not None and ctrl_c.came:
            return 130  # a library makes another error of it, as numpy does while it is imported
        if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_THREADS):
            return _report("error", error, MORE_PROCESSES)
        return _report("error", error, f"unexpected {type(error).__name__}: {error}; {TRACEBACK}=1 shows where")


def _report(kind: str, error: BaseException, text: str | None = None, status: int = 2) -> int:
    """One line about an error, whatever its message is made of: the status to exit with."""
    if os.environ.get(TRACEBACK):
        import traceback

        traceback.print_exception(error)
    line = re.sub(r"\s*[\r\n]+\s*", " ", (text or str(error) or type(error).__name__).strip())
    note(f"{kind}: " + "".join(c if c.isprintable() else "\ufffd" for c in line))
    return status


def _overview() -> Parser:
    """What is known without a verb: the version, and help that has each verb with the first line of its own."""
    made = Parser(
        prog="headrace", description="From an open checkpoint to a phone, and the very same model on any computer."
    )
    made.usage = "headrace COMMAND [OPTIONS] …"
    made.add_argument("--version", action="version", version=__version__, help="Show the version.")
    verbs = made.add_subparsers(title="commands", metavar="COMMAND")
    for name in VERBS:
        verbs.add_parser(name, help=(find_verb(name).__doc__ or "").split("\n")[0])
    return made
