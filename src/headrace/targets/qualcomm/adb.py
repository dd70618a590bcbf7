"""push: a Genie folder to a phone over a plain adb. Knows the commands, not what the files mean."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from headrace.errors import TargetError

__all__ = ["push_commands", "push_folder", "run_command"]

DEVICE_ROOT = "/data/local/tmp/headrace"


def push_commands(folder: Path, name: str) -> list[list[str]]:
    """The adb commands, in order, that bring a folder's files to the phone."""
    place = f"{DEVICE_ROOT}/{name}"
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [
        ["adb", "shell", "mkdir", "-p", shlex.quote(place)],  # the phone's shell reads it once more
        *(["adb", "push", str(path), f"{place}/{path.name}"] for path in files),
    ]


def run_command(name: str) -> list[str]:
    """The command that answers the sample prompt on the phone; QAIRT's tool and libraries are expected beside the
    binaries, as the folder's README.md says."""
    inside = (
        f"cd {shlex.quote(f'{DEVICE_ROOT}/{name}')} && export LD_LIBRARY_PATH=$PWD ADSP_LIBRARY_PATH=$PWD && "
        "./genie-t2t-run -c genie_config.json --prompt_file sample_prompt.txt"
    )
    return ["adb", "shell", inside]


def push_folder(commands: Sequence[Sequence[str]]) -> None:
    """Run adb commands one after another.

    Raises:
        TargetError: there is no adb, no device, or a command failed.
    """
    if shutil.which("adb") is None:
        raise TargetError("adb is not on PATH; expected Android's platform tools: install them, or use --dry-run")
    state = subprocess.run(["adb", "get-state"], capture_output=True, text=True)
    if state.returncode or state.stdout.strip() != "device":
        reason = (state.stderr or state.stdout).strip().splitlines()
        raise TargetError(
            f"adb sees no device ({reason[-1] if reason else 'no answer'}); connect a phone with USB debugging allowed"
        )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines()
            raise TargetError(f"{shlex.join(command)} failed: {reason[-1] if reason else done.returncode}")
