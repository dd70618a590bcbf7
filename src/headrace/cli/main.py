"""The command line: one program, verbs in the order data flows. What a verb does is in the files beside this one.

Exit status: 0 done, 1 a check that was asked for failed, 2 an error told in one line, 130 Ctrl-C. No error shows a
traceback unless HEADRACE_TRACEBACK is set.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from typing import Annotated

import typer
from typer.exceptions import TyperException

from headrace import __version__
from headrace.cli.console import note
from headrace.cli.making import export, inspect, plan, pull
from headrace.cli.measuring import bench, card, evaluate, verify
from headrace.cli.running import chat, push
from headrace.cli.serving import generate, serve
from headrace.cli.streams import flush_output, prepare_streams
from headrace.errors import HeadraceError, VerificationFailed

__all__ = ["app", "main"]

TRACEBACK = "HEADRACE_TRACEBACK"  # the environment's name for: show where an error came from

app = typer.Typer(
    name="headrace",
    help="From an open checkpoint to a phone, and the very same model on any computer.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


def main() -> None:
    """Run the program and exit with its status."""
    prepare_streams()
    status = _run(sys.argv[1:])
    error = flush_output()
    if error is not None and not isinstance(error, BrokenPipeError):
        status = _report("error", error)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    try:
        return int(app(arguments or ["--help"], prog_name="headrace", standalone_mode=False) or 0)
    except VerificationFailed as error:
        return _report("failed", error, status=1)
    except TyperException as error:
        hint = getattr(getattr(error, "ctx", None), "command_path", "headrace")
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        return _report("error", error, f"{text.rstrip('. ')}; see: {hint} --help")
    except (KeyboardInterrupt, typer.Abort):
        note("")
        return 130
    except BrokenPipeError:
        return 0  # whoever read our output has gone
    except (HeadraceError, OSError, MemoryError) as error:
        return _report("error", error)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a mistake of ours, or of a library; Rust's panics are no Exception
        return _report("error", error, f"unexpected {type(error).__name__}: {error}; {TRACEBACK}=1 shows where")


def _report(kind: str, error: BaseException, text: str | None = None, status: int = 2) -> int:
    """One line about an error, whatever its message is made of: the status to exit with."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    line = re.sub(r"\s*[\r\n]+\s*", " ", (text or str(error) or type(error).__name__).strip())
    note(f"{kind}: " + "".join(c if c.isprintable() else "\ufffd" for c in line))
    return status


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for _verb in (pull, inspect, plan, export, verify, chat, generate, serve, bench, evaluate, card, push):
    app.command()(_verb)
