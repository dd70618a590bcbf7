"""evaluate on bundles: perplexity and divergence against the same computed directly, simulation, and refusals."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import headrace
from headrace.bundle.folder import open_bundle
from headrace.checkpoint import open_checkpoint
from headrace.cli.main import _run
from headrace.errors import CalibrationError, UserError
from headrace.measure.bundle_score import evaluate_bundle
from headrace.model.reference import eager_logits
from headrace.text.tokenizer_folder import load_tokenizer
from tests.exports import SMALL, Exports

LENGTH, WINDOWS = 32, 3
HEAD_DIM = 16
# A cache code on the other side of a tie, when another run cuts the sequence at other places.
RUN_NOISE = 1e-3
# What rounding results to 16 bits, and keys and values to 8, changes in a calm model.
A16_KL, KV8_KL = 0.01, 0.1


@pytest.fixture(scope="module")
def bundle(exports: Exports) -> Path:
    return exports.bundle("calm")


def windows(bundle: Path, text: Path) -> np.ndarray:
    ids = load_tokenizer(bundle).encode(text.read_text(encoding="utf-8"))
    return np.array(ids[: LENGTH * WINDOWS]).reshape(WINDOWS, LENGTH)


def probabilities(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def test_scores_are_those_of_the_logits(bundle: Path, exports: Exports) -> None:
    (score,) = evaluate_bundle(
        bundle, [exports.text], checkpoint=exports.checkpoint("calm"), windows=WINDOWS, length=LENGTH
    )
    source = open_checkpoint(exports.checkpoint("calm"))
    losses, theirs, divergences, same = [], [], [], []
    with headrace.load(bundle, runner="host") as model:
        for ids in windows(bundle, exports.text):
            p = probabilities(eager_logits(source.config, lambda n: source.tensor(n).load(), ids[None])[0])
            q = probabilities(model.logits(ids.tolist()))
            p, q, targets = p[LENGTH // 2 :], q[LENGTH // 2 :], ids[LENGTH // 2 + 1 :]
            divergences += (np.exp(p) * (p - q)).sum(1).tolist()
            same += (p.argmax(1) == q.argmax(1)).tolist()
            losses += q[np.arange(len(targets)), targets].tolist()
            theirs += p[np.arange(len(targets)), targets].tolist()
    assert score.fidelity is not None and score.text == exports.text.name
    assert score.perplexity == pytest.approx(np.exp(-np.mean(losses)), rel=RUN_NOISE)
    assert score.fidelity.reference_perplexity == pytest.approx(np.exp(-np.mean(theirs)), rel=RUN_NOISE)
    assert score.fidelity.kl == pytest.approx(np.mean(divergences), rel=RUN_NOISE)
    assert score.fidelity.top1 == pytest.approx(np.mean(same))
    (alone,) = evaluate_bundle(bundle, [exports.text], windows=WINDOWS, length=LENGTH)
    assert alone.fidelity is None and alone.perplexity == pytest.approx(score.perplexity, rel=RUN_NOISE)


def test_simulations_are_apart(bundle: Path, exports: Exports) -> None:
    found = {}
    for kinds in ("a16", "kv8", "a16, kv8"):
        (score,) = evaluate_bundle(bundle, [exports.text], tasks="kl", windows=WINDOWS, length=LENGTH, simulate=kinds)
        assert score.fidelity is not None
        found[kinds] = score.fidelity.kl
    assert 0 < found["a16"] < A16_KL and 0 < found["kv8"] < KV8_KL
    assert found["a16, kv8"] > min(found["a16"], found["kv8"])
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("kind", ["unlike", "rotated"])
def test_a_bundle_in_another_basis_is_simulated_in_that_basis(exports: Exports, tmp_path: Path, kind: str) -> None:
    """Export rotates the stream, and scales keys against queries: grids fit the bundle's weights alone."""
    folder = exports.checkpoint("calm")
    if kind == "unlike":
        folder = copytree(folder, tmp_path / "unlike")
        tensors = load_file(folder / "model.safetensors")
        for name, factor in (("k_proj", 32), ("q_proj", 1 / 32)):
            for key in tensors:
                if name in key:
                    tensors[key][:: HEAD_DIM // 2] *= np.float32(factor)  # a rotary pair of each head
        save_file(tensors, folder / "model.safetensors")
    made = headrace.export(folder, tmp_path / "out", **SMALL, calibration=[exports.text], rotate=kind == "rotated")
    (alone,) = evaluate_bundle(made, [exports.text], tasks="kl", windows=WINDOWS, length=LENGTH, simulate="a16")
    (whole,) = evaluate_bundle(
        made, [exports.text], tasks="kl", checkpoint=folder, windows=WINDOWS, length=LENGTH, simulate="a16"
    )
    assert alone.fidelity is not None and whole.fidelity is not None
    assert 0 < alone.fidelity.kl < A16_KL < whole.fidelity.kl  # the second counts what weights lost too


def test_texts_are_told_apart(
    bundle: Path, exports: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("百川东到海，何时复西归？" * 40, encoding="utf-8")
    arguments = ["--text", str(exports.text), "--text", str(other), "--windows", "2", "--length", "32"]
    assert _run(["evaluate", str(bundle), *arguments]) == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert [row[0] for row in rows[-2:]] == ["text.txt", "other.txt"] and rows[-1][1] != rows[-2][1]


def test_mistakes_come_before_any_work(bundle: Path, exports: Exports, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("river", encoding="utf-8")
    with pytest.raises(UserError, match="expected --checkpoint"):
        evaluate_bundle(bundle, [exports.text], tasks="kl")
    with pytest.raises(UserError, match="task 'mmlu' is unknown"):
        evaluate_bundle(bundle, [exports.text], tasks="mmlu")
    with pytest.raises(UserError, match="--simulate 'a8' is unknown; expected a16, kv8"):
        evaluate_bundle(bundle, [exports.text], simulate="a8")
    with pytest.raises(CalibrationError, match="less than one window"):
        evaluate_bundle(bundle, [exports.text, short])
    with pytest.raises(CalibrationError, match="cannot be read"):
        evaluate_bundle(bundle, [tmp_path / "none.txt"])
    assert open_bundle(bundle).root == bundle


def test_a_text_as_chat(exports: Exports) -> None:
    bundle = exports.bundle("tied", context=512)
    options = {"checkpoint": exports.checkpoint("tied"), "windows": 2, "length": 128}
    plain, talk = evaluate_bundle(bundle, [exports.text], tasks="kl,chat", **options)
    assert (plain.text, talk.text) == ("text.txt", "text.txt as chat")
    assert talk.fidelity is not None and talk.fidelity.tokens == talk.windows * 64
    assert talk.perplexity != plain.perplexity  # marks of turns are in between
    with pytest.raises(UserError, match="chat needs a turn format"):
        evaluate_bundle(exports.bundle(), [exports.text], tasks="chat", windows=2, length=64)
