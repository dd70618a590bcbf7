"""make_checkpoint.py: what it writes is a Baichuan2 checkpoint, whatever the form, with loud channels."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from headrace.checkpoint import open_checkpoint
from headrace.text.tokenizer_folder import load_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_checkpoint.py"
SMALL = "--layers 2 --hidden 64 --heads 4 --ffn 96 --vocab 500 --context 256 --shard-bytes 40000"
LOUD = 10  # an embedding column's deviation over the median one's: nothing random reaches it


def make(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), *SMALL.split(), *more])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return folder


def test_both_forms_hold_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safe = open_checkpoint(make(tmp_path / "safetensors", monkeypatch))
    torch = open_checkpoint(make(tmp_path / "bin", monkeypatch, "--format", "bin"))
    assert safe.config == torch.config
    assert (safe.config.num_layers, safe.config.hidden_size, safe.config.vocab_size) == (2, 64, 500)
    assert len(list(safe.path.glob("*.safetensors"))) > 1, "sharded"
    for name in safe.names:
        np.testing.assert_array_equal(safe.tensor(name).load(), torch.tensor(name).load())


def test_the_vocabulary_has_the_models_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(make(tmp_path / "model", monkeypatch))
    assert tokenizer.vocab_size == 500
    assert tokenizer.decode(tokenizer.encode("百川东到海 the river")) == "百川东到海 the river"


def test_a_few_channels_and_the_begin_tokens_are_loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = open_checkpoint(make(tmp_path / "model", monkeypatch)).tensor("embed_tokens.weight").load()
    spread = embedding[300:].std(axis=0)
    assert 1 <= (spread > LOUD * np.median(spread)).sum() <= 8
    size = np.linalg.norm(embedding, axis=1)
    assert size[[1, 195]].min() > LOUD * np.median(size)
