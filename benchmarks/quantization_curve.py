"""KL against bytes: exports a checkpoint at several budgets and scores each bundle through the host runtime.

    python benchmarks/quantization_curve.py CHECKPOINT --text eval_en.txt --calibration calibration_en.txt

One line a point and text, as a Markdown table: bytes of the weights, code bits over the linears, KL and top-1 through
the host runtime with int8 KV, and the same of the eager decoder with the same weights, which has neither int8
activations nor an int8 cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import headrace
from headrace.bundle.folder import open_bundle
from headrace.bundle.weights import WeightStore
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.measure.text_score import evaluate_text, first_windows, follow, read_text
from headrace.model.reference import eager_logits
from headrace.model.weights import quantized_weights
from headrace.quantize.budget import average_bits

WINDOW = 512
CONTEXT = 1024
DEFAULT_POINTS = ("32", "32:size=88300000", "32:size=104900000", "channel", "channel:bits=4.4", "channel:bits=5.4")


def main() -> int:
    """Run all points; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text to score on")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[], help="other text to calibrate on")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--method", default="best")
    parser.add_argument("--rotate", action="store_true", help="as for a device; a tied head becomes one of its own")
    parser.add_argument("--points", nargs="+", default=DEFAULT_POINTS, help="BLOCK, BLOCK:bits=B or BLOCK:size=BYTES")
    options = parser.parse_args()

    source = open_checkpoint(options.checkpoint)
    print("| point | text | bytes | bits | KL host | top-1 host | KL eager | top-1 eager | export |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for point in options.points:
        block, _, budget = point.partition(":")
        kind, _, amount = budget.partition("=")
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "bundle"
            headrace.export(
                options.checkpoint,
                out,
                recipe="w4b32",
                block=block,
                method=options.method,
                rotate=options.rotate,
                bits=float(amount) if kind == "bits" else None,
                size=int(amount) if kind == "size" else None,
                calibration=options.calibration,
                windows=options.windows,
                window_length=WINDOW,
                context=CONTEXT,
            )
            exported = time.monotonic() - started
            for text in options.text:
                report(point, source, out, text, exported)
    return 0


def report(point: str, source: Checkpoint, out: Path, text: Path, exported: float) -> None:
    """Score a bundle on a text and print its line."""
    bundle = open_bundle(out)
    config, recipe = bundle.config, bundle.recipe
    rules = recipe.resolve(quantized_weights(config))
    store = WeightStore.open(out, config, bundle.parts, recipe)
    with headrace.load(out) as model:
        windows = first_windows(model.tokenizer.encode(read_text(text)), text.name, WINDOW)
        reference = follow(source.config, lambda name: source.tensor(name).load(), windows)
        host = evaluate_text(text.name, windows, model.logits, reference).fidelity
    eager = evaluate_text(
        text.name, windows, lambda ids: eager_logits(config, store.read, np.array([ids]))[0], reference
    ).fidelity
    assert host is not None and eager is not None
    print(
        f"| {point} | {text.stem} | {bundle.weight_bytes / 1e6:.1f} MB | {average_bits(config, rules):.2f} "
        f"| {host.kl:.4f} | {host.top1:.3f} | {eager.kl:.4f} | {eager.top1:.3f} | {exported:.0f} s |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
