"""How fast the engine runs a model's shape with random weights: decoding, batches, prompts, long pasts.

    python kernels/benchmarks/bench.py [smollm2 | baichuan2] [--layers 8] [--isa avx2] [--block 32 [--factors]]

Prints one line a figure: time, tokens a second, bytes read a second or operations a second, and where the time went.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

import headrace_kernels as hk

SHAPES = {
    "smollm2": {
        "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 576, "feed": 1536, "vocab": 49152,
        "tied": True,
    },
    "baichuan2": {
        "layers": 8, "heads": 32, "kv_heads": 32, "head_dim": 128, "hidden": 4096, "feed": 11008, "vocab": 125696,
        "tied": False,
    },
}  # fmt: skip


def model(
    shape: dict[str, Any], path: Path, block: int | None, bits: int, factors: bool
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A program over a file of random codes, arrays, and the bytes of weights that a token reads."""
    rng = np.random.default_rng(0)
    c = shape
    q, kv, h, f = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"], c["hidden"], c["feed"]
    tensors: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    noise = rng.integers(0, 256, 1 << 22, np.uint8).tobytes()
    read, group = 0, 32 if block and block <= 32 else 64

    def weight(name: str, n: int, k: int, bits: int, block: int | None) -> str:
        nonlocal read
        size = n * k * bits // 8
        tensors[f"{name}_packed"] = {"file": 0, "offset": out.tell(), "dtype": "U8", "shape": [n, k * bits // 8]}
        for at in range(0, size, len(noise)):
            out.write(noise[: size - at])
        out.write(b"\0" * (-out.tell() % 64))
        weights[name] = {"bits": bits, "packed": f"{name}_packed", "scale": f"{name}_scale"}
        scale, count = 0.5 / 8 / np.sqrt(k), k // block if block else 1  # of a row
        if block and factors:
            scale, count = scale / 8, 1
            arrays[f"{name}_factors"] = rng.integers(0, 256, (n, (k // block + 1) // 2), np.uint8)
            weights[name] |= {"factors": f"{name}_factors", "block": block}
            read += arrays[f"{name}_factors"].nbytes
        arrays[f"{name}_scale"] = np.full((n, count), scale, np.float16)
        read += size + arrays[f"{name}_scale"].nbytes
        return name

    def norm(name: str) -> str:
        arrays[name] = np.ones(h, np.float32)
        return name

    angles = np.arange(4096)[:, None] * 1e4 ** (-np.arange(c["head_dim"] // 2) / (c["head_dim"] // 2))
    arrays["cos"], arrays["sin"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    x, normed, rq, rk, rv, mixed, update, x2, gate, up, gated, kept = range(12)
    with path.open("wb") as out:
        embed = weight("embed", c["vocab"], h, 8, None)
        read = read if c["tied"] else 0
        steps: list[dict[str, Any]] = [{"op": "embed", "weight": embed, "out": x}]
        for i in range(c["layers"]):
            first = {"op": "add_norm", "in": x2, "update": update, "weight": norm(f"n{i}"), "sum": x, "out": normed}
            if i == 0:
                first = {"op": "rms_norm", "in": x, "weight": norm("n0"), "out": normed}
            names = [weight(f"{i}.{n}", w, h, bits, block) for n, w in (("q", q), ("k", kv), ("v", kv))]
            steps += [
                first,
                {"op": "linear", "group": group, "in": normed, "weights": names, "out": [rq, rk, rv]},
                {"op": "rope_cache", "layer": i, "q": rq, "k": rk, "v": rv, "cos": "cos", "sin": "sin"},
                {"op": "attention", "layer": i, "q": rq, "out": mixed},
                {
                    "op": "linear", "group": group, "in": mixed, "out": [update],
                    "weights": [weight(f"{i}.o", h, q, bits, block)],
                },
                {"op": "add_norm", "in": x, "update": update, "weight": norm(f"m{i}"), "sum": x2, "out": normed},
                {
                    "op": "linear", "group": group, "in": normed, "out": [gate, up],
                    "weights": [weight(f"{i}.gate", f, h, bits, block), weight(f"{i}.up", f, h, bits, block)],
                },
                {"op": "silu_mul", "gate": gate, "up": up, "out": gated},
                {
                    "op": "linear", "group": group, "in": gated, "out": [update],
                    "weights": [weight(f"{i}.down", h, f, bits, block)],
                },
            ]  # fmt: skip
        head = embed if c["tied"] else weight("head", c["vocab"], h, 8, None)
        steps += [
            {"op": "add_norm", "in": x2, "update": update, "weight": norm("final"), "sum": x, "out": normed},
            {"op": "rows", "in": normed, "out": kept},
            {"op": "head", "group": 0, "in": kept, "weight": head},
        ]
    geometry = {key: c[key] for key in ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocab")}
    program = {
        "format": 4,
        "geometry": {**geometry, "eps": 1e-5, "context": 4096},
        "cache": {"dtype": "int8", "scales": [[0.02, 0.02]] * c["layers"]},
        "files": [str(path)],
        "tensors": tensors,
        "weights": weights,
        "registers": [h, h, q, kv, kv, q, h, h, f, f, f, h],
        "instructions": steps,
    }
    return program, arrays, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("shape", choices=SHAPES, nargs="?", default="smollm2")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--block", type=int)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--factors", action="store_true", help="blocks' scales are whole factors of the row's (LPBQ)")
    parser.add_argument("--only", help="figures whose name contains this")
    options = parser.parse_args()
    if options.factors and (options.block is None or options.bits != 4):
        parser.error("--factors is of blocks of 4 bits; expected --block 16 to 256, and --bits 4")
    shape = dict(SHAPES[options.shape])
    shape["layers"] = options.layers or shape["layers"]
    with TemporaryDirectory() as folder:
        program, arrays, read = model(shape, Path(folder) / "weights", options.block, options.bits, options.factors)
        with hk.Engine(program, arrays, slots=8, threads=options.threads, isa=options.isa) as engine:
            form = f"blocks of {options.block}" + ", factors" * options.factors if options.block else "a scale a row"
            print(
                f"{options.shape}, {shape['layers']} layers, {form}, {read / 1e6:.1f} MB a token, {engine.isa}",
                end=", ",
            )
            print(f"{engine.threads} threads")
            figures(engine, shape, read, options.only or "")


def figures(engine: hk.Engine, shape: dict[str, Any], read: int, only: str) -> None:
    rng = np.random.default_rng(1)
    h, f, d = shape["hidden"], shape["feed"], shape["head_dim"]
    layer = h * (shape["heads"] + 2 * shape["kv_heads"]) * d + shape["heads"] * d * h + 3 * h * f

    def measure(name: str, spans: Any, tokens: int, repeat: int, note: Any) -> None:
        if only not in name:
            return
        engine.run(spans)
        times = []
        before = engine.stats["seconds"]
        for _ in range(repeat):
            start = time.perf_counter()
            engine.run(spans)
            times.append(time.perf_counter() - start)
        after = engine.stats["seconds"]
        parts = " ".join(
            f"{k} {(after[k] - before[k]) / repeat * 1e3:.2f}" for k in after if after[k] - before[k] > 1e-5
        )
        best, middle = min(times), float(np.median(times))
        print(
            f"{name:16} median {middle * 1e3:8.2f} ms, best {best * 1e3:8.2f}: {tokens / middle:8.1f} tok/s  "
            f"{note(middle)}  [{parts}] {engine.stats['meetings']} meetings"
        )

    def grow(slots: int, to: int) -> None:
        for slot in range(slots):
            while engine.length(slot) < to:
                at = engine.length(slot)
                engine.run([(slot, at, rng.integers(0, 1000, min(128, to - at)), [])])

    def bandwidth(seconds: float) -> str:
        return f"{read / seconds / 1e9:5.1f} GB/s"

    grow(8, 128)
    measure("decode_128", [(0, 128, [1], [0])], 1, 40, bandwidth)
    measure("batch_4", [(s, 128, [1], [0]) for s in range(4)], 4, 20, bandwidth)
    measure("batch_8", [(s, 128, [1], [0]) for s in range(8)], 8, 20, bandwidth)
    prompt = rng.integers(0, 1000, 128)
    measure(
        "prompt_128", [(0, 0, prompt, [127])], 128, 5,
        lambda s: f"{2 * 128 * layer * shape['layers'] / s / 1e12:5.3f} TOPS",
    )  # fmt: skip
    if only in "decode_3968 prompt_3840":
        grow(1, 3968)
        cache = 2 * shape["layers"] * shape["kv_heads"] * d * 3968
        measure(
            "decode_3968",
            [(0, 3968, [1], [0])],
            1,
            20,
            lambda s: f"{(read + cache) / s / 1e9:5.1f} GB/s with the cache",
        )
        measure(
            "prompt_at_3840", [(0, 3840, prompt, [])], 128, 3, lambda s: f"{s / shape['layers'] * 1e3:.1f} ms a layer"
        )


if __name__ == "__main__":
    main()
