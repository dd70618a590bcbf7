"""The power goes at any operation of an export: what would be on the disk then, and what headrace makes of it."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.exports import SMALL, Exports

from disturbances.bundles import content
from disturbances.findings import fault
from disturbances.processes import run
from headrace.bundle.folder import check_files, open_bundle
from headrace.errors import HeadraceError
from headrace.exporter.job import export


class Disk:
    """What of a folder would be on disk if the power went now: file contents and names as they were synced.

    Args:
        root: the folder; what is in it to begin with is on disk.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content: dict[int, bytes] = {}  # of files, by inode
        self.names: dict[int, dict[str, int]] = {}  # of folders, by inode
        self.folders: set[int] = set()
        for entry in [root, *root.rglob("*")]:
            self.sync(entry)

    def sync(self, path: Path) -> None:
        """fsync of a file or a folder."""
        inode = path.stat().st_ino
        if path.is_dir():
            self.folders.add(inode)
            self.names[inode] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        else:
            self.content[inode] = path.read_bytes()

    def now(self) -> dict[int, dict[str, int]]:
        """Names as the system shows them: every operation so far."""
        found = {}
        for folder in [self.root, *(entry for entry in self.root.rglob("*") if entry.is_dir())]:
            inode = folder.stat().st_ino
            self.folders.add(inode)
            found[inode] = {entry.name: entry.stat().st_ino for entry in folder.iterdir()}
        return found

    def states(self, rng: random.Random) -> Iterator[dict[str, bytes | None]]:
        """Folders as a cut may leave them: path → content, None for a folder."""
        shown = self.now()
        yield self._tree(shown)
        yield self._tree(self.names)
        for _ in range(2):  # some folders' names came to the disk, others' did not
            mixed = {inode: (shown if rng.randrange(2) else self.names).get(inode, {}) for inode in self.folders}
            yield self._tree(mixed)

    def _tree(self, names: Mapping[int, Mapping[str, int]]) -> dict[str, bytes | None]:
        tree: dict[str, bytes | None] = {}
        pending, seen = [(self.root.stat().st_ino, "")], set()
        while pending:
            inode, path = pending.pop()
            if inode in seen:  # a folder that was moved, and whose old name is still there too
                continue
            seen.add(inode)
            for name, child in names.get(inode, {}).items():
                if child in self.folders:
                    tree[f"{path}{name}"] = None
                    pending.append((child, f"{path}{name}/"))
                else:
                    tree[f"{path}{name}"] = self.content.get(child, b"")
        return tree


def power(exports: Exports, rng: random.Random) -> None:
    """A cut at every operation."""
    options = {**SMALL, "calibration": [exports.text]}
    checkpoint = exports.checkpoint()
    for over in (False, True):
        place = exports.root / f"power-{over}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if over:
            run(lambda out=place / "out": export(checkpoint, out, **{**options, "windows": 1}))  # type: ignore[misc]
        earlier = content(place / "out") if over else None
        disk = Disk(place)
        states: dict[str, dict[str, bytes | None]] = {}
        events = 0

        def cut(disk: Disk = disk, states: dict[str, dict[str, bytes | None]] = states) -> None:
            nonlocal events
            events += 1
            for tree in disk.states(rng):
                states.setdefault(_digest(tree), tree)

        with _watched(disk, cut):
            export(checkpoint, place / "out", **options)
        cut()
        expected = content(place / "out")
        opened = 0
        for number, tree in enumerate(states.values()):
            with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
                folder = Path(made)
                _write(folder, tree)
                complete = []
                for manifest in folder.rglob("headrace.json"):
                    root = manifest.parent
                    try:
                        open_bundle(root)
                    except HeadraceError:
                        continue
                    opened += 1
                    if problems := check_files(root):
                        fault(f"power {number}: {root.relative_to(folder)} opens, but {problems[0]}")
                    complete.append(content(root))
                if over and not any(files in (earlier, expected) for files in complete):
                    fault(f"power {number}: neither the old bundle nor the new one is left")
                if number % max(1, len(states) // 12) == 0:  # the next export is as if nothing had been
                    place2 = folder / "out"
                    if status := run(lambda p=place2: export(checkpoint, p, resume=True, restart=True, **options)):  # type: ignore[misc]
                        fault(f"power {number}: the next export ended with {status}")
                    elif content(place2) != expected:
                        fault(f"power {number}: the next export gave another bundle")
        what = "over a bundle" if over else "beside nothing"
        print(
            f"power {what}: {events} operations, {len(states)} different disks, {opened} bundles on them opened and "
            "were whole; 12 were gone on with",
            flush=True,
        )


def _digest(tree: Mapping[str, bytes | None]) -> str:
    total = hashlib.sha256()
    for path, data in sorted(tree.items()):
        total.update(f"{path}\0{'' if data is None else hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()


def _write(folder: Path, tree: Mapping[str, bytes | None]) -> None:
    for path, data in sorted(tree.items()):
        if data is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)


@contextmanager
def _watched(disk: Disk, cut: Callable[[], None]) -> Iterator[None]:
    """Every operation of this process on files below the disk's root: a cut is tried before and behind each."""
    from headrace.bundle import folder

    names = ("rename", "replace", "unlink", "rmdir", "mkdir", "remove", "fsync")
    real = {name: getattr(os, name) for name in names}
    exchange = folder.exchange

    def ours(value: Any) -> bool:
        if isinstance(value, int):
            value = Path(f"/proc/self/fd/{value}").readlink()
        return str(value).startswith(str(disk.root))

    def wrapped(name: str) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **more: Any) -> Any:
            if more or not ours(first):
                return real[name](first, *rest, **more)
            cut()
            made = real[name](first, *rest)
            if name == "fsync":
                disk.sync(Path(f"/proc/self/fd/{first}").readlink())
            cut()
            return made

        return call

    def exchanged(a: Path, b: Path) -> bool:
        cut()
        made = exchange(a, b)
        cut()
        return made

    for name in names:
        setattr(os, name, wrapped(name))
    folder.exchange = exchanged
    try:
        yield
    finally:
        folder.exchange = exchange
        for name in names:
            setattr(os, name, real[name])
