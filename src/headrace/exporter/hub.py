"""A repository of a Hugging Face hub into a folder: every file of one commit, whole, checked and resumable.

huggingface_hub finds the hub (HF_ENDPOINT), the token (HF_TOKEN or its login) and the way there; which files are taken
says repository.py. A file grows under DIR/.cache/headrace/ and gets its name when its hash is the one the hub states,
so that an interrupted pull goes on where it stopped. Knows nothing about what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from headrace.bundle.work_folder import work_folder
from headrace.errors import CheckpointError, UserError, shown
from headrace.exporter.repository import RepositoryFile, choose
from headrace.files import read_json, sha256_file, sync, write_file
from headrace.progress import Progress, silent

__all__ = ["Record", "pull_repository", "pulled"]

RECORD = Path(".cache/headrace/pull.json")
MEGABYTE = 1_000_000
STAGE = "download (MB)"
INDEX_LIMIT = 64 << 20  # bytes of an index, which is read before it is chosen


@dataclass(frozen=True)
class Record:
    """What pull put into a folder.

    Attributes:
        repository: ORG/REPO.
        revision: the commit all files are of.
        asked: the branch, tag or commit that was asked for; None for the default branch.
        license: as the repository states it, or None.
        files: name → `size` in bytes and `content`, a hash or the commit, of every file that pull has written.
        model: the file that is the model, or None for the folder.
        whole: all files are there.
    """

    repository: str
    revision: str
    asked: str | None = None
    license: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: str | None = None
    whole: bool = False


def pulled(path: Path) -> Record | None:
    """What pull put into a folder, or into the one a model's file lies in; None when it did not make it."""
    path = next((each / RECORD for each in (path, *path.parents) if (each / RECORD).is_file()), path)
    if path.name != RECORD.name:
        return None
    try:
        return Record(**read_json(path, error=CheckpointError, advice="remove it"))
    except TypeError:
        raise CheckpointError(f"{path} is no record of pull; expected what it writes; remove it") from None


def pull_repository(
    name: str, folder: Path, *, file: str | None = None, revision: str | None = None, progress: Progress = silent
) -> Path:
    """Fetch what a model needs of a repository.

    Args:
        name: ORG/REPO.
        folder: where the files go; what lies there under one of their names with other content is left alone.
        file: which of several GGUF models, by a part of its name.
        revision: a branch, tag or commit.
        progress: told the megabytes.

    Returns:
        What `headrace export` takes: a .gguf file or the folder.

    Raises:
        CheckpointError: the repository, the revision or the model is not there or needs a token; the hub cannot be
            reached; a file did not come whole; the disk is too full; files of another origin, or that were changed
            since pull wrote them, are in the way.
    """
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    # Progress, and what an interruption leaves, in steps of a quarter of a megabyte instead of ten.
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    before = pulled(folder) if (folder / RECORD).is_file() else None
    if before and before.repository != name:
        raise CheckpointError(f"{folder} has {before.repository}; expected a folder for {name}; choose another with -o")
    try:
        with _told(name, revision):
            info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except OfflineModeIsEnabled:
        return _offline(name, folder, before, revision)
    fresh = [path for path in (folder / RECORD.parts[0], folder) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with work_folder(folder / RECORD.parent, "files of a repository as they come"):
            return _fetch(name, info, folder, file, revision, progress)
    finally:
        for path in fresh:
            with suppress(OSError):  # goes only if nothing came into it
                path.rmdir()


def _fetch(name: str, info: Any, folder: Path, file: str | None, revision: str | None, progress: Progress) -> Path:
    """What `pull_repository` does once the repository is known and the folder is this process's own."""
    before = pulled(folder) if (folder / RECORD).is_file() else None
    commit = info.sha or revision or "main"
    hub = _Hub(info.id or name, commit)
    listed = [
        RepositoryFile(
            sibling.rfilename,
            sibling.size,
            sibling.lfs.sha256 if sibling.lfs else None,
            None if sibling.lfs else sibling.blob_id,
        )
        for sibling in info.siblings or []
    ]
    by_name = {each.name: each for each in listed}
    beside, weights = choose(listed, file, lambda index: hub.read_index(folder, by_name[index], before))
    model = weights[0].name if weights[0].name.endswith(".gguf") else None
    chosen = [*beside, *weights]
    missing = [each for each in chosen if not hub.is_there(folder, each, before)]
    _check_room(folder, missing)
    # First of all, so that at no time the folder holds files of one commit and a record of another.
    made = _without_others(folder, before, commit, by_name) if before else {}
    record = Record(name, commit, revision, _license(info.card_data), made, model)
    _write_record(folder, record)
    whole, done = max(-(-sum(each.size or 0 for each in missing) // MEGABYTE), 1), 0
    for each in missing:
        hub.fetch(folder, each, lambda n, done=done: progress(STAGE, min((done + n) // MEGABYTE, whole - 1), whole))
        done += (folder / each.name).stat().st_size
        made[each.name] = hub.written(folder, each)
        _write_record(folder, record)
    if missing:
        progress(STAGE, whole, whole)
    _write_record(folder, replace(record, whole=True))
    return folder / model if model else folder


class _Hub:
    """One commit of one repository."""

    def __init__(self, name: str, commit: str) -> None:
        self.name, self.commit = name, commit

    def written(self, folder: Path, file: RepositoryFile) -> dict[str, Any]:
        """How the record tells a file that is there."""
        return {"size": (folder / file.name).stat().st_size, "content": file.sha256 or file.blob or self.commit}

    def is_there(self, folder: Path, file: RepositoryFile, before: Record | None) -> bool:
        """Whether a file is there already; one with other content than pull wrote is never replaced."""
        path = folder / file.name
        if not path.exists():
            return False
        made = before.files if before else {}
        if path.is_file() and made.get(file.name) == self.written(folder, file):
            return True
        found, expected = _hash_of(path, file) if path.is_file() else (None, "a file")
        if found == expected and found is not None:
            return True
        if before is None or file.name not in made:
            raise CheckpointError(
                f"{path} is there with other content, which pull did not write; choose another folder, -o"
            )
        _refuse_changed(folder, file.name, before)
        return False

    def fetch(self, folder: Path, file: RepositoryFile, progress: Any) -> None:
        """A file, under its name when it is whole and its hash is right."""
        target = folder / file.name
        part = self._part(folder, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as out:
            self._download(file, out, progress)
            out.flush()
        found, expected = _hash_of(part, file)
        if found != expected:
            part.unlink()
            raise CheckpointError(
                f"{file.name} of {self.name} came with hash {found}; expected {expected}; it was not kept; run pull "
                "again"
            )
        sync(part)
        part.replace(target)

    def read_index(self, folder: Path, file: RepositoryFile, before: Record | None) -> dict[str, Any]:
        """A JSON file, fetched if need be, but not yet given its name."""
        if self.is_there(folder, file, before):
            return read_json(folder / file.name, error=CheckpointError, advice="tell the repository's authors")
        if (file.size or 0) > INDEX_LIMIT:
            raise CheckpointError(f"{file.name} of {self.name} has {file.size} bytes; expected at most {INDEX_LIMIT}")
        part = self._part(folder, file)
        with part.open("ab") as out:
            self._download(file, out, lambda _: None)
        return read_json(part, error=CheckpointError, advice="tell the repository's authors")

    def _part(self, folder: Path, file: RepositoryFile) -> Path:
        """Where a file grows; other content has another name. What cannot be gone on with begins anew."""
        identity = file.sha256 or file.blob or f"{self.commit}/{file.name}"
        part = folder / RECORD.parent / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and (file.size is None or part.stat().st_size > file.size):
            part.unlink()
        return part

    def _download(self, file: RepositoryFile, out: IO[bytes], progress: Any) -> None:
        """Append what is missing."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        have = out.tell()
        with _told(self.name, self.commit):
            http_get(
                hf_hub_url(self.name, file.name, revision=self.commit),
                _Watched(out, progress),  # type: ignore[arg-type]  # it reads and writes as a file does
                resume_size=have,
                headers=build_hf_headers(library_name="headrace"),
                expected_size=file.size,
            )


def _without_others(
    folder: Path, before: Record, commit: str, listed: dict[str, RepositoryFile]
) -> dict[str, dict[str, Any]]:
    """Remove what pull wrote of another commit and this one does not have; what pull wrote and that stays."""
    if before.revision == commit:
        return dict(before.files)
    stays = {
        name: written
        for name, written in before.files.items()
        if name in listed and written.get("content") in (listed[name].sha256, listed[name].blob)
    }
    gone = [name for name in before.files if name not in stays and (folder / name).exists()]
    for name in gone:
        _refuse_changed(folder, name, before)
    for name in gone:
        (folder / name).unlink()
    return stays


def _refuse_changed(folder: Path, name: str, record: Record) -> None:
    """Raise CheckpointError when a file is no longer what pull wrote."""
    path, written = folder / name, record.files[name]
    content = str(written.get("content"))
    same = path.is_file() and path.resolve().is_relative_to(folder.resolve())
    same = same and path.stat().st_size == written.get("size")
    if same and content != record.revision:  # a hub that states no hash
        of_git = len(content) == 40
        found, expected = _hash_of(path, RepositoryFile(name, None, None if of_git else content, content))
        same = found == expected
    if not same:
        raise CheckpointError(
            f"{path} was changed since pull wrote it and would be replaced; move it away, or choose another folder, -o"
        )


class _Watched:
    """A file that tells how long it is after each write."""

    def __init__(self, file: IO[bytes], progress: Any) -> None:
        self._file, self._progress = file, progress

    def write(self, data: bytes) -> int:
        count = self._file.write(data)
        self._progress(self._file.tell())
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as one line that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    try:
        yield
    except hub_errors.OfflineModeIsEnabled:
        raise
    except hub_errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is given only to those who accepted its terms; accept them at {constants.ENDPOINT}/{name} and set "
            "HF_TOKEN"
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is not on {constants.ENDPOINT}, or is private; expected ORG/REPO; check the name, or set HF_TOKEN"
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {shown(revision)}; expected a branch, tag or commit") from None
    except UserError:
        raise
    except Exception as error:  # the library under huggingface_hub has had three names, and each its own errors
        if not _is_of_network(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name} could not be downloaded from {constants.ENDPOINT}: {reason}; run pull again, it goes on where it "
            "stopped"
        ) from None


def _is_of_network(error: Exception) -> bool:
    return isinstance(error, OSError | ValueError) or type(error).__module__.startswith(
        ("httpx", "httpcore", "requests")
    )


def _offline(name: str, folder: Path, record: Record | None, revision: str | None) -> Path:
    """Offline, what was pulled before is taken if it is whole."""
    right = record and (revision is None or revision in (record.asked, record.revision))
    if record is None or not right or not record.whole:
        held = "is not whole" if record and right else f"does not have {name}{f' {revision}' if revision else ''}"
        raise CheckpointError(f"HF_HUB_OFFLINE is set and {folder} {held}; unset it and run pull again")
    for file, written in record.files.items():
        if not (folder / file).is_file() or (folder / file).stat().st_size != written.get("size"):
            raise CheckpointError(
                f"HF_HUB_OFFLINE is set and {folder / file} is not whole; unset it and run pull again"
            )
    return folder / record.model if record.model else folder


def _hash_of(path: Path, file: RepositoryFile) -> tuple[str | None, str | None]:
    """The hash a file has and the one the hub states: sha256 of a large file, git's blob id of a small one."""
    if file.sha256:
        return sha256_file(path), file.sha256
    if file.blob and len(file.blob) == 40:
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest(), file.blob
    return None, None


def _check_room(folder: Path, files: list[RepositoryFile]) -> None:
    parts = sum(part.stat().st_size for part in (folder / RECORD.parent).glob("*.part"))
    need = sum(file.size or 0 for file in files) - parts
    free = shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"{folder} has room for {free / 1e9:.1f} GB; expected {need / 1e9:.1f} GB for {len(files)} files; free "
            "some or choose another folder, -o"
        )


def _license(card: Any) -> str | None:
    """The licence's name, on one line."""
    name = getattr(card, "license_name", None) or getattr(card, "license", None)
    return shown(name).strip("'") if isinstance(name, str) else None


def _write_record(folder: Path, record: Record) -> None:
    (folder / RECORD).parent.mkdir(parents=True, exist_ok=True)
    write_file(folder / RECORD, json.dumps(asdict(record), indent=2).encode())
