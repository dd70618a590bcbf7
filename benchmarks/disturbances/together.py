"""Two of everything at the same moment: saves, exports, and openings of what is replaced."""

from __future__ import annotations

import hashlib
import json
import shutil

from tests.exports import SMALL, Exports

from disturbances.bundles import made, whole
from disturbances.findings import fault
from disturbances.processes import forked, with_status
from headrace.bundle.folder import open_bundle
from headrace.errors import HeadraceError
from headrace.exporter.job import export
from headrace.runtime.session import Session, read_session, write_session
from headrace.text.turns import Message


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
