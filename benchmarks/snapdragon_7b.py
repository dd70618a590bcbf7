"""What compiling Baichuan2-7B costs: parts of its shape with random weights, for a chip.

    python benchmarks/snapdragon_7b.py --parts 2 5 [--block 64]

Each part is emitted at S = 128 and 1 and compiled into one weight-shared binary, which is checked against the plan.
Prints seconds, peak memory of the compiler and bytes of the binary. Needs headrace[qnn], up to 15 GB of memory and
10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.encodings import ATTENTION_MASK, GATED_OUTLIERS, Encoding, mask_encoding, port_encodings
from headrace.bundle.grid import Grid, QuantizedTensor
from headrace.config import ModelConfig
from headrace.graph.emit_device import write_device_graphs
from headrace.model.weights import EMBEDDING, HEAD
from headrace.plan import plan_parts
from headrace.targets.qualcomm.binary_check import check_binary
from headrace.targets.qualcomm.compiler import GraphFile, compile_shared
from headrace.targets.qualcomm.genie import binary_name
from headrace.targets.qualcomm.soc import find_soc

BAICHUAN2_7B = ModelConfig(
    architecture="baichuan",
    vocab_size=125696,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_context=4096,
    tied_head=False,
)


class PlainEncodings(Mapping[str, Encoding]):
    """The same grid for every result, but the cache's."""

    def __getitem__(self, name: str) -> Encoding:
        if name.endswith(GATED_OUTLIERS):
            raise KeyError(name)  # no channel is an outlier
        if name == ATTENTION_MASK:
            return mask_encoding(50)
        if name.endswith(("k_cache", "v_cache")):
            return Encoding(0.0625, 128, 8)
        if name.endswith(("weights", "sigmoid")):
            return Encoding.of_range(0, 1)
        if name.endswith("masked_scores"):
            return Encoding.of_range(-66, 16)
        return Encoding.of_range(-16, 16)

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def random_weight(config: ModelConfig, name: str, block: int | None) -> QuantizedTensor | NDArray[np.float32]:
    """A weight by canonical name: int4, in LPBQ blocks if any, int8 for embedding and head, ones for norms."""
    c = config
    shapes = {
        "q_proj": (c.query_size, c.hidden_size),
        "k_proj": (c.kv_size, c.hidden_size),
        "v_proj": (c.kv_size, c.hidden_size),
        "o_proj": (c.hidden_size, c.query_size),
        "gate_proj": (c.intermediate_size, c.hidden_size),
        "up_proj": (c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
        "embed_tokens": (c.vocab_size, c.hidden_size),
        "lm_head": (c.vocab_size, c.hidden_size),
    }
    shape = shapes.get(name.removesuffix(".weight").rpartition(".")[2])
    if shape is None:
        return np.linspace(0.5, 1.5, c.hidden_size, dtype=np.float32)
    grid = Grid(8) if name in (EMBEDDING, HEAD) else Grid(4, block, lpbq=block is not None)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    codes = rng.integers(grid.bottom, grid.top + 1, shape, dtype=np.int8)
    scale = np.float16(2 ** np.round(-np.log2(grid.top * shape[1] ** 0.5)))
    scales = np.full((shape[0], grid.blocks(shape[1])), scale)
    if grid.lpbq:
        factors = rng.integers(1, grid.largest_factor + 1, scales.shape)
        factors[:, 0] = grid.largest_factor
        scales = scales * (factors / np.float16(grid.largest_factor)).astype(np.float16)
    return QuantizedTensor(codes, scales, grid)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--context", type=int, nargs="+", default=[4096])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1])
    parser.add_argument("--block", type=int, help="columns of an LPBQ block; by default one scale a channel")
    parser.add_argument("--target", default="snapdragon-8-elite")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    soc, plan = find_soc(options.target), plan_parts(BAICHUAN2_7B, 5)
    encodings = PlainEncodings()
    steps = [(length, context) for context in options.context for length in options.lengths]
    results = []
    for number in options.parts:
        part = plan[number - 1]
        with tempfile.TemporaryDirectory() as folder:
            graphs = write_device_graphs(
                BAICHUAN2_7B,
                [part],
                lambda name: random_weight(BAICHUAN2_7B, name, options.block),
                encodings,
                Path(folder),
                lengths=options.lengths,
                contexts=options.context,
            )
            files = [GraphFile(graph.name, graph.path) for graph in graphs]
            made = compile_shared(files, soc, Path(folder) / binary_name(part))
            ports = port_encodings(plan, encodings)
            check_binary(made.path, made.info, soc, BAICHUAN2_7B, part, steps, ports)
        result = {
            "part": part.name,
            "layers": len(part.layers),
            "seconds": round(made.seconds, 1),
            "peak_gb": round(made.peak_bytes / 1e9, 2),
            "bytes": made.info.size,
        }
        results.append(result)
        print(
            f"{part.name}: {result['layers']} layers, {result['seconds']} s, peak {result['peak_gb']} GB, "
            f"{made.info.size:,} bytes, {made.info.graphs[0].shared_bytes:,} shared",
            flush=True,
        )
    if options.json:
        print(json.dumps({"parts": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
