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
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from disturbances.bits import flip  # noqa: E402
from disturbances.bundles import made  # noqa: E402
from disturbances.disks import full  # noqa: E402
from disturbances.findings import FAULTS  # noqa: E402
from disturbances.kills import kill  # noqa: E402
from disturbances.power_cut import power  # noqa: E402
from disturbances.together import together  # noqa: E402
from tests.exports import Exports  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["kill", "power", "full", "flip", "together"])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--compile", type=int, default=0, help="kills of a compilation, which takes long")
    parser.add_argument("--bundle", type=Path, help="flip: a copy of this one instead of a tiny one")
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
            "flip": lambda: flip(_copied(options.bundle or made(exports), Path(scratch)), rng, options.times * 5),
            "together": lambda: together(exports, options.times),
        }
        for what in options.what:
            jobs[what]()
    for fault in FAULTS:
        print(f"FAILED {fault}")
    return int(bool(FAULTS))


def _copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "flip"))


if __name__ == "__main__":
    sys.exit(main())
