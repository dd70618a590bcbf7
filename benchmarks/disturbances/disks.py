"""Disks that are full at some moment of an export, and one that cannot be written."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.exports import SMALL, Exports

from disturbances.bundles import content, made
from disturbances.findings import fault
from disturbances.processes import run
from headrace.bundle.folder import open_bundle
from headrace.errors import HeadraceError
from headrace.exporter.job import export
from headrace.measure.card import write_card
from headrace.runtime.session import Session, write_session
from headrace.text.turns import Message


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
