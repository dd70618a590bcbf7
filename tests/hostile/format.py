"""One reader as the fuzzers see it, and what one input may do to it: open, or be refused in one printable line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import HeadraceError
from tests.hostile.chance import Good, Rng

__all__ = ["Format", "try_one"]

LONGEST_LINE = 2000  # characters of a message, the path among them


@dataclass(frozen=True)
class Format:
    """What a reader reads.

    Attributes:
        prepare: makes the good files in an empty folder, and all that stands beside the hostile one; called once.
        write: the bytes of one hostile input.
        file: where it is put, below the folder.
        read: opens it and uses what it gives as the program would.
        seconds: of the processor that one input may take.
        memory: bytes of address space that all inputs together may take beyond what the process had before.
        harmless: further exceptions that are an answer too.
    """

    prepare: Callable[[Path], Good]
    write: Callable[[Rng, Good], bytes]
    file: str
    read: Callable[[Path], object]
    seconds: float = 5.0
    memory: int = 256 << 20  # an expanded tensor is read a row at a time
    harmless: tuple[type[BaseException], ...] = ()


def try_one(form: Format, rng: Rng, folder: Path, good: Good) -> str | None:
    """Write one input and read it; what stood in its place comes back.

    Returns:
        The refusal's line; None where it opened.

    Raises:
        AssertionError: the refusal is not one printable line.
        Exception: anything that a reader let through.
    """
    path = folder / form.file
    before = path.read_bytes() if path.is_file() else None
    path.write_bytes(form.write(rng, good))
    try:
        form.read(path)
        return None
    except (HeadraceError, *form.harmless) as error:
        line = str(error)
        assert "\n" not in line and line.isprintable() and len(line) <= LONGEST_LINE, ascii(line)
        return line
    finally:
        if before is not None:
            path.write_bytes(before)
