"""Linears against the oracle: every variant, both kinds of activations, all widths, blocks and odd sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import headrace_kernels as hk
from oracle import Weight, coarse, fine, linear, random_factors, random_weight, whole
from programs import linear_program

ROUNDING = 2e-6  # of float32 sums, relative to the sum of magnitudes; a wrong code is worth far more in `sharp` rows
# Tokens, and whether each is a sequence of its own. Of steps of three tokens these prompts leave none, two and one.
TOKENS = ((1, False), (2, False), (3, True), (8, False), (9, True), (9, False), (11, False), (13, False))
SHAPES = [(1, 16), (5, 48), (16, 64), (33, 128), (70, 176), (64, 256), (130, 576), (17, 2064), (3, 11008)]


def sharp_table(rng: np.random.Generator, rows: int, k: int) -> Weight:
    """Embedding rows of one large value among small ones, so that a single wrong code shows in a float32 sum."""
    codes = rng.integers(-3, 4, (rows, k)).astype(np.int8)
    codes[np.arange(rows), rng.integers(0, k, rows)] = 127
    return Weight(codes, np.full((rows, 1), 2.0**-7, np.float16), 8)


def check(
    engine: hk.Engine, table: Weight, w: Weight, group: int, m: int, batched: bool, rng: np.random.Generator
) -> None:
    ids = rng.integers(0, min(len(table.codes), w.codes.shape[0]), m)
    x = table.values()[ids].astype(np.float32)
    if batched:  # one token of each of m sequences
        logits = engine.run([(slot, 0, [int(i)], [0]) for slot, i in enumerate(ids)])
    else:
        logits = engine.run([(0, 0, ids, range(m))])
    quantize: Any = partial(coarse, group=group)
    if group == 0 or batched or m <= 8:
        quantize = partial(fine, w=w)
    elif engine.isa.startswith("amx") and (w.factors is not None or not w.has_blocks):
        quantize = whole
    expected, size = linear(x, w, quantize)
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max(initial=0) <= (ROUNDING * size).max()
    np.testing.assert_array_less(np.abs(logits - expected), ROUNDING * size + 1e-12)


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize(
    "bits,block,group",
    [
        *((bits, None, group) for bits in (4, 8) for group in (32, 64)),
        *((4, block, 32) for block in (16, 32, 64, 128)),
        *((4, block, 64) for block in (64, 128, 256)),
        *((bits, block, 32) for bits in (5, 6, 8) for block in (16, 32, 128)),
        (5, 64, 64),
        (6, 256, 64),
        (8, 128, 64),
    ],
)
def test_shapes(isa: str, n: int, k: int, bits: int, block: int | None, group: int) -> None:
    if block and k % block:
        k = -(-k // block) * block
    rng = np.random.default_rng(n * k + bits)
    table, w = sharp_table(rng, n, k), random_weight(rng, n, k, bits, block, bias=n % 2 == 0)
    with hk.Engine(*linear_program(table, w, group), slots=9, threads=2, isa=isa) as engine:
        for m, batched in TOKENS:
            check(engine, table, w, group, m, batched, rng)


@pytest.mark.parametrize("n,k", [*SHAPES[:-1], (19, 576), (35, 1152), (50, 288), (37, 4352)])
@pytest.mark.parametrize(
    "bits,block,group",
    [
        *((4, block, 32) for block in (16, 32, 64, 128, 256)),
        *((4, block, 64) for block in (64, 128, 256)),
        *((bits, block, 32) for bits in (5, 6) for block in (16, 32, 128)),
        *((bits, 64, 64) for bits in (5, 6)),
    ],
)
def test_blocks_of_whole_factors(isa: str, n: int, k: int, bits: int, block: int, group: int) -> None:
    k = -(-k // block) * block
    rng = np.random.default_rng(n * k + block)
    table, w = sharp_table(rng, n, k), random_factors(rng, n, k, block, bias=n % 2 == 0, bits=bits)
    with hk.Engine(*linear_program(table, w, group), slots=9, threads=2, isa=isa) as engine:
        for m, batched in TOKENS:
            check(engine, table, w, group, m, batched, rng)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_whole_factors_are_the_scales_they_multiply_to(isa: str, block: int) -> None:
    rng = np.random.default_rng(block)
    n, k = 37, 9 * block
    table, w = sharp_table(rng, n, k), random_factors(rng, n, k, block)
    assert w.factors is not None
    w.scale[:] = np.ldexp(rng.integers(64, 128, (n, 1)).astype(np.float16), -14)  # times a factor exact in float16
    same = Weight(w.codes, w.scale * w.factors.astype(np.float16), 4)
    np.testing.assert_array_equal(w.values(), same.values())
    with (
        hk.Engine(*linear_program(table, w, 32), threads=1, isa=isa) as one,
        hk.Engine(*linear_program(table, same, 32), threads=1, isa=isa) as other,
    ):
        # Tiles, which take factors and no other blocks, have finer activations for prompts.
        for m in (1, 4) if isa.startswith("amx") else (1, 4, 13):
            spans = [(0, 0, rng.integers(0, n, m), range(m))]
            size = np.abs(table.values()).sum(axis=1).max() * np.abs(w.values()).max()
            np.testing.assert_allclose(one.run(spans), other.run(spans), rtol=0, atol=ROUNDING * size)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_table_of_whole_factors(isa: str, bits: int) -> None:
    rng = np.random.default_rng(0)
    table, w = random_factors(rng, 33, 144, 16, bits=bits), random_weight(rng, 33, 144, bits, 16)
    with hk.Engine(*linear_program(table, w, 32), slots=9, threads=1, isa=isa) as engine:
        for m, batched in ((3, True), (13, False)):
            check(engine, table, w, 32, m, batched, rng)


@pytest.mark.parametrize(
    "bits,block,group",
    [(4, None, 0), (4, None, 32), (4, None, 64), (8, None, 64), (4, 16, 32), (4, 64, 64), (5, 16, 32)],
)
@pytest.mark.parametrize("batched", [False, True])
def test_every_number_of_tokens(isa: str, bits: int, block: int | None, group: int, batched: bool) -> None:
    rng = np.random.default_rng(bits)
    k = 192 if block == 64 else 176
    table, w = sharp_table(rng, 21, k), random_weight(rng, 21, k, bits, block)
    with hk.Engine(*linear_program(table, w, group), slots=130, threads=2, isa=isa) as engine:
        for m in range(1, 131) if bits == 4 and not block else (*range(1, 20), 63, 64, 65, 127, 128, 129, 130):
            check(engine, table, w, group, m, batched, rng)


@pytest.mark.parametrize("k", [1, 3, 17, 63, 65, 127, 257, 577])
@pytest.mark.parametrize("group", [32, 64])
def test_odd_columns_of_8_bits(isa: str, k: int, group: int) -> None:
    rng = np.random.default_rng(k)
    table, w = sharp_table(rng, 19, k), random_weight(rng, 19, k, 8, None)
    with hk.Engine(*linear_program(table, w, group), slots=4, threads=1, isa=isa) as engine:
        for m, batched in ((1, False), (4, True), (10, False)):
            check(engine, table, w, group, m, batched, rng)


@pytest.mark.parametrize("k", [2, 6, 18, 66, 130, 254, 514])
@pytest.mark.parametrize("group", [32, 64])
def test_columns_of_4_bits_that_are_no_multiple_of_16(isa: str, k: int, group: int) -> None:
    rng = np.random.default_rng(k)
    table, w = sharp_table(rng, 19, k), random_weight(rng, 19, k, 4, None)
    with hk.Engine(*linear_program(table, w, group), slots=4, threads=1, isa=isa) as engine:
        for m, batched in ((1, False), (4, True), (10, False)):
            check(engine, table, w, group, m, batched, rng)


@pytest.mark.parametrize(
    "bits,block", [(4, None), (8, None), *((bits, block) for bits in (4, 5, 6) for block in (16, 64))]
)
@pytest.mark.parametrize("group", [32, 64])
def test_extreme_codes_do_not_overflow(isa: str, bits: int, block: int | None, group: int) -> None:
    """Sums in 16 and 32 bits at their largest: the lowest and highest codes, the largest factors, inputs of 127."""
    if block == 16 and group == 64:
        group = 32  # blocks of 16 have no larger ones
    k = 16384
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    codes = np.array([np.full(k, low), np.full(k, high)], np.int8)
    factors = None if block is None else np.full((2, k // block), 1 << 8 - bits, np.uint8)
    w = Weight(codes, np.full((2, 1), 2.0**-12, np.float16), bits, factors=factors)
    table = Weight(np.array([np.full(k, 127), np.full(k, -127)], np.int8), np.full((2, 1), 2.0**-7, np.float16), 8)
    rng = np.random.default_rng(0)
    with hk.Engine(*linear_program(table, w, group), slots=9, threads=1, isa=isa) as engine:
        for m, batched in ((1, False), (9, True), (9, False)):
            check(engine, table, w, group, m, batched, rng)


@pytest.mark.parametrize("group", [32, 64])
def test_zeros_and_not_a_number(isa: str, group: int) -> None:
    table = Weight(np.zeros((3, 64), np.int8), np.ones((3, 1), np.float16), 8)
    table.codes[1:] = 1
    table.scale[2] = np.nan
    rng = np.random.default_rng(0)
    w = random_weight(rng, 3, 64, 4, None)
    with hk.Engine(*linear_program(table, w, group), slots=12, threads=2, isa=isa) as engine:
        for spans in ([(s, 0, [s % 3], [0]) for s in range(12)], [(0, 0, [s % 3 for s in range(12)], range(12))]):
            logits: NDArray[np.float32] = engine.run(spans)
            assert (logits[0::3] == 0).all() and np.isfinite(logits[1::3]).all() and np.isnan(logits[2::3]).all()
