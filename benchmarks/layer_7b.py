"""Time and peak memory of quantizing one layer of Baichuan2-7B's shape (random weights and hidden states' source).

usage: layer_7b.py [METHOD] [WINDOWS] [LENGTH]        default: descent 64 512 (32,768 calibration tokens)

What `headrace plan` extrapolates to all layers is checked against this.
"""

from __future__ import annotations

import resource
import sys
import time
import zlib
from dataclasses import replace

import numpy as np

from headrace.bundle.recipe import load_recipe
from headrace.checkpoint.tensor import LazyTensor
from headrace.config import ModelConfig
from headrace.exporter.estimate import estimate_export
from headrace.model.weights import linears, quantized_weights, weight_table
from headrace.quantize.pipeline import quantize_layers

SHAPE = ModelConfig(
    architecture="baichuan", vocab_size=125696, hidden_size=4096, intermediate_size=11008, num_layers=32,
    num_heads=32, num_kv_heads=32, head_dim=128, rms_norm_eps=1e-6, rope_theta=10000.0, max_context=4096,
    tied_head=False,
)  # fmt: skip


class RandomLayer:
    """A checkpoint of one layer whose weights are drawn when they are read; its vocabulary is small."""

    def __init__(self) -> None:
        self.config = replace(SHAPE, num_layers=1, vocab_size=4096)

    def tensor(self, name: str) -> LazyTensor:
        if name.endswith("norm.weight"):
            return LazyTensor((SHAPE.hidden_size,), "float32", lambda a, b: np.ones(b - a, np.float32))
        rows, columns = weight_table(self.config)[name].matrix

        def read(start: int, stop: int) -> np.ndarray:
            seed = zlib.crc32(f"{name} {start}".encode())
            return np.random.default_rng(seed).standard_normal((stop - start, columns), np.float32) * np.float32(0.02)

        return LazyTensor((rows, columns), "float32", read)


def main() -> None:
    method = sys.argv[1] if len(sys.argv) > 1 else "descent"
    count, length = (int(a) for a in (sys.argv[2:4] if len(sys.argv) > 3 else ("64", "512")))
    source = RandomLayer()
    recipe = load_recipe("w4a16").with_linears(linears(source.config), method=method)
    rules = recipe.resolve(quantized_weights(source.config))
    windows = np.random.default_rng(0).integers(0, source.config.vocab_size, (count, length))
    started, worked = time.perf_counter(), time.process_time()
    quantize_layers(source, {n: rules[n] for n in linears(source.config)}, windows, lambda layer: None)
    seconds = time.perf_counter() - started
    worked = time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    estimate = estimate_export(SHAPE, recipe.resolve(quantized_weights(SHAPE)), tokens=count * length)
    print(f"one layer, {method}, {count * length} tokens: {seconds:.0f} s, peak {peak / 1e9:.2f} GB")
    print(f"on a busy computer: {worked:.0f} s of work, at best half of it on two cores")
    print(f"{SHAPE.num_layers} layers of that: {seconds * SHAPE.num_layers / 3600:.2f} h")
    print(f"planned: {estimate.seconds / 3600:.2f} h, {estimate.peak_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
