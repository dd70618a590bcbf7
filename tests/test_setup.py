"""`make kernels` on a machine without a compiler: one line says what serves instead, and nothing fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_compiler_is_one_line(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    done = subprocess.run(
        ["make", "--no-print-directory", "kernels", "CXX=no-such-compiler"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        "no C++ compiler (no-such-compiler): the native engine is not built, ONNX Runtime serves; docs/kernels.md"
    ]
