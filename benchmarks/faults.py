"""What becomes of files when a process is killed, the power goes, the disk is full, or two do the same at once.

    python benchmarks/faults.py [kill] [power] [full] [flip] [together] [--times 100] [--compile 5] [--seed 0]

kill      an export, a saved conversation, a card and a compilation are killed with -9 at random moments: what was there
          before is whole, or what was to come is; `--resume` gives the very bytes of a run that nobody disturbed,
          but for what Qualcomm's compiler makes, which differs from run to run
power     an export beside nothing and one over a bundle are cut off at every file operation: of what was written only
          what was synced is left, of names all, or those whose folder was synced, or some; no half bundle opens
full      an export on disks of many sizes (tmpfs, which needs root) and on a read-only one: a line, then --resume
flip      single bits of a bundle's files changed: each file is named by verify --files-only
together  saves, exports and openings at the same moment

Everything is done with tiny models, in forks of one process that has imported what it needs. Exit 1 if anything failed.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.exports import PHONE, SMALL, Exports  # noqa: E402

from headrace.bundle.folder import check_files, is_bundle, open_bundle  # noqa: E402
from headrace.errors import HeadraceError  # noqa: E402
from headrace.exporter.job import export  # noqa: E402
from headrace.measure.card import card_problems, write_card  # noqa: E402
from headrace.runtime.session import Session, read_session, write_session  # noqa: E402
from headrace.text.turns import Message  # noqa: E402

FAULTS: list[str] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["kill", "power", "full", "flip", "together"])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--compile", type=int, default=0, help="kills of a compilation, which takes long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "exports").mkdir()
        exports = Exports(Path(scratch) / "exports")
        rng = random.Random(options.seed)
        jobs: Mapping[str, Callable[[], None]] = {
            "kill": lambda: kill(exports, rng, options.times, options.compile),
            "power": lambda: power(exports, rng),
            "full": lambda: full(exports),
            "flip": lambda: flip(exports, rng, options.times),
            "together": lambda: together(exports, options.times),
        }
        for what in options.what:
            jobs[what]()
    for fault in FAULTS:
        print(f"FAILED {fault}")
    return int(bool(FAULTS))


def fault(text: str) -> None:
    """Note what must not be."""
    FAULTS.append(text)
    print(f"  failed: {text}", flush=True)


@contextmanager
def forked(job: Callable[[], object]) -> Iterator[int]:
    """A fork that does a job and leaves: 0, or 2 where it was refused. Its words go nowhere."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            job()
            status = 0
        except HeadraceError:
            status = 2
        finally:
            os._exit(status)
    yield pid
    with_status(pid)


def with_status(pid: int) -> int | None:
    """How it ended; None when that was asked before."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def run(job: Callable[[], object]) -> int:
    """A job in a fork of its own: its status."""
    with forked(job) as pid:
        return with_status(pid) or 0


def made(exports: Exports, **options: Any) -> Path:
    """A tiny bundle, exported in a fork: threads that a library has here would be missing in every later fork."""
    place = exports.root / f"made-{hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]}"
    if not place.exists():
        checkpoint = exports.checkpoint()
        if run(lambda: export(checkpoint, place, **{**SMALL, "calibration": [exports.text], **options})):
            raise RuntimeError("a tiny bundle could not be made")
    return place


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file, by path."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def comparable(folder: Path) -> dict[str, str]:
    """The same without what Qualcomm's compiler makes, and without its hashes: it differs from run to run."""
    found = content(folder)
    if any(name.endswith(".serialized.bin") for name in found):
        found = {
            name: value
            for name, value in found.items()
            if not name.endswith((".serialized.bin", "metadata.yaml", "headrace.json"))
        }
    return found


def whole(folder: Path) -> bool:
    """A bundle whose every byte is as its manifest says."""
    return is_bundle(folder) and not check_files(folder)


# kill


def kill(exports: Exports, rng: random.Random, times: int, compilations: int) -> None:
    """-9 at random moments."""
    options = {**SMALL, "calibration": [exports.text]}
    _kill_exports("export", exports, rng, times, "gqa", options)
    if compilations:
        _kill_exports("compile", exports, rng, compilations, "phone", {**options, **PHONE})
    folder = exports.root / "kill"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    talks = [Session("m", "host", (Message("user", f"{i}"),), tuple(range(9)), bytes([i]) * (4 << 20)) for i in (1, 2)]
    path = folder / "talk"
    write_session(path, talks[0])
    kept = {talks[0].cache: 0, talks[1].cache: 0}
    for seconds in _moments(rng, times, lambda: write_session(folder / "other", talks[1])):
        write_session(path, talks[0])
        _killed(lambda: write_session(path, talks[1]), seconds)
        kept[read_session(path).cache] += 1
    print(f"kill session: {times} kills, the old one was there {kept[talks[0].cache]} times, the new one "
          f"{kept[talks[1].cache]} times", flush=True)  # fmt: skip
    root = Path(shutil.copytree(made(exports), folder / "bundle"))
    write_card(root, {}, pictures=False)
    before = (root / "README.md").read_bytes()
    write_card(root, {"title": "Another"}, pictures=False)
    after = (root / "README.md").read_bytes()
    seen = {before: 0, after: 0}
    for seconds in _moments(rng, times, lambda: write_card(root, {"title": "Another"}, pictures=False)):
        (root / "README.md").write_bytes(before)
        _killed(lambda: write_card(root, {"title": "Another"}, pictures=False), seconds)
        found = (root / "README.md").read_bytes()
        if found not in seen or card_problems(root):
            fault("kill card: neither the old card nor the new one")
        else:
            seen[found] += 1
    print(f"kill card: {times} kills, old {seen[before]}, new {seen[after]}", flush=True)


def _kill_exports(
    name: str, exports: Exports, rng: random.Random, times: int, kind: str, options: Mapping[str, Any]
) -> None:
    checkpoint, place = exports.checkpoint(kind), exports.root / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    old = {**options, "method": "nearest", "windows": 1}
    run(lambda: export(checkpoint, place / "old", **{**old, "targets": (), "keep_onnx": False}))
    earlier = comparable(place / "old")
    expected: dict[str, str] = {}

    def job() -> None:
        export(checkpoint, place / "out", resume=True, restart=True, **options)

    counts = {"old": 0, "new": 0, "aside": 0}
    for number, seconds in enumerate(_moments(rng, times, job)):
        if not expected:
            expected = comparable(place / "out")
        shutil.rmtree(place / "out", ignore_errors=True)
        shutil.rmtree(place / "out.partial", ignore_errors=True)
        if number % 2:
            shutil.copytree(place / "old", place / "out")
        _killed(job, seconds)
        found = comparable(place / "out") if (place / "out").exists() else None
        if found == expected:
            counts["new"] += 1
        elif number % 2 and found == earlier:
            counts["old"] += 1
        elif number % 2 and whole(place / "out.partial" / "replaced"):
            counts["aside"] += 1
        elif number % 2 or found is not None:
            fault(f"kill {name} {number}: after {seconds:.2f} s neither the old bundle nor the new one is there")
        if run(job):
            fault(f"kill {name} {number}: --resume failed after a kill at {seconds:.2f} s")
        elif comparable(place / "out") != expected or not whole(place / "out"):
            odd = sorted(set(comparable(place / "out").items()) ^ set(expected.items()))
            fault(f"kill {name} {number}: --resume gave another bundle after a kill at {seconds:.2f} s: {odd[:3]}")
        if (place / "out.partial").exists():
            fault(f"kill {name} {number}: out.partial is left")
    print(
        f"kill {name}: {times} kills, {times // 2} of them over a bundle: still the old one {counts['old']}, the new "
        f"one {counts['new']}, set aside {counts['aside']}; every --resume gave the same {len(expected)} files",
        flush=True,
    )


def _moments(rng: random.Random, times: int, job: Callable[[], object]) -> Iterator[float]:
    """Random moments of a job that is done once to see how long it takes."""
    start = time.perf_counter()
    if status := run(job):
        fault(f"the job itself ended with {status}")
    took = time.perf_counter() - start
    for _ in range(times):
        yield rng.uniform(0, took)


def _killed(job: Callable[[], object], seconds: float) -> None:
    with forked(job) as pid:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)


# power


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


# full


def full(exports: Exports) -> None:
    """Disks of many sizes, and one that cannot be written."""
    disk = exports.root / "disk"
    disk.mkdir()
    options = {**SMALL, "calibration": [exports.text]}
    checkpoint = exports.checkpoint()
    expected = content(made(exports))
    from headrace.exporter import job as exporter_job

    exporter_job.refuse_full_disk = lambda *_: None  # it would refuse before anything is written
    lines = kept = done = 0
    sizes = [*range(16, 512, 32), *range(512, 1400, 96)]
    for size in sizes:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=True)
        try:
            told = _line(lambda: export(checkpoint, disk / "out", **options))
            if told is None:
                done += 1
            else:
                lines += 1
                if "no room left" not in told and "cannot be made" not in told:
                    fault(f"full: {size} kB: {told}")
                kept += (disk / "out.partial" / "state.json").exists()
                if (disk / "out").exists():
                    fault(f"full: {size} kB: half a bundle is at its place")
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                if run(lambda: export(checkpoint, disk / "out", resume=True, restart=True, **options)):
                    fault(f"full: {size} kB: --resume failed")
            if content(disk / "out") != expected:
                fault(f"full: {size} kB: another bundle")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    print(
        f"full: {len(sizes)} disks of {sizes[0]} to {sizes[-1]} kB: {lines} refused in a line, work was kept on {kept}"
        f", {done} had room; with room, --resume gave the same bundle each time",
        flush=True,
    )
    _read_only(exports, disk)


def _read_only(exports: Exports, disk: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        root = Path(shutil.copytree(made(exports), disk / "bundle"))
        write_card(root, {}, pictures=False)
        talk = Session("m", "host", (Message("user", "a"),), (1,), b"x")
        write_session(disk / "talk", talk)
        before = content(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        options = {**SMALL, "calibration": [exports.text]}
        from headrace.graph.device_folder import kept_device_graphs

        jobs: Mapping[str, Callable[[], object]] = {
            "export": lambda: export(exports.checkpoint(), disk / "new", **options),
            "export over": lambda: export(exports.checkpoint(), root, **options),
            "session": lambda: write_session(disk / "talk", talk),
            "card": lambda: write_card(root, {}, pictures=False),
            "device graphs": lambda: kept_device_graphs(open_bundle(root)),
        }
        for name, job in jobs.items():
            told = _line(job)
            if told is None or "\n" in told:
                fault(f"read-only: {name}: {told}")
        if content(disk) != before:
            fault("read-only: something changed")
        print(f"read-only: {len(jobs)} ways to write, each refused in a line, nothing changed", flush=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _line(job: Callable[[], object]) -> str | None:
    """How a job was refused, as the command line would tell it; None where it was done."""
    try:
        job()
    except (HeadraceError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EROFS):
            raise
        return str(error)
    return None


# flip


def flip(exports: Exports, rng: random.Random, times: int) -> None:
    """One bit at a time."""
    root = Path(shutil.copytree(made(exports), exports.root / "flip"))
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    missed = opened = 0
    for number in range(times * 5):
        file = files[number % len(files)]
        data = file.read_bytes()
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        name = file.relative_to(root).as_posix()
        if [problem[0] for problem in check_files(root)] != [name]:
            missed += 1
            fault(f"flip: byte {at} of {name} is not named")
        try:
            open_bundle(root)
            opened += 1
        except HeadraceError:
            pass
        file.write_bytes(data)
    print(f"flip: {times * 5} bits in {len(files)} files, {missed} not named by verify; {opened} opened, since opening "
          "hashes manifest and graphs alone", flush=True)  # fmt: skip


# together


def together(exports: Exports, times: int) -> None:
    """Two of everything."""
    folder = exports.root / "together"
    folder.mkdir()
    talks = [Session("m", "host", (Message("user", f"{i}"),), (1,), bytes([i]) * (1 << 20)) for i in range(4)]
    path = folder / "talk"
    for number in range(times):
        with forked(lambda: write_session(path, talks[0])), forked(lambda: write_session(path, talks[1])):
            pass
        if read_session(path).cache not in (talks[0].cache, talks[1].cache):
            fault(f"together: sessions {number}")
    options = {**SMALL, "calibration": [exports.text]}
    a, b = made(exports), made(exports, windows=1)
    out = folder / "out"
    shutil.copytree(a, out)
    stop = folder / "stop"

    def replace() -> None:
        from headrace.bundle.folder import publish

        for number in range(10_000):
            if stop.exists():
                return
            work = folder / "work"
            shutil.copytree((a, b)[number % 2], work)
            body = json.loads((work / "headrace.json").read_bytes())
            (work / "headrace.json").unlink()
            manifest = {key: value for key, value in body.items() if key not in ("files", "digest", "format")}
            publish(work, out, manifest, aside=folder / "aside")

    good = refused = 0
    with forked(replace):
        for _ in range(times):
            try:
                bundle = open_bundle(out)
                held = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in bundle.files}
                bundle.refuse_replaced()
            except (HeadraceError, FileNotFoundError):
                refused += 1
                continue
            good += 1
            if held != {name: file["sha256"] for name, file in bundle.files.items()}:
                fault("together: a mixture of two bundles was opened")
        stop.touch()
    statuses = []
    with (
        forked(lambda: export(exports.checkpoint(), folder / "one", **options)) as first,
        forked(lambda: export(exports.checkpoint(), folder / "one", **options)) as second,
    ):
        statuses = sorted([with_status(first) or 0, with_status(second) or 0])
    if not whole(folder / "one") or statuses not in ([0, 2], [0, 0]):
        fault(f"together: two exports ended with {statuses}")
    print(f"together: {times} pairs of saves; {good} openings while a bundle was replaced, {refused} refused, none "
          f"mixed; two exports into one place: {statuses}", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
