"""The eager decoder against the independent oracles, for every registered architecture."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.architectures import ARCHITECTURES
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.model.reference import eager_logits
from headrace.model.weights import weight_table
from tests.oracle import baichuan as baichuan_oracle
from tests.tiny import rewrite_as_baichuan, write_baichuan, write_gguf, write_llama, write_mistral, write_qwen2

LOGIT_TOLERANCE = 1e-4  # float32 against float64 over a few layers, logits of a few units
SAME_WEIGHTS_TOLERANCE = 1e-4  # the same float32 weights multiplied in another order

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
IDS = np.random.default_rng(7).integers(0, 160, 21)

# Every registered architecture needs at least one writer here and an oracle of its name.
VARIANTS: dict[str, dict[str, Callable[[Path], Path]]] = {
    "llama": {
        "gqa": write_llama,
        "tied": lambda folder: write_llama(folder, tied=True),
        "wide_heads": lambda folder: write_llama(folder, head_dim=24),
        "one_kv_head": lambda folder: write_llama(folder, kv_heads=1),
        "llama3": lambda folder: write_llama(folder, rope_scaling=LLAMA3),
        "linear": lambda folder: write_llama(folder, rope_scaling={"type": "linear", "factor": 2.0}),
        "bfloat16": lambda folder: write_llama(folder, dtype="bfloat16", shards=3),
        "attention_bias": lambda folder: write_llama(folder, attention_bias=True),
        "mlp_bias": lambda folder: write_llama(folder, mlp_bias=True),
    },
    "qwen2": {
        "untied": write_qwen2,
        "tied": lambda folder: write_qwen2(folder, tied=True),
        "one_kv_head": lambda folder: write_qwen2(folder, kv_heads=1),
        "window": lambda folder: write_qwen2(folder, use_sliding_window=True),  # of 32 tokens: it does not act
        "float16": lambda folder: write_qwen2(folder, dtype="float16"),
    },
    "mistral": {
        "no_window": write_mistral,
        "window": lambda folder: write_mistral(folder, sliding_window=len(IDS)),  # the last token still sees the first
        "wide_heads": lambda folder: write_mistral(folder, head_dim=24, kv_heads=1),
        "tied": lambda folder: write_mistral(folder, tied=True),
    },
    "baichuan": {
        "v1": lambda folder: write_baichuan(folder, 1),
        "v2": lambda folder: write_baichuan(folder, 2),
        "float16": lambda folder: write_baichuan(folder, 2, dtype="float16", shards=2),
    },
}


def logits(checkpoint: Checkpoint, ids: Any, chunk: int | None = None) -> np.ndarray:
    return eager_logits(
        checkpoint.config, lambda name: checkpoint.tensor(name).load(), np.asarray(ids)[None], chunk
    )[0]  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_eager_equals_oracle(model_type: str, tmp_path: Path) -> None:
    oracle = importlib.import_module(f"tests.oracle.{model_type}")
    assert VARIANTS[model_type]
    for name, write in VARIANTS[model_type].items():
        folder = write(tmp_path / name)
        expected = oracle.logits(folder, IDS)
        assert expected.std() > 0.5, "logits must differ enough to tell decoders apart"
        np.testing.assert_allclose(logits(open_checkpoint(folder), IDS), expected, atol=LOGIT_TOLERANCE, err_msg=name)


@pytest.mark.parametrize("chunk", [1, 4, 20, 21, 64])
def test_chunks_see_their_past(tmp_path: Path, chunk: int) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path))
    np.testing.assert_allclose(
        logits(checkpoint, IDS, chunk), logits(checkpoint, IDS), atol=SAME_WEIGHTS_TOLERANCE
    )  # fmt: skip


def test_batch_rows_are_independent(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path))
    both = np.stack([IDS, IDS[::-1]])
    result = eager_logits(checkpoint.config, lambda name: checkpoint.tensor(name).load(), both)
    for row, ids in zip(result, both, strict=True):
        np.testing.assert_allclose(row, logits(checkpoint, ids), atol=SAME_WEIGHTS_TOLERANCE)


def test_each_weight_is_asked_for_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path))
    asked: list[str] = []

    def weights(name: str) -> np.ndarray:
        asked.append(name)
        return checkpoint.tensor(name).load()

    eager_logits(checkpoint.config, weights, IDS[None], chunk=5)
    assert sorted(asked) == sorted(checkpoint.names)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_canonical_names_are_the_decoders(model_type: str, tmp_path: Path) -> None:
    name, write = next(iter(VARIANTS[model_type].items()))
    checkpoint = open_checkpoint(write(tmp_path / name))
    assert list(checkpoint.names) == list(weight_table(checkpoint.config))


def test_llama_rewritten_as_baichuan_is_the_same_model(tmp_path: Path) -> None:
    original = open_checkpoint(write_gguf(tmp_path / "model.gguf", tied=True, type="Q4_1"))
    rewritten = open_checkpoint(rewrite_as_baichuan(original, tmp_path / "baichuan", shards=3))
    assert rewritten.config.num_kv_heads == rewritten.config.num_heads
    np.testing.assert_allclose(logits(rewritten, IDS), logits(original, IDS), atol=SAME_WEIGHTS_TOLERANCE)


@pytest.mark.shared
def test_a_real_baichuan2_equals_its_oracle(shared_data: Path) -> None:
    folder = shared_data / "tiny-baichuan2"
    ids = np.random.default_rng(0).integers(3, 64000, 24)
    expected = baichuan_oracle.logits(folder, ids)
    checkpoint = open_checkpoint(folder)
    np.testing.assert_allclose(logits(checkpoint, ids), expected, atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(logits(checkpoint, ids, chunk=7), expected, atol=LOGIT_TOLERANCE)


@pytest.mark.embedded
def test_the_embedded_model_knows_its_alphabet(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    ids = [tokens.index(f"Ġ{letter}") for letter in "ABCDEFGH"]
    result = logits(checkpoint, ids)
    assert np.isfinite(result).all()
    assert tokens[int(result[-1].argmax())] == "ĠI"
