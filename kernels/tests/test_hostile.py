"""Programs, spans and slots that do not fit are exceptions before anything is computed; an engine survives them."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace_kernels as hk
from programs import decoder

Change = Callable[[dict[str, Any], dict[str, Any]], Any]
MODEL = decoder(0)


def _at(which: str, **fields: Any) -> Change:
    def change(p: dict[str, Any], _: dict[str, Any]) -> None:
        next(i for i in p["instructions"] if i["op"] == which).update(fields)

    return change


def _set(*path: Any, to: Any) -> Change:
    def change(p: dict[str, Any], _: dict[str, Any]) -> None:
        for key in path[:-1]:
            p = p[key]
        p[path[-1]] = to

    return change


BROKEN: list[Change] = [
    *(
        _set("geometry", key, to=bad)
        for key in ("layers", "heads", "head_dim", "vocab", "context")
        for bad in (0, -1, 1 << 40)
    ),
    *(_set("geometry", key, to=bad) for key in ("layers", "eps") for bad in ("2", None, True)),
    _set("geometry", "kv_heads", to=4),
    _set("geometry", "head_dim", to=63),
    _set("geometry", "eps", to=float("nan")),
    _set("geometry", "vocab", to=132),
    _set("geometry", "context", to=321),
    _set("geometry", "layers", to=1),
    _set("format", to=2),
    _set("more", to=1),
    _set("cache", to={"dtype": "int4"}),
    _set("cache", to={"dtype": "int8"}),
    _set("cache", "scales", to=[[0.1, 0.1]]),
    _set("cache", "scales", to=[[0.1, 0.0]] * 2),
    _set("cache", "scales", to=[[0.1, float("nan")]] * 2),
    _set("cache", "scales", to=[[0.1]] * 2),
    _set("files", to=["no such file"]),
    _set("tensors", to={"t": {"file": 0, "offset": 0, "dtype": "U8", "shape": [1]}}),
    _set("tensors", to={"t": {"file": 0, "offset": 0, "dtype": "U8"}}),
    _set("weights", "0.q", "bits", to=8),
    *(_set("weights", "0.q", "bits", to=bits) for bits in (3, 5, 6, 7, 16)),
    _set("weights", "0.q", "packed", to="nothing"),
    _set("weights", "0.q", "scale", to="embed_packed"),
    _set("weights", "0.q", "scale", to="embed_scale"),
    _set("weights", "0.q", "bias", to="n0"),
    _set("weights", "0.q", "block", to=32),
    _set("weights", "0.q", "factors", to="0.q_packed"),
    _set("registers", 2, to=383),
    _set("registers", 2, to=0),
    _set("registers", to=[]),
    _set("instructions", to=[]),
    _at("embed", op="jump"),
    *(_at("linear", group=bad) for bad in (-64, 16, 48, 128, 1 << 40, "64", None, True)),
    _at("head", group=1),
    _at("embed", out=12),
    _at("embed", out=-1),
    _at("embed", out=None),
    _at("embed", out=2),
    _at("embed", weight="0.o"),
    _at("rms_norm", weight="cos"),
    _at("rms_norm", weight="missing"),
    _at("rms_norm", **{"in": 5}),
    _at("add_norm", sum=1),
    _at("linear", weights=["0.q", "0.k"]),
    _at("linear", weights=["0.q", "0.k", "0.gate"]),
    _at("linear", out=[2, 3, 3]),
    _at("linear", out=[2, 3, 1]),
    _at("linear", weights=[], out=[]),
    _at("rope_cache", layer=2),
    _at("rope_cache", layer=-1),
    _at("rope_cache", layer=1),
    _at("rope_cache", cos="n0"),
    _at("rope_cache", q=3),
    _at("rope_cache", k=2),
    _at("attention", out=2),
    _at("attention", layer=1),
    _at("silu_mul", up=2),
    _at("rows", out=1),
    _at("head", **{"in": 1}),
    _at("head", weight="0.q"),
    lambda p, _: p["instructions"].pop(),
    lambda p, _: p["instructions"].append(p["instructions"][-1]),
    lambda p, _: p["instructions"].pop(1),
    lambda p, _: p["instructions"].reverse(),
    lambda _, a: a.update(cos=a["cos"][:100]),
    lambda _, a: a.update(cos=a["cos"].astype(np.float64)),
    lambda _, a: a.update(cos=a["cos"][:, ::2]),
    lambda _, a: a.update({"0.q_packed": a["0.q_packed"][:-1]}),
    lambda _, a: a.update({"0.q_scale": a["0.q_scale"][:-1]}),
    lambda _, a: a.update({"0.q_scale": np.ones((384, 5), np.float16)}),
]


@pytest.mark.parametrize("change", BROKEN, ids=range(len(BROKEN)))
def test_broken_program_is_an_error(change: Change) -> None:
    program, arrays = copy.deepcopy(MODEL.program), dict(MODEL.arrays)
    change(program, arrays)
    with pytest.raises(hk.ProgramError):
        hk.Engine(program, arrays)


FACTORS = decoder(0, block=32, factors=True)


@pytest.mark.parametrize(
    "change,message",
    [
        (_set("weights", "0.q", "factors", to=None), "both or neither"),
        (_set("weights", "0.q", "block", to=None), "both or neither"),
        (_set("weights", "0.q", "block", to=0), "both or neither"),
        *((_set("weights", "0.q", "block", to=bad), "whole number") for bad in ("32", 32.0, True, 1 << 40)),
        *(
            (_set("weights", "0.q", "block", to=bad), f"blocks of {bad}; expected 16")
            for bad in (-32, 1, 8, 24, 96, 512)
        ),
        (_set("weights", "0.q", "block", to=64), "rows of 96 are no whole blocks of 64"),
        (_set("weights", "0.q", "block", to=16), "factors are 384 x 2; expected 384 x 3 for blocks of 16"),
        (_set("weights", "0.q", "factors", to=7), "expected a name"),
        (_set("weights", "0.q", "factors", to=""), "expected a name"),
        (_set("weights", "0.q", "factors", to="nothing"), "there is no tensor nothing"),
        (_set("weights", "0.q", "factors", to="0.q_scale"), "factors are U8"),
        (_set("weights", "0.q", "factors", to="0.k_factors"), "factors are 128 x 2; expected 384 x 2"),
        (_set("weights", "0.q", "bits", to=8), "codes of 8 bits; expected one scale and less than 8 bits"),
        (lambda _, a: a.update({"0.q_scale": np.ones((384, 3), np.float16)}), "factors over 3 scales a row"),
        (lambda _, a: a.update({"0.q_factors": a["0.q_factors"][:-1]}), "factors are 383 x 2"),
        (lambda _, a: a.update({"0.q_factors": np.zeros((384, 3), np.uint8)}), "factors are 384 x 3"),
        (lambda p, _: p["instructions"][2].update(group=64), "blocks of 32; expected 0 or 32"),
    ],
)
def test_broken_factors_are_an_error(change: Change, message: str) -> None:
    program, arrays = copy.deepcopy(FACTORS.program), dict(FACTORS.arrays)
    change(program, arrays)
    with pytest.raises(hk.ProgramError, match=message):
        hk.Engine(program, arrays)


SPLIT = decoder(bits=6, block=32, factors=True)


@pytest.mark.parametrize(
    "change,message",
    [
        (_set("weights", "0.q", "high", to=None), "6 bits without high bits; expected them for 5 and 6 bits"),
        (_set("weights", "0.v", "high", to="0.q_high"), "8 bits with high bits; expected them for 5 and 6 bits"),
        (_set("weights", "0.q", "bits", to=4), "4 bits with high bits"),
        (_set("weights", "0.q", "bits", to=5), "high bits are 384 x 32; expected 384 x 16"),
        (_set("weights", "0.q", "high", to=7), "expected a name"),
        (_set("weights", "0.q", "high", to="nothing"), "there is no tensor nothing"),
        (_set("weights", "0.q", "high", to="0.q_scale"), "high bits are U8"),
        (_set("weights", "0.q", "high", to="0.k_high"), "high bits are 128 x 32; expected 384 x 32"),
        (lambda _, a: a.update({"0.q_high": a["0.q_high"][:-1]}), "high bits are 383 x 32"),
        (lambda p, _: [p["weights"]["0.q"].pop(key) for key in ("factors", "block")], "blocks of 96; expected 16"),
    ],
)
def test_broken_high_bits_are_an_error(change: Change, message: str) -> None:
    program, arrays = copy.deepcopy(SPLIT.program), dict(SPLIT.arrays)
    change(program, arrays)
    with pytest.raises(hk.ProgramError, match=message):
        hk.Engine(program, arrays)


def test_factors_that_leave_a_byte_are_no_memory_fault(isa: str) -> None:
    arrays = dict(SPLIT.arrays)
    arrays["0.q_factors"] = np.full_like(arrays["0.q_factors"], 0xFF)
    with hk.Engine(SPLIT.program, arrays, threads=1, isa=isa) as engine:
        for m in (1, 12):
            assert np.isfinite(engine.run([(0, 0, range(m), range(m))])).all()


def test_groups_of_64_columns_over_blocks_of_32_are_an_error() -> None:
    model = decoder(block=32)
    program = copy.deepcopy(model.program)
    next(i for i in program["instructions"] if i["op"] == "linear")["group"] = 64
    with pytest.raises(hk.ProgramError, match="blocks of 32; expected 0 or 32"):
        hk.Engine(program, model.arrays)


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"slots": -1}, {"slots": 1 << 31}, {"context": 0}, {"context": 321}, {"threads": -1},
                {"threads": 5000}, {"isa": "no such"}, {"slots": True}],
    ids=str,
)  # fmt: skip
def test_broken_options_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(hk.ProgramError):
        hk.Engine(MODEL.program, MODEL.arrays, **options)


SPANS: list[Any] = [
    [],
    [(2, 0, [1], [0])],
    [(-1, 0, [1], [0])],
    [(0, 4, [1], [0])],
    [(1, 1, [1], [0])],
    [(0, -1, [1], [0])],
    [(0, 0, [], [])],
    [(0, 0, [131], [0])],
    [(0, 0, [-1], [0])],
    [(0, 0, [1] * 321, [0])],
    [(0, 0, [1], [1])],
    [(0, 0, [1], [-1])],
    [(0, 0, [1], [0]), (0, 0, [1], [0])],
    [(0, 0, [1], [0]), (1, 0, [1], [5])],
    [(0, 0, [1.5], [0])],
    [(0, 0, [[1]], [0])],
    [(0, 0, [1 << 40], [0])],
    [(0, 1 << 40, [1], [0])],
    [(None, 0, [1], [0])],
]


def test_broken_spans_are_errors_and_the_engine_goes_on(isa: str) -> None:
    with hk.Engine(MODEL.program, MODEL.arrays, slots=2, isa=isa) as engine:
        before = engine.run([(0, 0, [1, 2, 3], [2])])
        for spans in SPANS:
            with pytest.raises(hk.SpanError):
                engine.run(spans)
            assert engine.length(0) == 3 and engine.length(1) == 0
        np.testing.assert_array_equal(engine.run([(0, 0, [1, 2, 3], [2])]), before)
        engine.run([(0, 0, [1] * 320, [])])  # the whole context
        with pytest.raises(hk.SpanError):
            engine.run([(0, 320, [1], [0])])


def test_broken_moves_are_errors(isa: str) -> None:
    with hk.Engine(MODEL.program, MODEL.arrays, slots=2, isa=isa) as engine:
        engine.run([(0, 0, [1, 2, 3], [])])
        data = engine.read(0, 0, 3)
        for call in (
            lambda: engine.copy(0, 2, 1), lambda: engine.copy(-1, 0, 1), lambda: engine.copy(0, 1, 4),
            lambda: engine.copy(0, 1, -1), lambda: engine.read(0, 0, 4), lambda: engine.read(0, 2, 1),
            lambda: engine.read(3, 0, 1), lambda: engine.write(1, 1, 4, data), lambda: engine.write(1, 0, 3, data[:-1]),
            lambda: engine.write(1, 0, 2, data), lambda: engine.write(1, 0, 321, data), lambda: engine.length(2),
            lambda: engine.write(1, -1, 2, data),
        ):  # fmt: skip
            with pytest.raises(hk.SpanError):
                call()
        engine.write(1, 0, 3, data)
        assert engine.read(1, 0, 3) == data


def test_files_are_mapped_and_short_ones_refused(tmp_path: Path) -> None:
    program, arrays = copy.deepcopy(MODEL.program), dict(MODEL.arrays)
    blob = b"x" * 64
    for name in [n for n in arrays if n.endswith("_packed")]:
        array = arrays.pop(name)
        program["tensors"][name] = {"file": 0, "offset": len(blob), "dtype": "U8", "shape": list(array.shape)}
        blob += array.tobytes()
    path = tmp_path / "weights"
    path.write_bytes(blob)
    program["files"] = [str(path)]
    with hk.Engine(program, arrays) as mapped, hk.Engine(MODEL.program, MODEL.arrays) as in_memory:
        np.testing.assert_array_equal(mapped.run([(0, 0, [5, 6], [0, 1])]), in_memory.run([(0, 0, [5, 6], [0, 1])]))
    path.write_bytes(blob[:-1])
    with pytest.raises(hk.ProgramError, match="bytes"):
        hk.Engine(program, arrays)
    path.write_bytes(b"")
    with pytest.raises(hk.ProgramError, match="empty"):
        hk.Engine(program, arrays)


def test_cancel_stops_between_steps_and_a_second_caller_is_told(isa: str) -> None:
    model = decoder(1, layers=24, context=320)
    with hk.Engine(model.program, model.arrays, threads=2, isa=isa) as engine:
        outcome: list[Exception] = []

        def run() -> None:
            try:
                while True:
                    engine.run([(0, 0, [1] * 320, [])])
            except hk.Cancelled as error:
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        busy = False
        while not busy:
            try:
                engine.length(0)
            except RuntimeError as error:
                busy = "another thread" in str(error)
        while thread.is_alive():
            engine.cancel()
            time.sleep(0.001)
        thread.join()
        assert len(outcome) == 1
        assert engine.length(0) == 0
        assert engine.run([(0, 0, [1], [0])]).shape == (1, 131)


def test_a_closed_engine_says_so() -> None:
    engine = hk.Engine(MODEL.program, MODEL.arrays)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.run([(0, 0, [1], [0])])


def test_stats_count() -> None:
    with hk.Engine(MODEL.program, MODEL.arrays, threads=2) as engine:
        engine.run([(0, 0, [1, 2], [0])])
        stats = engine.stats
        assert stats["runs"] == 1 and stats["tokens"] == 2 and stats["meetings"] > 10
        assert stats["seconds"]["linear"] > 0


def test_environment_forces_a_variant() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import headrace_kernels as hk; from programs import decoder;"
        "m = decoder(0); print(hk.Engine(m.program, m.arrays).isa)"
    )
    for isa in hk.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={**os.environ, "HEADRACE_ISA": isa}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == isa


@pytest.mark.parametrize("some", [False, True])
def test_threads_that_are_not_started_are_not_missed(some: bool) -> None:
    unlimited = resource.RLIM_INFINITY
    if any(resource.getrlimit(what)[1] != unlimited for what in (resource.RLIMIT_STACK, resource.RLIMIT_AS)):
        pytest.skip("NOT RUN: memory or stacks are limited here")
    if "HEADRACE_KERNELS" in os.environ:
        pytest.skip("NOT RUN: a library with a sanitizer's runtime")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import headrace_kernels as hk; from programs import decoder\n"
        "m = decoder(0)\n"
        "with hk.Engine(m.program, m.arrays, threads=16) as engine:\n"
        "    print(engine.threads, engine.run([(0, 0, range(1, 12), range(11))]).tobytes().hex())"
    )

    def limit() -> None:  # four stacks at most have room, or not a single one
        resource.setrlimit(resource.RLIMIT_STACK, (1 << (30 if some else 46), unlimited))
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, unlimited))

    few, all_of_them = (
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
            preexec_fn=before,
        ).stdout.split()
        for before in (limit, None)
    )  # fmt: skip
    assert all_of_them[0] == "16"
    assert 1 < int(few[0]) < 16 if some else few[0] == "1"
    assert few[1] == all_of_them[1]
