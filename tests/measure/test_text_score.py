"""evaluate on tiny models: windows, the followed reference, and what comes out when both models are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.errors import CalibrationError, UserError
from headrace.measure.text_score import evaluate_text, first_windows, follow, parse_tasks, read_text
from headrace.model.reference import eager_logits
from tests.tiny import write_llama

# Two orders of the same float32 sums.
ORDER_NOISE = 1e-6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_llama(tmp_path_factory.mktemp("model"), layers=2, tied=True))


def test_a_model_is_its_own_reference(source: Checkpoint) -> None:
    windows = np.random.default_rng(0).integers(0, source.config.vocab_size, (3, 24))

    def logits(ids: object) -> np.ndarray:
        return eager_logits(source.config, lambda name: source.tensor(name).load(), np.array([ids]))[0]

    scored = evaluate_text(
        "text", windows, logits, follow(source.config, lambda name: source.tensor(name).load(), windows)
    )
    assert scored.fidelity is not None
    assert scored.fidelity.tokens == 3 * 12
    assert scored.fidelity.kl < ORDER_NOISE and scored.fidelity.top1 == 1
    alone = evaluate_text("text", windows, logits)
    assert alone.fidelity is None
    assert alone.perplexity == pytest.approx(scored.perplexity, rel=ORDER_NOISE)
    # By hand: tokens 12 … 22 of each window predict 13 … 23.
    whole = np.stack([logits(ids) for ids in windows])[:, 12:-1].astype(np.float64)
    chosen = np.take_along_axis(whole, windows[:, 13:, None], 2)[..., 0] - np.log(np.exp(whole).sum(2))
    assert alone.perplexity == pytest.approx(np.exp(-chosen.mean()), rel=ORDER_NOISE)
    assert set(scored.to_dict()) >= {"text", "kl", "kl_p99", "top1", "perplexity", "reference_perplexity"}
    assert "kl" not in alone.to_dict()


def test_windows_begin_where_the_text_does() -> None:
    assert first_windows(range(100), "text", 30, 8)[:, 0].tolist() == [0, 30, 60]
    assert len(first_windows(range(100), "text", 10, 4)) == 4
    with pytest.raises(CalibrationError, match=r"poem\.txt has 9 tokens, which is less than one window of 10"):
        first_windows(range(9), "poem.txt", 10)
    with pytest.raises(UserError, match="0 windows of 512"):
        first_windows(range(9), "poem.txt", 512, 0)


def test_tasks_and_files_are_checked(tmp_path: Path) -> None:
    assert parse_tasks("ppl, kl") == ("ppl", "kl")
    with pytest.raises(UserError, match="task 'pl' is unknown; did you mean 'ppl'"):
        parse_tasks("pl")
    with pytest.raises(UserError, match="--tasks is empty"):
        parse_tasks(" ")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    for name in ("a.txt", "none.txt"):
        with pytest.raises(CalibrationError, match="cannot be read"):
            read_text(tmp_path / name)
