"""A child process that talks in frames over its pipes, and both ends of that talk.

Qualcomm's libraries can crash, print to stdout and need a library path set before the process starts: all of it stays
in a child. A frame is a JSON object and NumPy arrays; whatever the libraries print goes to a log file, whose last
lines become part of the error when the child dies. This file does not know what is talked about.

    length of JSON (4 bytes) · JSON with [name, dtype, shape] of each array · the arrays' bytes
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from headrace.errors import TargetError
from headrace.targets.qualcomm.toolchain import child_environment, find_toolchain

__all__ = ["Arrays", "Child", "Pipe", "peak_bytes", "worker_pipe"]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]

GOODBYE_SECONDS = 20.0  # freeing the contexts of a large model takes a few
TAIL_LINES = 6
# Said at every start, whatever happens later.
_NOISE = re.compile(r"LIBNATIVE|File mapped weights|EPContext encryption|^\s*$")
# Colours, and ONNX Runtime's time and place.
_DRESS = re.compile(r"\x1b\[[0-9;]*m|^\S+ [\d:.]+ \[\w:onnxruntime:[^\]]*\] ", re.MULTILINE)


class Pipe:
    """Frames over two unbuffered files: a buffer would hide bytes from `select`."""

    def __init__(self, reader: FileIO, writer: FileIO) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, message: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        """One frame out."""
        listed = {name: np.ascontiguousarray(a) for name, a in (arrays or {}).items()}
        described = [[name, a.dtype.name, a.shape] for name, a in listed.items()]
        head = json.dumps({"message": message, "arrays": described}).encode()
        self._all(memoryview(struct.pack("<I", len(head)) + head))
        for a in listed.values():
            self._all(a.reshape(-1).view(np.uint8).data)

    def receive(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """One frame in.

        Raises:
            EOFError: the other end is gone.
        """
        head = json.loads(self._exactly(struct.unpack("<I", self._exactly(4))[0]))
        arrays = {}
        for name, dtype, shape in head["arrays"]:
            count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            arrays[name] = np.frombuffer(self._exactly(count), dtype).reshape(shape)
        return head["message"], arrays

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = self.reader.read(count - len(data))
            if not more:
                raise EOFError
            data += more
        return bytes(data)

    def _all(self, data: memoryview) -> None:
        while data:
            data = data[self.writer.write(data) :]


class Child:
    """One child process, as long as the `with` block (or until `close`).

    Args:
        module: what it runs: `python -m module`.
        task: what it is for, as the subject of a message ("the HTP compiler").

    Raises:
        TargetError: the toolchain is not installed.
    """

    def __init__(self, module: str, task: str) -> None:
        self.task = task
        environment = child_environment(find_toolchain())
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is headrace's to handle: it asks the child to stop
        )
        self._pipe = Pipe(cast(FileIO, self._process.stdout), cast(FileIO, self._process.stdin))
        self._how: str | None = None  # it was ended from here
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe.reader, selectors.EVENT_READ)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._end("was interrupted")  # Ctrl-C does not wait for a compiler to finish
        self.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def call(
        self, message: Mapping[str, Any], arrays: Arrays | None = None, *, seconds: float
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Send a frame and wait for the answer.

        Raises:
            TargetError: the child refused, died, or did not answer in time (it is ended then).
        """
        with self.exchange():
            self.send(message, arrays)
            return self.receive(seconds=seconds)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Talk that must not be cut in two: an interrupt (Ctrl-C, a closed generator) would leave in the pipes what the
        next reader takes for its own, so the child is ended then. What is done with a frame belongs into the same block
        when a lost frame would matter."""
        try:
            yield
        except TargetError:  # said in a whole frame, or the child is gone
            raise
        except BaseException:
            self._end("was interrupted")
            raise

    def send(self, message: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        """Send a frame.

        Raises:
            TargetError: the child is gone.
        """
        with self.exchange():
            try:
                self._pipe.send(message, arrays)
            except (BrokenPipeError, ValueError):
                raise self._died() from None

    def receive(self, *, seconds: float) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """A frame, waited for.

        Raises:
            TargetError: as for `call`.
        """
        self.wait(seconds)
        with self.exchange():
            try:
                message, arrays = self._pipe.receive()
            except EOFError:
                raise self._died() from None
        if "error" in message:
            raise TargetError(message["error"] + self._tail())
        return message, arrays

    def wait(self, seconds: float) -> None:
        """Until there is a frame; may be interrupted.

        Raises:
            TargetError: there was none in time; the child is ended.
        """
        if not self._selector.select(seconds):
            self._end("was ended")
            raise TargetError(f"{self.task} gave no answer within {seconds:.0f} s and was ended; try a smaller model")

    def close(self) -> None:
        """Let it free what it holds and leave; end it when it does not."""
        if self._pipe.writer.closed:
            return
        self._pipe.writer.close()
        try:
            self._process.wait(GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            self._end("was ended")
        self._selector.close()
        self._pipe.reader.close()
        self._log.close()

    def _end(self, how: str) -> None:
        self._how = how
        self._process.kill()
        self._process.wait()

    def _died(self) -> TargetError:
        try:
            status = self._process.wait(GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            self._end("did not leave")
            status = self._process.wait()
        if self._how is not None:
            how = f"{self._how}; open it again"
        elif status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                how += " (often: out of memory)"
        else:
            how = f"ended with status {status}"
        return TargetError(f"{self.task} {how}{self._tail()}")

    def _tail(self) -> str:
        """The last lines it printed, on one line."""
        self._log.seek(0)
        lines = _DRESS.sub("", self._log.read().decode("utf-8", "replace")).splitlines()
        kept = [line.strip() for line in lines if not _NOISE.search(line)][-TAIL_LINES:]
        return f"; it said: {' | '.join(kept)}" if kept else ""


def worker_pipe() -> Pipe:
    """The child's end: the real stdin and stdout, after which anything printed goes to stderr, the log."""
    reader, writer = FileIO(os.dup(0), "r"), FileIO(os.dup(1), "w")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return Pipe(reader, writer)


def peak_bytes() -> int:
    """Peak resident memory of this process. VmHWM, since ru_maxrss starts with the parent's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
