"""Blocks of a bundle's files: a changed one is named, each is as likely to be looked at as any other."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.bundle import blocks
from headrace.bundle.blocks import SAMPLED, are_block_sums, block_sums, damaged_blocks

SMALL = 64  # bytes of a block in these tests
OPENINGS = 2000


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", SMALL)


def listed(root: Path, **sizes: int) -> dict[str, dict[str, Any]]:
    """Files of random bytes, as a manifest lists them."""
    rng = random.Random(0)
    for name, size in sizes.items():
        (root / name).write_bytes(rng.randbytes(size))
    return {name: {"bytes": size, "blocks": block_sums(root / name)} for name, size in sizes.items()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


def test_sums_are_those_of_another_program(tmp_path: Path) -> None:
    """gzip ends a file with the CRC-32 of what it holds."""
    table = listed(tmp_path, a=SMALL * 2 + 5)
    data = (tmp_path / "a").read_bytes()
    expected = ""
    for at in range(0, len(data), SMALL):
        code = "import gzip, sys; sys.stdout.buffer.write(gzip.compress(sys.stdin.buffer.read()))"
        packed = subprocess.run(
            [sys.executable, "-c", code], input=data[at : at + SMALL], capture_output=True, check=True
        )
        expected += packed.stdout[-8:-4][::-1].hex()
    assert table["a"]["blocks"] == expected


@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, SMALL * SAMPLED])
def test_every_bit_of_a_few_blocks_counts(tmp_path: Path, size: int) -> None:
    table = listed(tmp_path, a=size)
    assert list(damaged_blocks(tmp_path, table)) == []
    for at in range(size):
        flip(tmp_path / "a", at)
        assert list(damaged_blocks(tmp_path, table)) == [("a", f"was changed (its MiB {at // SMALL} differs)")]
        flip(tmp_path / "a", at)


def test_each_block_is_as_likely_as_any_other(tmp_path: Path) -> None:
    table = listed(tmp_path, a=SMALL * 10, b=SMALL * 9 + 1, c=1)
    assert list(damaged_blocks(tmp_path, table | {"old": {"bytes": 10**12}})) == [], "without sums it is not looked at"
    for name, at in (("a", 0), ("a", SMALL * 10 - 1), ("b", SMALL * 9), ("c", 0)):
        flip(tmp_path / name, at)
        seen = sum(bool(list(damaged_blocks(tmp_path, table))) for _ in range(OPENINGS))
        flip(tmp_path / name, at)
        expected = OPENINGS * SAMPLED / 21
        assert 0.7 * expected < seen < 1.3 * expected  # six standard deviations of the 381 openings that meet it


def test_what_can_be_sums() -> None:
    assert are_block_sums("", 0) and are_block_sums("00000000", 1) and are_block_sums("0" * 16, SMALL + 1)
    for value in ("", "0" * 16, "0" * 7, None, 8, ["00000000"]):
        assert not are_block_sums(value, SMALL)
    assert not are_block_sums("0" * 8, 1 << 62)
