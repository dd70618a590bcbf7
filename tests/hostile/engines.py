"""Hostile programs and spans for headrace-kernels, through its Python interface."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.chance import NUMBERS, Good, Rng, any_json, changed_json
from tests.hostile.format import Format

GEOMETRY = {
    "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "hidden": 32, "vocab": 16, "eps": 1e-5, "context": 12,
}  # fmt: skip


@cache
def small_program() -> tuple[dict[str, Any], dict[str, Any]]:
    """One layer over random weights, with scales a row and whole factors, and the arrays that it names."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"cos": np.ones((12, 2), np.float32), "sin": np.zeros((12, 2), np.float32)}
    arrays |= {name: np.ones(32, np.float32) for name in ("n0", "n1")}
    weights = {}
    for name, n, k, bits, block in (
        ("embed", 16, 32, 8, None), ("q", 8, 32, 4, 16), ("k", 4, 32, 4, 32), ("v", 4, 32, 8, None),
        ("o", 32, 8, 4, None), ("gate", 16, 32, 4, 16), ("up", 16, 32, 4, None), ("down", 32, 16, 4, 16),
    ):  # fmt: skip
        arrays[f"{name}.p"] = rng.integers(0, 256, (n, k * bits // 8)).astype(np.uint8)
        arrays[f"{name}.s"] = np.full((n, 1), 0.01, np.float16)
        weights[name] = {"bits": bits, "packed": f"{name}.p", "scale": f"{name}.s"}
        if block:
            arrays[f"{name}.f"] = rng.integers(0, 256, (n, (k // block + 1) // 2)).astype(np.uint8)
            weights[name] |= {"factors": f"{name}.f", "block": block}
    instructions = [
        {"op": "embed", "weight": "embed", "out": 0},
        {"op": "rms_norm", "in": 0, "weight": "n0", "out": 1},
        {"op": "linear", "group": 32, "in": 1, "weights": ["q", "k", "v"], "out": [2, 3, 4]},
        {"op": "rope_cache", "layer": 0, "q": 2, "k": 3, "v": 4, "cos": "cos", "sin": "sin"},
        {"op": "attention", "layer": 0, "q": 2, "out": 5},
        {"op": "linear", "group": 32, "in": 5, "weights": ["o"], "out": [6]},
        {"op": "add_norm", "in": 0, "update": 6, "weight": "n1", "sum": 7, "out": 1},
        {"op": "linear", "group": 32, "in": 1, "weights": ["gate", "up"], "out": [8, 9]},
        {"op": "silu_mul", "gate": 8, "up": 9, "out": 10},
        {"op": "linear", "group": 32, "in": 10, "weights": ["down"], "out": [6]},
        {"op": "add", "in": 7, "update": 6, "out": 0},
        {"op": "rms_norm", "in": 0, "weight": "n1", "out": 1},
        {"op": "rows", "in": 1, "out": 11},
        {"op": "head", "group": 0, "in": 11, "weight": "embed"},
    ]
    program = {
        "format": 4, "geometry": GEOMETRY, "cache": {"dtype": "int8", "scales": [[0.03, 0.02]]}, "files": [],
        "tensors": {},
        "weights": weights, "registers": [32, 32, 8, 4, 4, 8, 32, 32, 16, 16, 16, 32], "instructions": instructions,
    }  # fmt: skip
    return program, arrays


def prepare(folder: Path) -> Good:
    """Nothing but the folder."""
    folder.mkdir(parents=True)
    return {}


def program(rng: Rng, good: Good) -> bytes:
    """A program and the calls to it, as JSON."""
    base = copy.deepcopy(small_program()[0])
    if rng.randrange(4):
        part = rng.choice(
            ("geometry", "cache", "weights", "weights", "registers", "instructions", "instructions", "instructions")
        )
        base[part] = changed_json(rng, base[part], ("layer", "bias", "factors", "block"))
        if part == "instructions" and base[part] and rng.randrange(2):  # numbers that nearly fit
            instruction = rng.choice(base[part])
            if isinstance(instruction, dict):
                key = rng.choice(list(instruction) or ["op"])
                others = [i[key] for i in base[part] if isinstance(i, dict) and key in i]
                instruction[key] = rng.choice((rng.randrange(13), *others))
    elif rng.randrange(2):
        base = changed_json(rng, base, ("more",))
    runs = [[_span(rng) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(1, 3))]
    options = {
        "slots": rng.choice((1, 2)),
        "context": rng.choice((None, None, 4, 12, 13, 0)),
        "fuse": bool(rng.randrange(2)),
    }
    return json.dumps([base, options, runs]).encode()


def _span(rng: Rng) -> Any:
    if rng.randrange(12) == 0:
        return [any_json(rng) for _ in range(4)]
    count = rng.choice((1, 1, 2, 5, 12, 0))
    ids = [rng.choice((0, 1, 15, 15, 16, -1)) if rng.randrange(9) == 0 else rng.randrange(16) for _ in range(count)]
    wanted = [rng.choice((0, max(count - 1, 0), count, -1)) for _ in range(rng.randrange(3))]
    return [rng.choice((0, 0, 1, 2, -1)), rng.choice((0, 0, 0, 1, 5, 11, 12, *NUMBERS[:9])), ids, wanted]


def _open(path: Path) -> None:
    import headrace_kernels as hk

    described, options, runs = json.loads(path.read_bytes())
    engine = hk.Engine(described, small_program()[1], threads=1, **options)
    try:
        for spans in runs:
            try:
                assert engine.run([tuple(span) for span in spans]).shape[1] == engine.vocab
            except hk.SpanError as error:  # the engine goes on
                assert str(error).isprintable()
            count = engine.length(0)
            engine.write(0, 0, count, engine.read(0, 0, count))
    finally:
        engine.close()


def _refusals() -> tuple[type[BaseException], ...]:
    from importlib.util import find_spec

    if find_spec("headrace_kernels") is None:
        return ()
    import headrace_kernels as hk

    return (hk.ProgramError, hk.SpanError)


FORMATS = {"program": Format(prepare, program, "program.json", _open, harmless=_refusals())}
