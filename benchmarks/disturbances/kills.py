"""An export, a compilation, a saved conversation and a card, killed with -9 at random moments."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.exports import PHONE, SMALL, Exports

from disturbances.bundles import comparable, made, whole
from disturbances.findings import fault
from disturbances.processes import killed, last_words, moments, run
from headrace.bundle.folder import check_files
from headrace.exporter.job import export
from headrace.measure.card import card_problems, write_card
from headrace.runtime.session import Session, read_session, write_session
from headrace.text.turns import Message


def kill(exports: Exports, rng: random.Random, times: int, compilations: int) -> None:
    """-9 at random moments."""
    options = {**SMALL, "calibration": [exports.text]}
    _kill_exports("export", exports, rng, times, "gqa", options)
    if compilations:
        _kill_exports("compile", exports, rng, compilations, "phone", {**options, **PHONE})
    kill_sessions(exports, rng, times)
    kill_cards(exports, rng, times)


def kill_sessions(exports: Exports, rng: random.Random, times: int) -> None:
    """A conversation while it is saved over another."""
    folder = exports.root / "killed-sessions"
    folder.mkdir()
    talks = [Session("m", "host", (Message("user", f"{i}"),), tuple(range(9)), bytes([i]) * (4 << 20)) for i in (1, 2)]
    path = folder / "talk"
    write_session(path, talks[0])
    kept = {talks[0].cache: 0, talks[1].cache: 0}
    for seconds in moments(rng, times, lambda: write_session(folder / "other", talks[1])):
        write_session(path, talks[0])
        killed(lambda: write_session(path, talks[1]), seconds)
        kept[read_session(path).cache] += 1
    print(f"kill session: {times} kills, the old one was there {kept[talks[0].cache]} times, the new one "
          f"{kept[talks[1].cache]} times", flush=True)  # fmt: skip


def kill_cards(exports: Exports, rng: random.Random, times: int) -> None:
    """A card while it is written over another."""
    root = Path(shutil.copytree(made(exports), exports.root / "killed-cards"))
    write_card(root, {}, pictures=False)
    before = (root / "README.md").read_bytes()
    write_card(root, {"title": "Another"}, pictures=False)
    after = (root / "README.md").read_bytes()
    seen = {before: 0, after: 0}
    for seconds in moments(rng, times, lambda: write_card(root, {"title": "Another"}, pictures=False)):
        (root / "README.md").write_bytes(before)
        killed(lambda: write_card(root, {"title": "Another"}, pictures=False), seconds)
        found = (root / "README.md").read_bytes()
        if found not in seen or card_problems(root) or check_files(root):
            fault("kill card: neither the old card nor the new one, or something beside it")
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
    for number, seconds in enumerate(moments(rng, times, job)):
        if not expected:
            expected = comparable(place / "out")
        shutil.rmtree(place / "out", ignore_errors=True)
        shutil.rmtree(place / "out.partial", ignore_errors=True)
        if number % 2:
            shutil.copytree(place / "old", place / "out")
        killed(job, seconds)
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
            fault(f"kill {name} {number}: --resume failed after a kill at {seconds:.2f} s: {last_words()}")
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
