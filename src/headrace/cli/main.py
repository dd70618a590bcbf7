"""The command line: one program, verbs in the order data flows. What a verb does is in verbs/.

Exit status: 0 done, 1 a check that was asked for failed, 2 an error told in one line, 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from headrace import __version__
from headrace.cli.console import note
from headrace.cli.making import export, inspect, plan, pull
from headrace.cli.measuring import bench, card, evaluate, verify
from headrace.cli.running import chat, push
from headrace.cli.serving import serve
from headrace.errors import HeadraceError, VerificationFailed

__all__ = ["app", "main"]

app = typer.Typer(
    name="headrace",
    help="From an open checkpoint to a phone, and the very same model on any computer.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        return int(app(arguments or ["--help"], prog_name="headrace", standalone_mode=False) or 0)
    except VerificationFailed as error:
        note(f"failed: {error}")
        return 1
    except HeadraceError as error:
        note(f"error: {error}")
        return 2
    except TyperException as error:
        hint = getattr(getattr(error, "ctx", None), "command_path", "headrace")
        note(f"error: {_one_line(error)}; see: {hint} --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        note("")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        return 0
    except (OSError, MemoryError) as error:
        note(f"error: {str(error) or type(error).__name__}")
        return 2


def _one_line(error: TyperException) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(str(text).split()).rstrip(".")


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


for _verb in (pull, inspect, plan, export, verify, chat, serve, bench, evaluate, card, push):
    app.command()(_verb)
