"""Whole decoders against the oracle, and against themselves: batches, chunks, threads, fusing, copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import headrace_kernels as hk
from oracle import Decoder
from programs import decoder

# Errors of logits, root mean square over the logits' spread. Random weights are the hardest case: nothing averages out.
SAME = 1e-6  # of a row all whose codes are the oracle's
OTHER = 3e-2  # of all rows: where one code is rounded to the other side, all that comes after it differs
COARSE = 4e-2  # other codes: groups of 64 columns


def engine_of(model: Decoder, **options: Any) -> hk.Engine:
    return hk.Engine(model.program, model.arrays, **options)


def spread_error(logits: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.square(logits - expected).mean()) / expected.std())


def check_short_sequences(engine: hk.Engine, model: Decoder, cache: str) -> None:
    """Of 33 sequences some have all of the oracle's codes, and so its logits, at the first token, at the second and at
    the third; with an int8 cache none may."""
    errors = []
    for first in range(0, 130, 4):
        ids = [first, first + 1, 7]
        logits = np.concatenate([engine.run([(0, t, ids[t : t + 1], [0])]) for t in range(3)])
        expected = model.logits(ids)
        errors.append([spread_error(logits[t : t + 1], expected[t : t + 1]) for t in range(3)])
    assert np.max(errors) < OTHER
    assert cache == "int8" or np.min(errors, axis=0).max() < SAME


HEADS = [(6, 2), (4, 4), (5, 1)]


@pytest.mark.parametrize("heads,kv_heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 100, 128, 6])
@pytest.mark.parametrize("cache", ["int8", "float32"])
def test_decoder_against_oracle(isa: str, heads: int, kv_heads: int, head_dim: int, cache: str) -> None:
    model = decoder(heads, heads=heads, kv_heads=kv_heads, head_dim=head_dim, cache=cache)
    ids = np.random.default_rng(1).integers(0, 131, 90).tolist()
    expected = model.logits(ids)
    with engine_of(model, threads=2, isa=isa) as engine:
        logits = np.concatenate([engine.run([(0, t, ids[t : t + 1], [0])]) for t in range(90)])
        assert spread_error(logits, expected) < OTHER
        check_short_sequences(engine, model, cache)
        logits = np.concatenate([engine.run([(0, 0, ids[:70], range(70))]), engine.run([(0, 70, ids[70:], range(20))])])
        assert spread_error(logits, expected) < COARSE


@pytest.mark.parametrize(
    "options",
    [
        {"block": 32},
        {"block": 32, "factors": True},
        {"block": 16, "bits": 8},
        {"bias": True},
        {"bits": 8},
        {"bits": 5, "block": 32},
        {"bits": 5, "block": 32, "factors": True},
        {"bits": 6, "block": 16, "factors": True, "bias": True},
    ],
    ids=str,
)
def test_weights_of_other_kinds(isa: str, options: dict[str, Any]) -> None:
    model = decoder(3, cache="float32", **options)
    ids = np.random.default_rng(1).integers(0, 131, 40).tolist()
    expected = model.logits(ids)
    with engine_of(model, threads=2, isa=isa) as engine:
        logits = np.concatenate([engine.run([(0, t, ids[t : t + 4], range(4))]) for t in range(0, 40, 4)])
        assert spread_error(logits, expected) < OTHER
        check_short_sequences(engine, model, "float32")
        assert spread_error(engine.run([(0, 0, ids, range(40))]), expected) < COARSE


def test_long_past_is_merged_from_parts(isa: str) -> None:
    model = decoder(4, layers=1, heads=2, kv_heads=1, context=1200)
    ids = np.random.default_rng(1).integers(0, 131, 1050).tolist()
    expected = model.logits(ids)
    with engine_of(model, threads=2, isa=isa) as engine:
        engine.run([(0, 0, ids[:1020], [])])
        logits = np.concatenate([engine.run([(0, t, ids[t : t + 5], range(5))]) for t in range(1020, 1050, 5)])
        assert spread_error(logits, expected[1020:]) < COARSE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": 32},
        {"bits": 8},
        {"bias": True},
        {"block": 32, "bias": True},
        {"block": 32, "factors": True},
        {"bits": 5, "block": 16, "factors": True},
        {"bits": 6, "block": 32},
    ],
    ids=str,
)
def test_same_bits_in_any_company(isa: str, options: dict[str, Any]) -> None:
    """A sequence alone, in a batch of 8, on other numbers of threads, fused or not: the same numbers bit for bit."""
    model = decoder(5, **options)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 131, n).tolist() for n in (1, 3, 8, 9, 40, 70, 2, 33)]

    def all_spans(start: int) -> list[Any]:
        if start == 0:
            return [(slot, 0, p, range(len(p))) for slot, p in enumerate(prompts)]
        return [(slot, len(p), [p[0]], [0]) for slot, p in enumerate(prompts)]

    with engine_of(model, slots=8, threads=2, isa=isa) as together:
        logits = [together.run(all_spans(0)), together.run(all_spans(1))]
    for other in ({"threads": 1}, {"threads": 3}, {"threads": 2, "fuse": False}):
        with engine_of(model, slots=8, isa=isa, **other) as alone:
            for step in range(2):
                one_by_one = np.concatenate([alone.run([span]) for span in all_spans(step)])
                np.testing.assert_array_equal(one_by_one, logits[step])


def test_copy_read_and_write_move_a_sequence(isa: str) -> None:
    for cache in ("int8", "float32"):
        model = decoder(6, cache=cache)
        ids = np.random.default_rng(3).integers(0, 131, 61).tolist()
        with engine_of(model, slots=3, threads=2, isa=isa) as engine:
            engine.run([(0, 0, ids[:50], [])])
            expected = engine.run([(0, 50, ids[50:], range(11))])
            engine.copy(0, 1, 50)
            assert engine.length(1) == 50
            np.testing.assert_array_equal(engine.run([(1, 50, ids[50:], range(11))]), expected)
            engine.write(2, 0, 20, engine.read(0, 0, 20))
            engine.write(2, 20, 50, engine.read(1, 20, 50))
            np.testing.assert_array_equal(engine.run([(2, 50, ids[50:], range(11))]), expected)
            size = 1 if cache == "int8" else 4
            assert len(engine.read(0, 0, 50)) == 2 * 2 * 2 * 50 * 64 * size


def test_read_is_in_the_documented_order(isa: str) -> None:
    model = decoder(7, cache="int8", layers=1)
    with engine_of(model, threads=1, isa=isa) as engine:
        data = np.arange(2 * 2 * 37 * 64, dtype=np.int64).astype(np.int8)
        engine.write(0, 0, 37, data.tobytes())
        assert engine.read(0, 0, 37) == data.tobytes()
        part = np.frombuffer(engine.read(0, 5, 9), np.int8).reshape(1, 2, 2, 4, 64)
        np.testing.assert_array_equal(part, data.reshape(1, 2, 2, 37, 64)[:, :, :, 5:9])


def test_rewinding_gives_what_was(isa: str) -> None:
    model = decoder(8)
    with engine_of(model, threads=2, isa=isa) as engine:
        first = engine.run([(0, 0, [1, 2, 3, 4, 5], range(5))])
        engine.run([(0, 2, [9, 9, 9], [])])
        np.testing.assert_array_equal(engine.run([(0, 0, [1, 2, 3, 4, 5], range(5))]), first)
