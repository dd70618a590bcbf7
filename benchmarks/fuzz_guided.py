"""Hostile inputs guided by coverage: a reader's inputs grow out of those that reached new code of headrace.

    pip install atheris
    python benchmarks/fuzz_guided.py READER [-runs=10000] [-max_len=1024] [CORPUS]     # options of libFuzzer

The fuzzer's bytes are what chance draws from (tests/hostile), so that its inputs have the structure of the format, and
are kept when headrace's own code took another way. They may be long from the start, since where they end chance gives
nothing but zeros. An input fails as in fuzz_readers.py, which tries more of them; here
the first failure ends the run, and its bytes are kept as crash-… beside.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]


class Drawn(random.Random):
    """Chance that is drawn from given bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int, /) -> int:
        """`k` bits of the next bytes."""
        count = (k + 7) // 8
        piece = self._data[self._at : self._at + count]
        self._at += count
        return int.from_bytes(piece, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """0 ≤ x < 1, of the next seven bytes."""
        return self.getrandbits(53) / (1 << 53)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader")
    options, rest = parser.parse_known_args()
    sys.path.insert(0, str(ROOT))
    # To the end, since some modules are imported when they are first used.
    with atheris.instrument_imports(include=["headrace", "headrace_kernels"]), tempfile.TemporaryDirectory() as scratch:
        from tests.hostile.format import try_one
        from tests.hostile.formats import FORMATS

        form = FORMATS[options.reader]
        logging.disable()
        warnings.simplefilter("error")
        folder = Path(scratch) / "fuzz"
        good = form.prepare(folder)
        arguments = [sys.argv[0], "-len_control=0", *rest]
        atheris.Setup(arguments, lambda data: try_one(form, Drawn(data), folder, good) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
