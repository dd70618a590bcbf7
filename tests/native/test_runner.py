"""NativeRunner: the oracle's numbers on every kind of model and grid, alone and among others, in any pieces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace import runners
from headrace.bundle.folder import Bundle, open_bundle
from headrace.errors import ContextFull, TargetError, UserError
from headrace.model.fidelity import FidelityMeter, no_target
from headrace.native import runner as target
from headrace.native.runner import NativeRunner
from headrace.runtime.runner import Runner, Span
from headrace.targets.host.runner import HostRunner
from tests.exports import CONTEXT, VOCAB, Exports
from tests.oracle.quantized import forward

pytestmark = pytest.mark.kernels

IDS = tuple(int(i) for i in np.random.default_rng(5).integers(0, VOCAB, 60))
EIGHT = {"name": "eight", "kv": "int8", "rules": [{"match": ".", "bits": 8, "block": "channel", "method": "nearest"}]}

# What activations cost, in times of what ONNX Runtime's cost on the same model: token by token, where few columns
# share a scale, measured 0.13 … 1.05, and in prompts 0.4 … 1.9.
DECODE_FACTOR, PROMPT_FACTOR, SLACK = 1.5, 3.0, 0.001
# Of a calm model activations cost no more. Few wanted rows of a prompt have fine ones after the last attention.
CALM_KL = 0.005
# The same kernels in other pieces: coarse activations here, fine ones there.
PIECES_KL = 0.3


def kl(expected: NDArray[Any], found: NDArray[Any]) -> float:
    meter = FidelityMeter()
    meter.add(np.asarray(expected, np.float32), found, np.full(len(expected), no_target, np.int64))
    return meter.result().kl


def run(
    runner: Runner, ids: Iterable[int], start: int = 0, wanted: Iterable[int] = (0,), slot: int = 0
) -> NDArray[np.float32]:
    return runner.run([Span(slot, start, tuple(ids), tuple(wanted))])


def one_by_one(runner: Runner, ids: Iterable[int], slot: int = 0) -> NDArray[np.float32]:
    return np.concatenate([run(runner, [token], at, slot=slot) for at, token in enumerate(ids)])


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe whose linears have 8 bits."""
    path = tmp_path_factory.mktemp("recipes") / "eight.json"
    path.write_text(json.dumps(EIGHT), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def calm(exports: Exports) -> Bundle:
    return open_bundle(exports.bundle("calm", parts=3))


@pytest.mark.parametrize("kv", ["int8", "float32"])
@pytest.mark.parametrize("recipe", ["w4a16", "w4b32", "eight", "lpbq", "float16"])
@pytest.mark.parametrize("kind", ["gqa", "mha", "tied", "wide", "qwen2"])
def test_numbers_of_the_oracle(exports: Exports, eight: str, kind: str, recipe: str, kv: str) -> None:
    """Of 5 and 6 bits beside 4 and 8 too, with either kind of scales."""
    own = {"eight": eight} | {scales: exports.mixed(scales, kind) for scales in ("lpbq", "float16")}
    path = exports.bundle(kind, recipe=own.get(recipe, recipe), kv=kv, parts=3)
    expected = forward(path, IDS, int8_cache=kv == "int8").logits
    bundle = open_bundle(path)
    native, host = NativeRunner(bundle), HostRunner(bundle)
    peer = kl(expected, run(host, IDS, wanted=range(60)))
    assert kl(expected, one_by_one(native, IDS)) < DECODE_FACTOR * peer + SLACK
    assert kl(expected, run(native, IDS, wanted=range(60))) < PROMPT_FACTOR * peer + SLACK


def test_wanted_rows(calm: Bundle) -> None:
    runner = NativeRunner(calm)
    whole = run(runner, IDS[:20], wanted=range(20))
    assert whole.shape == (20, VOCAB)
    assert whole.dtype == np.float32
    some = run(runner, IDS[:20], wanted=(7, 0, 7))
    assert kl(whole[[7, 0, 7]], some) < CALM_KL
    np.testing.assert_array_equal(some[[1, 0, 0]], run(runner, IDS[:20], wanted=(0, 7, 7)))
    assert run(runner, IDS[:20], wanted=()).shape == (0, VOCAB)
    assert runner.run([]).shape == (0, VOCAB)
    runner.close()


def test_a_sequence_among_others_is_what_it_is_alone(calm: Bundle) -> None:
    """Prompts, drafts and single tokens of four sequences in the same calls, bit for bit."""
    lengths = [(40, 1, 1), (1, 1, 5), (9, 3, 1), (17, 1, 1)]
    alone, together = NativeRunner(calm, slots=4), NativeRunner(calm, slots=4)
    at = [0] * 4
    for step in range(3):
        spans = []
        for slot, sizes in enumerate(lengths):
            ids = IDS[at[slot] : at[slot] + sizes[step]]
            spans.append(Span(slot, at[slot], ids, tuple(range(len(ids)))))
            at[slot] += sizes[step]
        expected = np.concatenate([alone.run([span]) for span in spans])
        np.testing.assert_array_equal(together.run(spans), expected)


@pytest.mark.parametrize("pieces", [(1, 59), (7, 1, 52), (16, 16, 16, 12), (33, 27)])
def test_spans_over_any_past(calm: Bundle, pieces: tuple[int, ...]) -> None:
    whole = run(NativeRunner(calm), IDS, wanted=range(60))
    runner, at, found = NativeRunner(calm), 0, []
    for size in pieces:
        found.append(run(runner, IDS[at : at + size], at, range(size)))
        at += size
    assert kl(whole, np.concatenate(found)) < PIECES_KL


def test_long_spans_are_cut_and_short_ones_share_a_call(calm: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [
        Span(0, 0, IDS[:50], (49, 3)),
        Span(1, 0, IDS[:4], (0, 3)),
        Span(2, 0, IDS[:21], ()),
        Span(3, 0, IDS[:1], (0, 0)),
    ]
    expected = NativeRunner(calm, slots=4).run(spans)
    monkeypatch.setattr(target, "CALL_TOKENS", 20)
    runner, sizes = NativeRunner(calm, slots=4), []
    compute = runner.engine.run
    monkeypatch.setattr(
        runner.engine, "run", lambda given: (sizes.append([len(ids) for _, _, ids, _ in given]), compute(given))[1]
    )
    found = runner.run(spans)
    assert sizes == [[20], [20], [10, 4], [20], [1, 1]]
    assert found.shape == (6, VOCAB)
    assert kl(expected, found) < PIECES_KL


def test_rewinding_forgets_what_was_there(calm: Bundle) -> None:
    runner, fresh = NativeRunner(calm), NativeRunner(calm)
    run(runner, IDS[:30], wanted=())
    fresh.write(0, 0, runner.read(0, 0, 5))
    one = run(runner, IDS[30:], 5, (9,))
    np.testing.assert_array_equal(one, run(fresh, IDS[30:], 5, (9,)))


@pytest.mark.parametrize("kv", ["int8", "float32"])
def test_copies_and_files_of_the_cache(exports: Exports, kv: str) -> None:
    runner = NativeRunner(open_bundle(exports.bundle("gqa", kv=kv)), slots=3)
    run(runner, IDS[:30], wanted=())
    runner.copy(0, 1, 12)
    runner.write(2, 0, runner.read(0, 0, 5))
    runner.write(2, 5, runner.read(0, 5, 12))
    after = [run(runner, IDS[12:13], 12, slot=slot) for slot in range(3)]
    np.testing.assert_array_equal(after[0], after[1])
    np.testing.assert_array_equal(after[0], after[2])
    assert len(runner.read(0, 0, 13)) == 13 * runner.kv_bytes // (3 * CONTEXT)


def test_what_is_impossible_is_told_before_anything_is_computed(calm: Bundle) -> None:
    runner = NativeRunner(calm, slots=2)
    run(runner, IDS[:10], wanted=())
    for spans, error in [
        ([Span(0, 10, (VOCAB,), ())], UserError),
        ([Span(0, 10, (-1,), ())], UserError),
        ([Span(0, 12, (1,), ())], ValueError),
        ([Span(2, 0, (1,), ())], ValueError),
        ([Span(0, 10, (1,), ()), Span(0, 10, (1,), ())], ValueError),
        ([Span(0, 10, (1,), (1,))], ValueError),
        ([Span(0, 10, (), ())], ValueError),
        ([Span(0, 10, (1,) * (CONTEXT - 9), ())], ContextFull),
    ]:
        with pytest.raises(error):
            runner.run(spans)
    fresh = NativeRunner(calm)
    run(fresh, IDS[:10], wanted=())
    np.testing.assert_array_equal(run(runner, IDS[10:11], 10), run(fresh, IDS[10:11], 10))


def test_the_last_position_of_the_context_can_be_used(calm: Bundle) -> None:
    short, long = NativeRunner(calm, context=20), NativeRunner(calm)
    np.testing.assert_array_equal(run(short, IDS[:20], wanted=(19,)), run(long, IDS[:20], wanted=(19,)))
    with pytest.raises(ContextFull):
        run(short, IDS[:1], 20)


def test_threads_do_not_change_an_answer(calm: Bundle) -> None:
    one, two = NativeRunner(calm, threads=1), NativeRunner(calm, threads=2)
    assert (one.threads, two.threads) == (1, 2)
    np.testing.assert_array_equal(run(one, IDS, wanted=range(60)), run(two, IDS, wanted=range(60)))
    np.testing.assert_array_equal(run(one, IDS[:1], 60), run(two, IDS[:1], 60))


def test_weights_in_huge_pages_are_the_same_weights(calm: Bundle) -> None:
    mapped = runners.open_runner(calm, "native", runners.Options(huge_pages=False))
    copied = runners.open_runner(calm, "native", runners.Options(huge_pages=True))
    np.testing.assert_array_equal(run(copied, IDS, wanted=range(60)), run(mapped, IDS, wanted=range(60)))


def test_it_is_a_runner_and_the_default(calm: Bundle) -> None:
    runner = runners.open_runner(calm)
    assert isinstance(runner, NativeRunner)
    assert isinstance(runner, Runner)
    assert (runner.vocab_size, runner.context, runner.slots) == (VOCAB, CONTEXT, 1)


CHILD = """
import sys, numpy as np
from pathlib import Path
from headrace.bundle.folder import open_bundle
from headrace.native.runner import NativeRunner
from headrace.runtime.runner import Span
runner = NativeRunner(open_bundle(Path(sys.argv[1])))
ids = tuple(map(int, sys.argv[3].split(",")))
rows = [runner.run([Span(0, at, (token,), (0,))]) for at, token in enumerate(ids)]
prompt = runner.run([Span(0, 0, ids, range(len(ids)))])
np.savez(sys.argv[2], isa=runner.isa, decode=np.concatenate(rows), prompt=prompt)
"""


ISAS = ("amx", "avx512vnni", "avx2vnni", "avx2", "i8mm", "dotprod", "neon", "plain", "amx-emulated")


def test_every_instruction_set_is_in_the_list() -> None:
    import headrace_kernels

    assert headrace_kernels.known_isas() == ISAS


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_here(calm: Bundle, tmp_path: Path, isa: str) -> None:
    """HEADRACE_ISA in a child: each variant of this machine gives the oracle's numbers; the others are named."""
    import headrace_kernels

    if isa not in headrace_kernels.available_isas():
        pytest.skip(f"not run: this machine lacks {isa}")
    out = tmp_path / "found.npz"
    command = [sys.executable, "-c", CHILD, str(calm.root), str(out), ",".join(map(str, IDS))]
    subprocess.run(command, check=True, env={**os.environ, "HEADRACE_ISA": isa}, timeout=120)
    found = np.load(out)
    assert found["isa"] == isa
    expected = forward(calm.root, IDS, int8_cache=True).logits
    assert kl(expected, found["decode"]) < CALM_KL
    assert kl(expected, found["prompt"]) < CALM_KL


def test_an_unknown_instruction_set_is_told_in_one_line(calm: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_ISA", "abacus")
    with pytest.raises(TargetError, match="abacus") as error:
        NativeRunner(calm)
    assert "\n" not in str(error.value)


def test_without_the_package_onnx_runtime_serves(calm: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "headrace_kernels", None)  # as if it were not installed
    monkeypatch.setattr(runners, "find_spec", lambda name: None if name == "headrace_kernels" else find_spec(name))
    assert runners.default_runner() == "host"
    assert isinstance(runners.open_runner(calm), HostRunner)
    with pytest.raises(TargetError, match=r"pip install ./kernels, or take --runner host"):
        runners.open_runner(calm, "native")


def test_kernels_of_another_version_are_one_line(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace_kernels.__version__", "0.1.0")
    with pytest.raises(
        TargetError, match=r"headrace-kernels 0\.1\.0 is installed, and this headrace needs [\d.]+; run: pip"
    ):
        NativeRunner(open_bundle(exports.bundle()))
