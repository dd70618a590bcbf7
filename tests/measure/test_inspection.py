"""inspect: what it says is what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from headrace.errors import UserError
from headrace.measure.inspection import inspect_path
from tests.exports import CONTEXT, LAYERS, Exports
from tests.tiny import write_gguf, write_llama, write_mistral, write_qwen2


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint(tmp_path: Path, tied: bool) -> None:
    folder = write_llama(tmp_path / "c", tied=tied, dtype="bfloat16")
    report = inspect_path(folder)
    tensors = load_file(folder / "model.safetensors")
    summary = report["summary"]
    assert summary["kind"] == "checkpoint"
    assert summary["parameters"] == sum(t.size for t in tensors.values())
    assert summary["heads"] == "4 of 16, 2 for keys and values"
    assert summary["head"] == ("tied to the embedding" if tied else "its own")
    assert summary["rope base"] == "50000"
    assert report["precisions"] == [("bfloat16", len(tensors), sum(t.nbytes for t in tensors.values()))]
    assert {t["name"] for t in report["tensors"]} == {n.removeprefix("model.") for n in tensors}


def test_scaling_is_shown(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "c", rope_scaling={"type": "linear", "factor": 2.0})
    assert inspect_path(folder)["summary"]["rope base"] == "50000, linear scaling"


def test_biases_and_windows_are_told(tmp_path: Path) -> None:
    qwen = inspect_path(write_qwen2(tmp_path / "q"))["summary"]
    assert qwen["biases"] == "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
    mistral = inspect_path(write_mistral(tmp_path / "m", sliding_window=128))["summary"]
    assert mistral["context"] == "128, its sliding window" and "biases" not in mistral


def test_a_gguf(tmp_path: Path) -> None:
    report = inspect_path(write_gguf(tmp_path / "m.gguf", type="Q4_1"))
    by_type = {name: (count, size) for name, count, size in report["precisions"]}
    assert set(by_type) == {"float32", "q4_1"}
    elements = 2 * 160 * 64 + 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert by_type["q4_1"] == (2 + 3 * 7, elements * 5 // 8)


@pytest.mark.parametrize(("kind", "block"), [("gqa", None), ("tied", 16), ("mha", 32)])
def test_a_bundle(exports: Exports, kind: str, block: int | None) -> None:
    path = exports.bundle(kind, **({"block": block} if block else {}))
    report = inspect_path(path)
    summary = report["summary"]
    assert summary["kind"] == "bundle"
    assert summary["exported context"] == str(CONTEXT)
    assert summary["parts"] == 5
    assert summary["recipe"] == "w4a16"
    per_token = 2 * LAYERS * (4 if kind == "mha" else 2) * 16
    assert summary["KV cache"] == f"int8, {per_token} bytes a token"
    stored: dict[str, int] = {}
    tables = ("embed_tokens", "lm_head")
    for file in (path / "weights").iterdir():
        for name, tensor in load_file(file).items():
            if not name.endswith("layernorm.weight") and name != "norm.weight":
                key = "int8 channel" if name.startswith(tables) else f"int4 {f'block {block}' if block else 'channel'}"
                stored[key] = stored.get(key, 0) + tensor.nbytes
    assert {name: size for name, _, size in report["precisions"]} == stored
    assert len(report["tensors"]) == LAYERS * 7 + (1 if kind == "tied" else 2)


def test_a_bundle_of_every_width(exports: Exports) -> None:
    report = inspect_path(exports.bundle(recipe=exports.mixed("lpbq"), parts=3))
    sizes = {name: (count, size) for name, count, size in report["precisions"]}
    assert set(sizes) == {
        "int4 block 16", "int5 block 16", "int5 block 32", "int6 block 16", "int6 block 32", "int8 channel",
    }  # fmt: skip
    # Of each row 4 bits a column, 16 bytes of high bits for 64, half a byte a block's factor, and a scale.
    shapes = [t["shape"] for t in report["tensors"] if t["precision"] == "int6 block 32"]
    expected = sum(rows * (columns // 2 + -(-columns // 64) * 16 + -(-columns // 64) + 2) for rows, columns in shapes)
    assert sizes["int6 block 32"] == (len(shapes), expected)


def test_neither(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json and no \.gguf file"):
        inspect_path(tmp_path)
