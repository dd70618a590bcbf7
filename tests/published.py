"""Published chat templates and GGUF vocabularies with test vectors, out of llama-cpp-python's source distribution."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

from headrace.files import sha256_file

REQUIREMENT = "llama-cpp-python==0.3.36"
ARCHIVE = "llama_cpp_python-0.3.36.tar.gz"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
MODELS = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/"


def fetch(folder: Path) -> Path:
    """The folder `models` of that distribution: templates/*.jinja, ggml-vocab-*.gguf, .inp and .out."""
    archive, out = folder / ARCHIVE, folder / "models"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(folder), REQUIREMENT], check=True)
    assert sha256_file(archive) == SHA256
    if not out.is_dir():
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.isfile() and m.name.startswith(MODELS)]
            for member in members:
                member.name = member.name.removeprefix(MODELS)
            tar.extractall(out, members, filter="data")
    return out
