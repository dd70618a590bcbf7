"""What an instruction set's source file may hold, so that the library loads on machines that lack its instructions."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("processor,isas", [("Nehalem", ["plain"]), ("Haswell", ["avx2", "plain"])])
def test_older_processors_load_it(processor: str, isas: list[str]) -> None:
    qemu = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if qemu is None or platform.machine() != "x86_64":
        pytest.skip("NOT RUN: this machine has no qemu-x86_64")
    if "HEADRACE_KERNELS" in os.environ:
        pytest.skip("NOT RUN: a library with a sanitizer's runtime")
    script = "import headrace_kernels as hk; print(*hk.available_isas())"
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [qemu, "-cpu", processor, os.path.realpath(sys.executable), "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == isas
