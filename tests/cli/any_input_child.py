"""Runs the command line again and again in one process, for test_any_input.py: a job in, what it showed out.

A job is a line of JSON: arguments, what stdin holds (base64; null: closed), the encoding of the terminal. The answer is
a line of JSON: status, stdout, stderr, and `native`, what libraries wrote past Python.
"""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import sys
import tempfile
from typing import Any

from headrace.cli import main as cli

MEMORY = 12 << 30  # bytes of address space: a number in a file that asks for more fails here and not on the machine


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One run of the program on streams of its own."""
    piped = None if job["stdin"] is None else io.BytesIO(base64.b64decode(job["stdin"]))
    streams = [io.BytesIO(), io.BytesIO()]
    encoding: str = job["encoding"]
    sys.stdin = None if piped is None else io.TextIOWrapper(piped, encoding)  # type: ignore[assignment]
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream, encoding, write_through=True) for stream in streams)
    sys.argv = ["headrace", *job["arguments"]]
    status: object = None
    try:
        cli.main()
    except SystemExit as left:
        status = left.code
    except BaseException as error:  # what main let through is what this is about
        status = f"{type(error).__name__}: {error}"
    out, err = (stream.getvalue().decode(encoding, "replace") for stream in streams)
    return {"status": status, "out": out[-2000:], "err": err[-4000:]}


def main() -> None:
    """Answer jobs until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    jobs, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryFile() as native:
        os.dup2(native.fileno(), 1)
        os.dup2(native.fileno(), 2)
        for line in jobs:
            native.seek(0)
            native.truncate()
            answer = run(json.loads(line))
            sys.stdout = sys.stderr = sys.__stdout__
            native.seek(0)
            answer["native"] = native.read().decode("utf-8", "replace")[-4000:]
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
