"""SmolLM2 rewritten as a Baichuan (v1) folder, exported, against the original: the largest difference of host logits.

    python benchmarks/baichuan_rewrite.py MODEL.gguf [WORK]

W_pack with KV heads repeated, a plain head, .bin shards. Both are exported with a float32 cache and rounded to
nearest, so that every weight has the same codes and scales in both, and differences are those of arithmetic alone.
Run from the repository's root; WORK (a new temporary folder by default) takes about 1 GB.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.exports import re_emitted
from tests.tiny import rewrite_as_baichuan

import headrace
from headrace.bundle.folder import open_bundle
from headrace.checkpoint import open_checkpoint

TEXT = (
    "A headrace is the channel that carries a river to the machine. 百川东到海，何时复西归？ In 2026, 7 of 10 measured."
)
OPTIONS = {"method": "nearest", "kv": "float32", "context": 512, "windows": 1, "window_length": 64}


def main() -> None:
    """Rewrite, export both, print the differences."""
    source = Path(sys.argv[1])
    work = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp(prefix="baichuan-rewrite-"))
    original = headrace.export(source, work / "original", **OPTIONS)
    folder = rewrite_as_baichuan(open_checkpoint(source), work / "checkpoint", shards=3)
    for file in original.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    rewritten = headrace.export(folder, work / "rewritten", **OPTIONS)
    print("rewritten geometry:", open_bundle(rewritten).config)
    for name, level in (("float32 arithmetic", 1), ("as shipped (int8 activations)", 4)):
        logits = [_logits(path, work / f"{path.name}-{level}", level) for path in (original, rewritten)]
        worst, spread = np.abs(logits[0] - logits[1]).max(), logits[0].std()
        same = (logits[0].argmax(1) == logits[1].argmax(1)).mean()
        print(f"{name}: max |Δ| {worst:.2e} (logits' standard deviation {spread:.2f}), same top-1 {same:.3f}")


def _logits(path: Path, graphs: Path, level: int) -> np.ndarray:
    from headrace.runtime.engine import Engine
    from headrace.targets.host.runner import HostRunner
    from headrace.text.tokenizer_folder import load_tokenizer

    engine = Engine(HostRunner(re_emitted(path, graphs, accuracy_level=level)))
    return engine.score(load_tokenizer(path).encode(TEXT))


if __name__ == "__main__":
    main()
