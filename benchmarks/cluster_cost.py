"""What a batch of prompts costs a prompt, and what a cluster adds: the numbers that docs/scale.md reckons with.

    python benchmarks/cluster_cost.py BUNDLE [--prompts 48] [--slots 8] [--items 200]

Answers prompts of about 180 tokens with 64 tokens each in this process; then maps empty items over a Ray that it starts
on this machine (where ray is installed). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from headrace.batch import answer_file, read_prompts
from headrace.cluster import map_over
from headrace.language_model import load

WORDS = (
    "water", "river", "the", "of", "a", "stream", "flows", "into", "sea", "mountain", "valley", "rain", "bridge",
    "boat", "fish", "city", "light", "deep", "old", "new",
)  # fmt: skip
ASKED, ANSWERED = 150, 64  # words of a prompt, tokens of an answer
FILE = 200_000  # lines of a file that is only read


@contextmanager
def nothing() -> Iterator[Callable[[int], int]]:
    """Work that costs nothing."""
    yield lambda item: item


def prompts(path: Path, count: int) -> None:
    """A file of prompts that have nothing in common."""
    random_ = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = " ".join(random_.choice(WORDS) for _ in range(ASKED))
            file.write(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")


def in_one_process(bundle: str, folder: Path, count: int, slots: int) -> dict[str, Any]:
    """Opening, and seconds a prompt."""
    source, out = folder / "prompts.jsonl", folder / "answers.jsonl"
    prompts(source, count)
    begun = time.perf_counter()
    with load(bundle, slots=slots) as model:
        opened = time.perf_counter() - begun
        begun = time.perf_counter()
        answer_file(model, source, out, max_tokens=ANSWERED, options=model.sampling_options(temperature=0))
        spent = time.perf_counter() - begun
    used = [json.loads(line)["usage"] for line in out.read_text(encoding="utf-8").splitlines()]
    return {
        "prompts": count,
        "slots": slots,
        "open_s": round(opened, 2),
        "s_a_prompt": round(spent / count, 3),
        "prompt_tokens": sum(one["prompt_tokens"] for one in used),
        "answer_tokens": sum(one["tokens"] for one in used),
        "bytes_a_line": out.stat().st_size // count,
    }


def reading(folder: Path) -> dict[str, Any]:
    """A long file of prompts, read."""
    path = folder / "long.jsonl"
    prompts(path, FILE)
    before, begun = psutil.Process().memory_info().rss, time.perf_counter()
    lines = read_prompts(path)
    spent = time.perf_counter() - begun
    held = psutil.Process().memory_info().rss - before
    return {"lines": len(lines), "us_a_line": round(1e6 * spent / FILE, 1), "bytes_a_line": held // FILE}


def on_a_cluster(items: int) -> dict[str, Any]:
    """What Ray adds to each item, and to the first."""
    from cluster_cost import nothing as named  # the processes of the cluster have another __main__

    os.environ.update({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"})
    begun = time.perf_counter()
    answers = map_over("local", named, range(items))
    next(answers)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    rest = sum(1 for _ in answers)
    return {"first_item_s": round(first, 1), "ms_an_item": round(1e3 * (time.perf_counter() - begun) / rest, 2)}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--items", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = {"batch": in_one_process(given.bundle, Path(name), given.prompts, given.slots)}
        report["file"] = reading(Path(name))
    if find_spec("ray") is not None:
        report["cluster"] = on_a_cluster(given.items)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
