"""What a runner itself costs: KL of its logits from the float decoder over the very same quantized weights.

    python benchmarks/engine_fidelity.py BUNDLE TEXT [WINDOWS] [LENGTH]        default: 4 windows of 512 tokens

Prompts (steps of many tokens) and decoding (token by token) apart, for ONNX Runtime and, where it is installed, the
native engine, on each instruction set; scored over the windows' second halves. Both have the bundle's cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from headrace.bundle.folder import Bundle, open_bundle
from headrace.model.fidelity import FidelityMeter, no_target
from headrace.model.reference import eager_logits
from headrace.runners import open_runner
from headrace.runtime.engine import Engine
from headrace.runtime.runner import Runner
from headrace.text.tokenizer_folder import load_tokenizer


def runners(bundle: Bundle) -> dict[str, Callable[[], Runner]]:
    """Openers by name."""
    found: dict[str, Callable[[], Runner]] = {"host": lambda: open_runner(bundle, "host")}
    if find_spec("headrace_kernels") is not None:
        import headrace_kernels
        from headrace.native.runner import NativeRunner

        for isa in headrace_kernels.available_isas():
            found[f"native {isa}"] = lambda isa=isa: NativeRunner(bundle, isa=isa)
    return found


def main() -> None:
    """Read the arguments, print a line a runner."""
    bundle = open_bundle(Path(sys.argv[1]))
    count, length = (int(a) for a in (sys.argv[3:5] if len(sys.argv) > 4 else ("4", "512")))
    ids = load_tokenizer(bundle.root).encode(Path(sys.argv[2]).read_text(encoding="utf-8"))
    windows = [ids[i * length : (i + 1) * length] for i in range(count)]
    weights = bundle.weights()
    half = length // 2
    references = [eager_logits(bundle.config, weights.read, np.array([window]))[0][half:] for window in windows]
    for name, opened in runners(bundle).items():
        for what, chunk in (("prompt", None), ("decode", 1)):
            engine = Engine(opened())
            meter = FidelityMeter()
            for window, reference in zip(windows, references):
                found = engine.score(window, chunk)[half:]
                meter.add(reference, found, np.full(len(found), no_target, np.int64))
            engine.close()
            result = meter.result()
            print(f"{name:<20} {what}: KL {result.kl:.5f}, top-1 {result.top1:.4f}", flush=True)


if __name__ == "__main__":
    main()
