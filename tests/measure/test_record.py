"""Measurements as files: what they say of bundle and machine, and that another bundle's are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.bundle.folder import MEASUREMENTS, check_files, open_bundle
from headrace.cli.main import _run
from headrace.errors import UserError
from headrace.measure.record import KINDS, kept_records, make_record, read_record, save_record
from tests.exports import Exports
from tests.measure.test_item_sets import CHOICES


def test_a_record_says_what_was_measured_and_where(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b")
    record = make_record("bench", open_bundle(bundle), "host", {"numbers": [1, 2]})
    assert record["format"] == "headrace-bench" and record["version"] == 1 and record["numbers"] == [1, 2]
    assert record["bundle"]["weight_bytes"] == open_bundle(bundle).weight_bytes
    assert record["machine"]["processor"] and record["machine"]["cores"] >= 1
    assert {"headrace", "numpy", "onnxruntime"} <= set(record["versions"])
    path = save_record(bundle, "bench-host", record)
    assert path == bundle / MEASUREMENTS / "bench-host.json"
    assert kept_records(bundle) == {"bench-host.json": record}
    assert check_files(bundle) == []  # measurements are beside what the manifest lists
    open_bundle(bundle)


def test_another_bundles_measurement_is_refused(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b")
    save_record(bundle, "x", make_record("text", open_bundle(exports.bundle("tied")), "host", {}))
    with pytest.raises(UserError, match="measured another bundle"):
        kept_records(bundle)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list"),
        ("{}", "is no measurement of headrace"),
        ('{"format": "headrace-bench"}', "is no measurement of headrace"),
        ('{"format": "headrace-bench", "version": 2}', "reads up to 1: update headrace"),
    ],
)
def test_what_is_no_record(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_record(tmp_path / "r.json")


def test_evaluate_keeps_what_it_measured(exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = exports.copy(tmp_path / "b", "tied", context=512)
    words = ["evaluate", str(bundle), "--text", str(exports.text), "--windows", "1", "--length", "64", "--save"]
    words += ["--tasks", "ppl,ceval", "--data", str(CHOICES), "--shots", "0"]
    assert _run([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = kept_records(bundle)
    assert set(kept) == {"text.json", "ceval.json"}
    assert kept["text.json"]["texts"] == report["texts"]
    assert kept["ceval.json"]["accuracy"] == report["choices"][0]["accuracy"]
    assert {record["format"].removeprefix("headrace-") for record in kept.values()} <= set(KINDS)
    assert _run(words) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "mean of subjects" in shown and "computer_network" in shown


def test_evaluate_asks_for_what_it_needs(exports: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(exports.bundle())
    for words, message in (
        ([], "perplexity needs a text; expected --text FILE"),
        (["--tasks", "kl,mmlu"], "kl needs a text"),
        (["--tasks", "mmlu"], "mmlu needs its items; expected --data FOLDER"),
        (["--tasks", "mmlo"], "did you mean 'mmlu'?"),
        (["--text", "t", "--data", "d"], "--data holds questions, of which --tasks names none"),
        (["--tasks", "mmlu", "--data", "d", "--text", "t"], "--text is for texts, of which --tasks names no task"),
        (["--tasks", "mmlu", "--data", "d", "--simulate", "a16"], "--simulate is for texts"),
        (
            ["--text", "t", "--simulate", "a16", "--runner", "native"],
            "--simulate computes by itself; expected no --runner",
        ),
    ):
        assert _run(["evaluate", bundle, *words]) == 2
        assert message in capsys.readouterr().err
