"""Qwen2.5-Coder-0.5B-Instruct, a real model with biases that speaks Chinese and English: run with `pytest -m qwen`.

Fetches 491 MB once; takes minutes and 4 GB of memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import headrace
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.language_model import LanguageModel
from headrace.model.reference import eager_logits
from headrace.runtime.sampling import SamplingOptions
from tests.oracle import qwen2 as oracle

pytestmark = pytest.mark.qwen

KINDS = ("float32", "q4_k", "q5_0", "q6_k", "q8_0")
LOGIT_TOLERANCE = 2e-3  # float32 against float64 over 24 layers with activations of thousands; logits reach 20


@pytest.fixture(scope="module")
def checkpoint(qwen: Path) -> Checkpoint:
    return open_checkpoint(qwen)


@pytest.fixture(scope="module")
def model(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    out = tmp_path_factory.mktemp("qwen") / "bundle"
    return headrace.load(headrace.export(qwen, out, recipe="w4b32", method="nearest", context=1024))


def test_every_format_is_read_as_the_gguf_package_reads_it(checkpoint: Checkpoint, qwen: Path) -> None:
    seen = set()
    stored = {t.name: t for t in gguf.GGUFReader(qwen).tensors}
    for ours, theirs in (("q_proj.weight", "attn_q.weight"), ("v_proj.weight", "attn_v.weight"),
                         ("v_proj.bias", "attn_v.bias"), ("down_proj.weight", "ffn_down.weight")):  # fmt: skip
        room = "mlp" if "down" in ours else "self_attn"
        for layer in range(checkpoint.config.num_layers):
            tensor, raw = checkpoint.tensor(f"layers.{layer}.{room}.{ours}"), stored[f"blk.{layer}.{theirs}"]
            np.testing.assert_array_equal(tensor.load(), gguf.quants.dequantize(raw.data, raw.tensor_type))
            seen.add(tensor.dtype)
    head = checkpoint.tensor("lm_head.weight")
    raw = stored["output.weight"]
    np.testing.assert_array_equal(head.read(1000, 1100), gguf.quants.dequantize(raw.data[1000:1100], raw.tensor_type))
    assert seen | {head.dtype} == set(KINDS)


def test_the_eager_decoder_equals_the_oracle(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = checkpoint.config
    said = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
    }
    (tmp_path / "config.json").write_text(json.dumps(said))
    names = {name if name == "lm_head.weight" else f"model.{name}": name for name in checkpoint.names}

    class Tensors(dict[str, np.ndarray]):
        def __missing__(self, name: str) -> np.ndarray:
            return checkpoint.tensor(names[name]).load()

        def __contains__(self, name: object) -> bool:
            return name in names

    ids = [100, 2000, 30000, 77, 151, 9000]
    expected = oracle.logits(tmp_path, ids, Tensors())
    found = eager_logits(config, lambda name: checkpoint.tensor(name).load(), np.array([ids]))[0]
    np.testing.assert_allclose(found, expected, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize(
    ("question", "answer"), [("中国的首都是哪里？", "北京"), ("What is the capital of France?", "Paris")]
)
def test_it_answers_in_both_languages(model: LanguageModel, question: str, answer: str) -> None:
    said = "".join(
        token.text for token in model.chat().say(question, max_tokens=40, options=SamplingOptions(temperature=0))
    )
    assert answer in said
