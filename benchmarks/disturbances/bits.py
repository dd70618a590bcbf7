"""Single bits of a bundle's files changed, one after the other."""

from __future__ import annotations

import random
from pathlib import Path

from disturbances.findings import fault
from headrace.bundle.folder import check_files, open_bundle
from headrace.errors import HeadraceError


def flip(root: Path, rng: random.Random, times: int) -> None:
    """One bit at a time, in each file as often as in any other.

    Args:
        root: a bundle that nobody else uses.
        rng: chooses the bits.
        times: how many.
    """
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    missed = opened = 0
    for number in range(times):
        path = files[number % len(files)]
        at, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        _invert(path, at, bit)
        name = path.relative_to(root).as_posix()
        if [problem[0] for problem in check_files(root)] != [name]:
            missed += 1
            fault(f"flip: byte {at} of {name} is not named")
        try:
            open_bundle(root)
            opened += 1
        except HeadraceError as error:
            if name not in str(error) and "headrace.json" not in str(error):
                fault(f"flip: byte {at} of {name} is refused, but not named: {error}")
        _invert(path, at, bit)
    print(f"flip: {times} bits in {len(files)} files of {sum(file.stat().st_size for file in files) / 1e6:.1f} MB: "
          f"{missed} not named by verify, {opened} not met by opening", flush=True)  # fmt: skip


def _invert(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))
