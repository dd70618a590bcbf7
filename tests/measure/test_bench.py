"""bench: a record whose numbers belong together, other tools' tables of it, and what changed between two."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from headrace.bundle.folder import open_bundle
from headrace.cli.main import _run
from headrace.errors import TargetError, UserError
from headrace.measure import bench, speculation_gain
from headrace.measure.bench import bench_bundle, parameter_count, peak_rss
from headrace.measure.bench_tables import bench_csv, bench_markdown
from headrace.measure.compare import compare_records, rank_test
from headrace.measure.record import kept_records, read_record
from headrace.runtime.engine import Engine
from tests.exports import CONTEXT, LAYERS, PROMPT_LENGTH, Exports

SMALL: dict[str, Any] = {"prompts": (16, 40), "tokens": 4, "depths": (0, 60), "repeats": 3}


@pytest.fixture(scope="module")
def record(exports: Exports) -> dict[str, Any]:
    return bench_bundle(exports.bundle(), **SMALL)


def test_the_record(record: dict[str, Any], exports: Exports) -> None:
    bundle = open_bundle(exports.bundle())
    assert record["format"] == "headrace-bench" and record["runner"] in ("host", "native")
    assert [p["tokens"] for p in record["prompts"]] == [16, 40]
    assert [p["steps"] for p in record["prompts"]] == [1, 2]
    for row in (*record["prompts"], *record["decode"], record["step"]):
        assert len(row["samples"]) == 3
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
    for p in record["prompts"]:
        assert p["useful_tok_s"] == pytest.approx(p["tokens"] / p["seconds"], rel=1e-3)  # both are rounded
        assert p["padded_tok_s"] == pytest.approx(p["steps"] * PROMPT_LENGTH / p["seconds"], rel=1e-3)
        assert p["formula_seconds"] == pytest.approx(p["steps"] * record["step"]["seconds"], rel=1e-3)
    assert [(d["depth"], d["tokens"]) for d in record["decode"]] == [(0, 4), (60, 4)]
    for d in record["decode"]:
        assert d["tok_s"] == pytest.approx(4 / d["seconds"], rel=1e-3)
        assert 0 < d["gap_ms"]["p50"] <= d["gap_ms"]["p90"] <= d["gap_ms"]["p99"]
    assert record["load"]["seconds"] > 0 and record["load"]["cold_start_seconds"] > 0
    memory = record["memory"]
    assert memory["kv_bytes"] == 2 * LAYERS * 2 * 16 * CONTEXT
    assert memory["weight_bytes"] == bundle.weight_bytes and memory["peak_rss_bytes"] > 10_000_000
    config = bundle.config
    linears = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64
    assert parameter_count(bundle) == LAYERS * (linears + 128) + 64 + 2 * config.vocab_size * 64


def test_every_repetition_computes_its_whole_prompt(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    run = Engine._run

    def counted(self: Engine, sequences: list[Any]) -> Any:
        before = sum(s.held for s in sequences)
        rows = run(self, sequences)
        computed.append(sum(s.held for s in sequences) - before)
        return rows

    monkeypatch.setattr(Engine, "_run", counted)
    bench_bundle(exports.bundle(), prompts=(64,), tokens=0, repeats=3, runner="host")
    steps = 4 + 3 * 2  # a warm-up and three single steps before, of which the first has one token behind it
    whole = [n for n in computed if n == PROMPT_LENGTH]
    assert len(whole) >= steps - 1  # a first token that came up twice would not be computed again
    assert sum(computed) >= (3 * 64 + 4 * PROMPT_LENGTH) - 6


def test_without_prompts_or_tokens(exports: Exports) -> None:
    steps: list[tuple[int, int]] = []
    empty = bench_bundle(
        exports.bundle(), prompts=(), tokens=0, repeats=1, progress=lambda _, done, total: steps.append((done, total))
    )
    assert empty["prompts"] == [] and empty["decode"] == []
    assert steps == [(n, len(steps)) for n in range(1, len(steps) + 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": (16, CONTEXT + 1)}, f"a prompt of {CONTEXT + 1} tokens does not fit the context of {CONTEXT}"),
        ({"depths": (150,), "tokens": 60}, f"60 tokens behind 150 do not fit the context of {CONTEXT}"),
        ({"depths": (0,), "tokens": CONTEXT}, f"{CONTEXT} tokens behind 1 do not fit the context of {CONTEXT}"),
        ({"tokens": 15, "speculate": "lookup"}, "timed over answers of 15 tokens; expected at least 16"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(
    exports: Exports, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(bench, "_cold_start", None)
    with pytest.raises(UserError, match=message):
        bench_bundle(exports.bundle(), **{**SMALL, **options})


def test_a_cold_start_is_measured_while_nothing_maps_the_files(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system keeps what a process has mapped, whoever asks it to forget the file."""
    order: list[str] = []
    opened, started = bench.open_runner, bench._cold_start

    def called(name: str, function: Any) -> Any:
        return lambda *given: (order.append(name), function(*given))[1]

    monkeypatch.setattr(bench, "_cold_start", called("cold", started))
    monkeypatch.setattr(bench, "open_runner", called("open", opened))
    bench_bundle(exports.bundle(), prompts=(), tokens=0, repeats=1)
    assert order == ["cold", "open"]


def test_speculation_is_timed_over_what_was_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may make several tokens, the first one too: those that came with it took no time that is counted."""
    steps = [2, 3, 1]
    model = mock.MagicMock()
    request = mock.Mock(error=None)
    turn, ticks = itertools.count(), itertools.count()

    def submit(*_: Any) -> Any:
        request.done = False
        return request

    def step() -> list[tuple[Any, Any]]:
        made = steps[next(turn) % len(steps)]
        request.done = made == steps[-1]
        return [(request, mock.Mock(id=7))] * made

    model.engine.step, model.engine.submit = step, submit
    model.tokenizer.eos_ids = (2,)
    monkeypatch.setattr(speculation_gain.time, "perf_counter", lambda: float(next(ticks)))
    found = speculation_gain._round(model, 6)
    prompts = len(speculation_gain.PROMPTS)
    assert [len(answer) for answer in found.answers] == [6] * prompts
    assert (found.tokens, found.seconds) == ((3 + 1) * prompts, 2.0 * prompts)


def test_speculation_gives_the_same_answers(exports: Exports) -> None:
    told = bench_bundle(exports.bundle(), prompts=(), tokens=24, depths=(), repeats=1, speculate="lookup")[
        "speculation"
    ]
    assert told["same"] and told["how"] == "lookup" and told["equal_tokens"] == told["tokens"] > 0
    assert 0 <= told["accepted_tokens"] <= told["drafted_tokens"]
    assert told["plain_tok_s"] > 0 and told["tok_s"] > 0
    assert "speculation" not in bench_bundle(exports.bundle(), prompts=(), tokens=0, repeats=1)


def test_answers_that_part_are_told(
    exports: Exports, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = iter([[[1, 2, 3], [4, 5]]] * 2 + [[[1, 9, 3], [4, 5]]] * 2)  # each model warms up
    monkeypatch.setattr(speculation_gain, "_round", lambda *_: speculation_gain._Round(next(given), 3, 1.0, 2, 1))
    path = str(exports.bundle())
    assert _run(["bench", path, "-p", "8", "-n", "16", "-r", "1", "--speculate", "lookup"]) == 0
    assert "answers differ after 3 of 5 tokens" in " ".join(capfd.readouterr().out.split())


def test_a_prompt_may_fill_the_context(exports: Exports) -> None:
    (row,) = bench_bundle(exports.bundle(), prompts=(CONTEXT,), tokens=0, repeats=1)["prompts"]
    assert row["tokens"] == CONTEXT and row["steps"] == -(-CONTEXT // PROMPT_LENGTH)


def test_a_runner_without_logits_is_told(exports: Exports) -> None:
    with pytest.raises(TargetError, match="gives no logits"):
        bench_bundle(exports.bundle(), **SMALL, runner="genie")


def test_tables_of_llama_bench(record: dict[str, Any]) -> None:
    rows = list(csv.DictReader(bench_csv(record).splitlines()))
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [
        ("16", "0", "0"),
        ("40", "0", "0"),
        ("0", "4", "0"),
        ("0", "4", "60"),
    ]
    mean = sum(record["prompts"][1]["samples"]) / 3
    assert float(rows[1]["avg_ns"]) == pytest.approx(mean * 1e9, abs=1)  # whole nanoseconds
    assert float(rows[3]["avg_ts"]) == pytest.approx(sum(4 / s for s in record["decode"][1]["samples"]) / 3, rel=1e-5)
    lines = bench_markdown(record).splitlines()
    assert [line.split("|")[6].strip() for line in lines[2:]] == ["pp16", "pp40", "tg4", "tg4 @ d60"]


def changed(record: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same measurement, prompts of 40 tokens slower by a factor."""
    copy = json.loads(json.dumps(record))
    copy["prompts"][1]["samples"] = [factor * s for s in (1.0, 1.05, 1.1, 1.15, 1.2)]
    return copy


def test_what_changed_beyond_noise(record: dict[str, Any]) -> None:
    before = changed(record, 1.0)
    for factor, real in ((1.5, True), (0.5, True), (1.001, False), (1.03, False)):
        _, changes = compare_records(before, changed(record, factor))
        found = next(change for change in changes if change.what == "first token of 40")
        assert found.ratio == pytest.approx(factor)
        assert found.real is real, factor
        assert not any(c.real for c in changes if c is not found)
    other = changed(record, 1.0)
    other["runner"], other["versions"]["onnxruntime"], other["versions"]["new"] = "another", "9.9", "1"
    differences, _ = compare_records(before, other)
    assert differences[0] == f"runner: {before['runner']} → another"
    assert any(line.startswith("onnxruntime: ") and line.endswith("→ 9.9") for line in differences)
    assert "new: None → 1" in differences
    del other["step"]["samples"]
    with pytest.raises(UserError, match=r"a record lacks what bench writes .*'samples'"):
        compare_records(before, other)
    with pytest.raises(UserError, match="expected headrace-bench"):
        compare_records({"format": "headrace-text"}, before)


@pytest.mark.parametrize(("repeats", "told"), [(1, False), (2, False), (3, False), (4, True)])
def test_too_few_repetitions_tell_nothing(record: dict[str, Any], repeats: int, told: bool) -> None:
    """Of three and three no order is unlikely enough, however far apart they are."""
    before, after = changed(record, 1.0), changed(record, 10.0)
    for one in (before, after):
        one["prompts"][1]["samples"] = one["prompts"][1]["samples"][:repeats]
    _, changes = compare_records(before, after)
    (found,) = (change for change in changes if change.what == "first token of 40")
    assert (found.p is not None, found.real) == (told, told)


def test_the_rank_test_by_hand() -> None:
    assert rank_test([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert rank_test([1, 2, 3], [1, 2, 3]) == 1.0
    assert rank_test([1, 3], [2, 4]) == pytest.approx(4 / 6)
    # The normal limit with continuity correction: mean 105, spread √175, ranks 55.
    assert rank_test(list(range(10)), list(range(10, 20))) == pytest.approx(1.827e-4, rel=1e-3)


def test_the_command_line(exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = exports.copy(tmp_path / "b")
    words = ["bench", str(bundle), "-p", "16", "-n", "2", "-d", "0,8", "-r", "2"]
    assert _run([*words, "--save", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    ((name, kept),) = kept_records(bundle).items()
    assert kept == told and name == f"bench-{told['runner']}.json"
    assert _run([*words, "-o", "md"]) == 0
    assert capsys.readouterr().out.startswith("| model |")
    assert _run(words) == 0
    assert "a new process, files not cached" in capsys.readouterr().out
    file = str(bundle / "measurements" / name)
    assert _run(["bench", "--compare", file, file]) == 0
    assert "too few repetitions" in capsys.readouterr().out
    assert _run(["bench", "--compare", file, file, "--json"]) == 0
    assert all(not c["real"] for c in json.loads(capsys.readouterr().out.splitlines()[-1])["changes"])
    assert read_record(Path(file)) == kept
    for wrong, message in (
        (["bench"], "bench needs a bundle"),
        ([*words, "-o", "xml"], "expected json, md or csv"),
        (["bench", str(bundle), "-d", "1,x"], "expected whole numbers, separated by commas"),
    ):
        assert _run(wrong) == 2
        assert message in capsys.readouterr().err


def test_peak_memory_grows_with_use() -> None:
    before = peak_rss()
    block = bytearray(64 << 20)
    block[::4096] = b"\1" * len(block[::4096])
    assert peak_rss() >= max(before, 64 << 20)
