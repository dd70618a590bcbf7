"""Time, peak memory and bytes of compiling one part of Baichuan2-7B's shape for a Snapdragon (random weights).

    python benchmarks/snapdragon_7b.py PART LAYERS CONTEXT        PART: 1 (embedding), 2 (layers) or 5 (layers and head)

    1 0 4096    the embedding                      5 8 4096    the real last part: eight layers, norm, int8 head
    2 8 4096    a part of eight layers             2 1 512     a look whether it works

Steps of 128 and 1 token over weights that are stored once; the binary is then held against the plan. One process at a
time compiles: what is told as its peak is the compiler's. Needs headrace[qnn].
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.graph.emit_device import write_device_graphs
from headrace.model.decoder import EMBEDDING, HEAD
from headrace.plan import Part
from headrace.quantize.encodings import Encoding, port_encodings
from headrace.quantize.grid import Grid, QuantizedTensor
from headrace.quantize.storage import linear_shape, quantized_names
from headrace.targets.qnn import GraphFile, compile_shared
from headrace.targets.qnn_check import check_binary
from headrace.targets.soc import find_soc

LENGTHS = (128, 1)


def shape(layers: int) -> ModelConfig:
    """Baichuan2-7B with as many layers as the part has."""
    return ModelConfig(
        architecture="baichuan", vocab_size=125696, hidden_size=4096, intermediate_size=11008,
        num_layers=max(layers, 1), num_heads=32, num_kv_heads=32, head_dim=128, rms_norm_eps=1e-6, rope_theta=10000.0,
        max_context=4096, tied_head=False,
    )  # fmt: skip


class RandomWeights:
    """Codes of every linear, drawn when they are read: int4, and int8 for embedding and head."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.names = set(quantized_names(config))
        self.draws = np.random.default_rng(0)

    def __call__(self, name: str) -> QuantizedTensor | NDArray[np.float32]:
        if name not in self.names:
            return np.ones(self.config.hidden_size, np.float32)
        bits = 8 if name in (EMBEDDING, HEAD) else 4
        top = (1 << (bits - 1)) - 1
        rows, columns = linear_shape(self.config, name)
        codes = self.draws.integers(-top, top + 1, (rows, columns), np.int8)
        return QuantizedTensor(codes, np.full((rows, 1), 0.05 / top, np.float16), Grid(bits, None))


class Encodings(dict[str, Encoding]):
    """The grid of any result, by its name: what it holds does not matter to the compiler, its kind does."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Encoding:
        if name.endswith(("k_cache", "v_cache")):
            return Encoding(0.05, 128, 8)
        if name.endswith((".weights", ".sigmoid")):
            return Encoding.of_range(0, 1)
        return Encoding.of_range(-8.0 - (50 if name.endswith("masked_scores") else 0), 8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", type=int, choices=(1, 2, 5))
    parser.add_argument("layers", type=int)
    parser.add_argument("context", type=int)
    parser.add_argument("--target", default="snapdragon-8-elite")
    options = parser.parse_args()
    layers = 0 if options.part == 1 else options.layers
    config, soc = shape(layers), find_soc(options.target)
    part = Part(options.part, 5, 0, layers, embeds=options.part == 1, heads=options.part == 5)
    encodings = Encodings()
    grids = port_encodings([part], encodings)
    if not part.embeds:
        grids[f"hidden_{part.number - 1}"] = encodings["embed_tokens"]
    with tempfile.TemporaryDirectory(prefix="headrace-7b-") as name:
        folder = Path(name)
        started = time.monotonic()
        graphs = write_device_graphs(
            config, [part], RandomWeights(config), encodings, folder, lengths=LENGTHS, contexts=(options.context,)
        )
        written = time.monotonic() - started
        binary = folder / "part.bin"
        files = [GraphFile(graph.name, graph.path) for graph in graphs]
        made = compile_shared(files, soc, binary)
        steps = [(length, options.context) for length in LENGTHS]
        check_binary(binary, made.info, soc, config, part, steps, grids)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"part {part.number}, {layers} layers, S=128+1, context {options.context}, {soc.name}")
        print(f"graphs written   {written:8.1f} s, peak {own / 1e9:.2f} GB (headrace itself)")
        print(f"compiled         {made.seconds:8.1f} s, peak {made.peak_bytes / 1e9:.2f} GB (the compiler)")
        print(f"binary           {binary.stat().st_size:,} bytes, as planned")


if __name__ == "__main__":
    main()
