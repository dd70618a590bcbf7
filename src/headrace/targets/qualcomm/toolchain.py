"""Where Qualcomm's libraries are: the installed onnxruntime-qnn package, found without importing it.

This file does not know what the libraries do.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import TargetError

__all__ = ["Toolchain", "child_environment", "find_toolchain"]

# Only libraries that are needed; the GPU ones of the package are not.
_LIBRARIES = ("libonnxruntime_providers_qnn.so", "libQnnHtp.so", "libQnnSystem.so", "libGenie.so")


@dataclass(frozen=True)
class Toolchain:
    """The folder of the libraries, the package's version and the QAIRT release inside ("2.51.0")."""

    folder: Path
    version: str
    qairt: str

    def library(self, name: str) -> Path:
        """The path of a library: `library("Genie")` is …/libGenie.so."""
        return self.folder / f"lib{name}.so"


def find_toolchain() -> Toolchain:
    """The installed toolchain.

    Raises:
        TargetError: it is not installed, or lacks a library.
    """
    spec = importlib.util.find_spec("onnxruntime_qnn")
    if spec is None or spec.origin is None:
        raise TargetError(
            "onnxruntime-qnn is not installed; expected version 2.7.0 on Linux x86_64: pip install 'headrace[qnn]'"
        )
    folder = Path(spec.origin).parent
    for name in _LIBRARIES:
        if not (folder / name).is_file():
            raise TargetError(f"onnxruntime-qnn has no {name} in {folder}; reinstall it: pip install 'headrace[qnn]'")
    stated = (folder / "build_and_package_info.py").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(\w+)\s*=\s*'([^']*)'", stated, re.MULTILINE))
    return Toolchain(folder, found.get("__version__", "unknown"), found.get("qnn_version", "unknown"))


def child_environment(toolchain: Toolchain) -> dict[str, str]:
    """The environment of a child process that loads the libraries: they find each other, and it finds headrace."""
    package_root = str(Path(__file__).parents[2])
    environment = dict(os.environ)
    for key, value in (("LD_LIBRARY_PATH", str(toolchain.folder)), ("PYTHONPATH", package_root)):
        old = environment.get(key)
        environment[key] = f"{value}{os.pathsep}{old}" if old else value
    return environment
