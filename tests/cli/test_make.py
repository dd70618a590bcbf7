"""`make chat PROMPT=…`: the prompt reaches the program as it was typed, and nothing in it is executed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMPTS = [
    'say "yes"',
    "it's; touch HACKED",
    "$HOME costs $5 and $$",
    "`touch HACKED` $(touch HACKED) $(shell touch HACKED)",
    "-n 5 --help",
    "a\\b %d # no comment",
    "two\nlines\tand 中国",
    "a   b ",
]


def make(folder: Path, *arguments: str, **environment: str) -> str:
    """What a stub in the program's place is called with, one argument a line."""
    (folder / "bin").mkdir(exist_ok=True)
    stub = folder / "bin" / "headrace"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\" > called\n")
    stub.chmod(0o755)
    shutil.copy(ROOT / "Makefile", folder)
    old = ["-o", "setup", "-o", ".venv/installed", "-o", "b/headrace.json"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PROMPT"))}
    subprocess.run(
        ["make", "-s", "chat", "BIN=./bin", "BUNDLE=b", *old, *arguments],
        cwd=folder, env={**clean, **environment}, check=True, timeout=60,
    )  # fmt: skip
    return (folder / "called").read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_passed_as_it_is(tmp_path: Path, prompt: str) -> None:
    expected = f"chat\0b\0--prompt={prompt}\0"
    assert make(tmp_path, f"PROMPT={prompt}") == expected
    assert make(tmp_path, PROMPT=prompt) == expected
    assert not (tmp_path / "HACKED").exists()


def test_without_a_prompt_it_is_a_conversation(tmp_path: Path) -> None:
    assert make(tmp_path) == "chat\0b\0"
    assert make(tmp_path, "PROMPT=") == "chat\0b\0"
