"""What an instruction set's source file may hold, so that the library loads on machines that lack its instructions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import headrace_kernels as hk

NATIVE = Path(__file__).parents[1] / "native"


@pytest.mark.parametrize("isa", hk.known_isas())
def test_tables_are_made_by_the_compiler(isa: str) -> None:
    """A `const` one may be filled when the library is loaded, with the file's own instructions, and ends the process
    where the processor has none such: every machine without AVX512 did, when AMX's table was a copy made so."""
    text = (NATIVE / f"{isa.replace('-', '_')}.cpp").read_text(encoding="utf-8")
    outside = [line for line in text.splitlines() if re.match(r"(extern |static |const )", line)]
    assert not outside
    assert re.findall(r"^constexpr (?:Kernels|TileKernels) (\w+)_(?:kernels|tiles) = ", text, re.M) == [
        isa.replace("-", "_")
    ]
