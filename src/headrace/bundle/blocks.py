"""Check sums of a file's blocks: a few of them can be looked at whenever a bundle is opened.

Hashing all weights would take longer than loading them, so opening reads some blocks at random. What spoils much of a
file is met at once, a single bit at one opening in many; `check_files` finds it in any case. CRC-32 tells accidents,
not forgeries. Knows no manifest but the table of its files.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

__all__ = ["BLOCK", "SAMPLED", "are_block_sums", "block_sums", "damaged_blocks"]

BLOCK = 1 << 20  # bytes
SAMPLED = 4  # blocks read when a bundle is opened: 1 ms on a laptop's core
_DIGITS = 8  # of a sum, hexadecimal


def block_sums(path: Path) -> str:
    """CRC-32 of each block of a file, eight hexadecimal digits each, one behind the other."""
    sums = []
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            sums.append(f"{zlib.crc32(block):08x}")
    return "".join(sums)


def are_block_sums(value: object, size: int) -> bool:
    """Whether a value of a manifest can be the sums of a file of `size` bytes."""
    return isinstance(value, str) and len(value) == _count(size) * _DIGITS


def damaged_blocks(root: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of those of `SAMPLED` blocks, chosen at random, that are not as they were written.

    Args:
        root: the bundle's folder.
        files: `bytes` of each file, and `blocks`, its sums, of those that have them; they are as long as listed.
    """
    names = [name for name, file in files.items() if "blocks" in file]
    ends = list(accumulate(_count(files[name]["bytes"]) for name in names))
    total = ends[-1] if ends else 0
    sampled: set[int] = set()
    while len(sampled) < min(SAMPLED, total):
        sampled.add(int.from_bytes(os.urandom(8), "little") % total)  # `random` takes longer to be imported
    for chosen in sorted(sampled):
        number = next(number for number, end in enumerate(ends) if chosen < end)
        name, at = names[number], chosen - (ends[number - 1] if number else 0)
        with (root / name).open("rb", buffering=0) as file:
            file.seek(at * BLOCK)
            found = f"{zlib.crc32(file.read(BLOCK)):08x}"
        if found != files[name]["blocks"][at * _DIGITS : (at + 1) * _DIGITS]:
            yield name, f"was changed (its MiB {at} differs)"


def _count(size: int) -> int:
    return -(-size // BLOCK)
