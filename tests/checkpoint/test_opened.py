"""Opening checkpoints: every layout gives the same weights; every bad input is one clear line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from headrace.checkpoint import open_checkpoint
from headrace.errors import CheckpointError, ConfigError, UserError
from tests.tiny import (
    MAX_POSITIONS,
    MLP,
    OUTPUT,
    QKV,
    write_baichuan,
    write_gguf,
    write_llama,
    write_mistral,
    write_qwen2,
)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def all_weights(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(name).load() for name in checkpoint.names}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_layout_gives_the_same_weights(tmp_path: Path, dtype: str) -> None:
    expected = all_weights(write_llama(tmp_path / "one", dtype=dtype))
    layouts = [
        write_llama(tmp_path / "sharded", dtype=dtype, shards=3),
        write_llama(tmp_path / "bin", dtype=dtype, format="bin"),
        write_llama(tmp_path / "bins", dtype=dtype, format="bin", shards=2),
        write_gguf(tmp_path / "model.gguf", type={"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]),
    ]
    for path in layouts:
        weights = all_weights(path)
        assert list(weights) == list(expected)
        for name, weight in weights.items():
            if path.suffix == ".gguf" and weight.ndim == 1:
                continue  # the GGUF keeps norms in float32
            np.testing.assert_array_equal(weight, expected[name], err_msg=f"{path.name} {name}")
            assert weight.dtype == np.float32


def test_dtype_is_the_stored_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path / "a", dtype="bfloat16"))
    assert {checkpoint.tensor(name).dtype for name in checkpoint.names} == {"bfloat16"}
    quantized = open_checkpoint(write_gguf(tmp_path / "b.gguf", type="Q4_1"))
    assert quantized.tensor("layers.0.mlp.up_proj.weight").dtype == "q4_1"


@pytest.mark.parametrize("kind", ["llama", "baichuan", "bin", "gguf"])
def test_rows_are_rows_of_the_whole(tmp_path: Path, kind: str) -> None:
    write: dict[str, Callable[[], Path]] = {
        "llama": lambda: write_llama(tmp_path / "m", dtype="bfloat16"),
        "baichuan": lambda: write_baichuan(tmp_path / "m", 2),
        "bin": lambda: write_llama(tmp_path / "m", format="bin"),
        "gguf": lambda: write_gguf(tmp_path / "m.gguf", type="Q8_0"),
    }
    checkpoint = open_checkpoint(write[kind]())
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        whole = tensor.load()
        assert whole.shape == tensor.shape
        for start, stop in [(0, 1), (3, 9), (tensor.shape[0] - 2, tensor.shape[0])]:
            np.testing.assert_array_equal(tensor.read(start, stop), whole[start:stop], err_msg=name)


def test_reading_does_not_hand_out_the_mapping(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path))
    checkpoint.tensor("norm.weight").load()[:] = 0
    assert checkpoint.tensor("norm.weight").load().any()


def test_norm_head_has_unit_rows(tmp_path: Path) -> None:
    plain = open_checkpoint(write_baichuan(tmp_path / "v1", 1)).tensor("lm_head.weight").load()
    normal = open_checkpoint(write_baichuan(tmp_path / "v2", 2)).tensor("lm_head.weight").load()
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, rtol=1e-6)  # float32
    np.testing.assert_allclose(plain / np.linalg.norm(plain, axis=1, keepdims=True), normal, rtol=1e-5)  # float32


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    for path in (write_llama(tmp_path / "a", tied=True), write_gguf(tmp_path / "b.gguf", tied=True)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.config.tied_head
        assert checkpoint.tensor("lm_head.weight") is checkpoint.tensor("embed_tokens.weight")


@pytest.mark.parametrize("changed", [None, 0, -1])
def test_a_stored_head_is_tied_only_if_it_is_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: int | None
) -> None:
    """Values decide, as in transformers 5; they are compared a stretch at a time, here of 7 rows."""
    monkeypatch.setattr("headrace.checkpoint.tensor._ROWS", 7)
    folder = write_llama(tmp_path, tied=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    if changed is not None:
        head[changed, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tied_head == (changed is None)
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight").load(), head)
    np.testing.assert_array_equal(checkpoint.tensor("embed_tokens.weight").load(), tensors["model.embed_tokens.weight"])
    assert ("ties head and embedding, but they differ" in caplog.text) == (changed is not None)


def test_folder_and_gguf_state_the_same_geometry(tmp_path: Path) -> None:
    folder, file = write_llama(tmp_path / "a"), write_gguf(tmp_path / "b.gguf")
    assert open_checkpoint(folder).config == open_checkpoint(file).config


BAICHUAN2 = {"vocab": 125_696, "hidden": 16, "heads": 2, "ffn": 24, "layers": 1}  # what tells the generation


@pytest.mark.parametrize("kind", ["llama with biases", "qwen2", "baichuan", "baichuan2"])
def test_a_gguf_of_any_architecture_is_its_folder(tmp_path: Path, kind: str) -> None:
    """The converter interleaves q and k of some, takes W_pack apart, and leaves Baichuan2's head as it was."""
    folder, file = tmp_path / "folder", tmp_path / "model.gguf"
    if kind == "llama with biases":
        write_llama(folder, attention_bias=True, mlp_bias=True)
        write_gguf(file, biases=(*QKV, *OUTPUT, *MLP))
    elif kind == "qwen2":
        write_qwen2(folder)
        write_gguf(file, architecture="qwen2", biases=QKV)
    else:
        shape = BAICHUAN2 if kind == "baichuan2" else {"hidden": 64, "heads": 4}
        write_baichuan(folder, 2 if kind == "baichuan2" else 1, **shape)
        heads = {"kv_heads": shape["heads"], "head_dim": shape["hidden"] // shape["heads"]}
        write_gguf(file, architecture="baichuan", **shape, **heads)
    ours, theirs = open_checkpoint(file).config, open_checkpoint(folder).config
    assert replace(ours, rope_theta=theirs.rope_theta, rms_norm_eps=theirs.rms_norm_eps) == theirs
    expected = all_weights(folder)
    for name, weight in all_weights(file).items():
        np.testing.assert_array_equal(weight, expected[name], err_msg=name)


@pytest.mark.parametrize(("vocab", "second"), [(64_000, False), (64_256, False), (125_696, True), (125_760, True)])
def test_a_vocabulary_with_tokens_of_its_own_is_of_the_nearer_generation(
    tmp_path: Path, vocab: int, second: bool
) -> None:
    shape = BAICHUAN2 | {"vocab": vocab}
    path = write_gguf(tmp_path / "m.gguf", architecture="baichuan", **shape, kv_heads=2, head_dim=8)
    head = open_checkpoint(path).tensor("lm_head.weight").read(0, 4)
    assert np.allclose(np.linalg.norm(head, axis=1), 1) == second


def test_a_head_that_is_normalised_already_stays(tmp_path: Path) -> None:
    """Some converters wrote Baichuan2's head normalised: dividing by 1 changes nothing that float32 would show."""
    folder = write_baichuan(tmp_path, 2)
    once = all_weights(folder)["lm_head.weight"]
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": once}, folder / "model.safetensors")
    np.testing.assert_allclose(all_weights(folder)["lm_head.weight"], once, rtol=1e-6)


def test_a_window_ends_the_context(tmp_path: Path) -> None:
    """Attention has no window here: up to its length it is the same, so the context is no longer."""
    windowed = open_checkpoint(write_mistral(tmp_path / "m", sliding_window=128)).config
    assert (windowed.max_context, windowed.sliding_window) == (128, 128)
    wide = open_checkpoint(write_mistral(tmp_path / "w", sliding_window=MAX_POSITIONS)).config
    assert (wide.max_context, wide.sliding_window) == (MAX_POSITIONS, None)
    assert open_checkpoint(write_mistral(tmp_path / "n")).config.max_context == MAX_POSITIONS
    folder = write_mistral(tmp_path / "d", max_position_embeddings=32768)
    edit_config(folder, sliding_window=...)
    assert open_checkpoint(folder).config.max_context == 4096, "MistralConfig's default window"
    assert open_checkpoint(write_qwen2(tmp_path / "q")).config.max_context == MAX_POSITIONS


@pytest.mark.parametrize(
    ("changes", "slides"),
    [
        ({}, False),  # the writer's 3 layers and max_window_layers 21
        ({"max_window_layers": 3}, False),
        ({"max_window_layers": 2}, True),
        ({"max_window_layers": 0}, True),
        ({"max_window_layers": ...}, False),
        ({"max_window_layers": ..., "num_hidden_layers": 29}, True),
        ({"max_window_layers": 0, "sliding_window": None}, False),
        ({"max_window_layers": 0, "layer_types": ["full_attention"] * 3}, False),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, True),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, False),
    ],
)
def test_a_window_of_no_layer_does_not_end_the_context(tmp_path: Path, changes: dict[str, Any], slides: bool) -> None:
    folder = write_qwen2(tmp_path / "m", layers=changes.get("num_hidden_layers", 3), use_sliding_window=True)
    edit_config(folder, **changes)
    config = open_checkpoint(folder).config
    assert (config.max_context, config.sliding_window) == ((32, 32) if slides else (MAX_POSITIONS, None))


def test_provenance(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path / "a", shards=2))
    assert [file.name for file in checkpoint.files] == [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert checkpoint.generation_config["eos_token_id"] == 2
    before = checkpoint.digest()
    assert before == open_checkpoint(Path(shutil.copytree(tmp_path / "a", tmp_path / "copy"))).digest()
    shard = checkpoint.files[3]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert checkpoint.digest() != before


def test_a_folder_with_one_gguf_is_that_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    assert open_checkpoint(tmp_path).path == file
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="name one of them"):
        open_checkpoint(tmp_path)


def test_metadata_is_the_headers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf"))
    assert checkpoint.metadata["tokenizer.ggml.tokens"][7] == "<7>"
    assert checkpoint.metadata["tokenizer.ggml.model"] == "llama"
    assert "tokenizer.chat_template" not in checkpoint.metadata
    assert len(checkpoint.metadata) == len(list(checkpoint.metadata))


# Bad input: what is done to a good folder, and what the one line must say.
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json and no .gguf"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
    "misspelt model": (lambda f: edit_config(f, model_type="lama"), "mistral, qwen2; did you mean 'llama'"),
    "no model_type": (lambda f: edit_config(f, model_type=...), "model_type None is not known"),
    "no layers": (lambda f: edit_config(f, num_hidden_layers=...), "has no num_hidden_layers"),
    "text for a number": (lambda f: edit_config(f, hidden_size="64"), "hidden_size is '64'"),
    "huge layers": (lambda f: edit_config(f, num_hidden_layers=2_000_000_000), "2000000000 layers, but has 30"),
    "layer missing": (lambda f: edit_config(f, num_hidden_layers=4), r"lacks tensor 'model.layers.3.input_layernorm"),
    "layer too many": (lambda f: edit_config(f, num_hidden_layers=2), "'model.layers.2.input_layernorm.weight', which"),
    "wrong shape": (lambda f: edit_config(f, vocab_size=161), r"shape \[160, 64\]; expected \[161, 64\]"),
    "biases missing": (lambda f: edit_config(f, attention_bias=True), r"lacks tensor .*\.q_proj\.bias"),
    "bias is a word": (lambda f: edit_config(f, mlp_bias="yes"), "mlp_bias is 'yes'; expected true or false"),
    "other activation": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "yarn": (lambda f: edit_config(f, rope_scaling={"rope_type": "yarn"}), "rope_scaling 'yarn' is not supported"),
    "no factor": (lambda f: edit_config(f, rope_scaling={"type": "linear"}), "factor is 0.0; expected"),
    "scaling is a word": (lambda f: edit_config(f, rope_scaling="linear"), "expected an object or null"),
    "factors cross": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "llama3", "factor": 8, "low_freq_factor": 4.0}),
        "is not below high_freq_factor",
    ),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "is missing; expected",
    ),
    "huge config": (lambda f: os.truncate(f / "config.json", 1 << 30), "has 1073741824 bytes; expected at most"),
    "theta is infinite": (lambda f: edit_config(f, rope_theta=float("inf")), "finite number"),
    "tied is a word": (lambda f: edit_config(f, tie_word_embeddings="no"), "expected true or false"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights; expected model.safetensors or"),
    "heads do not divide": (lambda f: edit_config(f, head_dim=None, num_attention_heads=5), "not a multiple"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD_FOLDERS))
def test_bad_folder(tmp_path: Path, case: str) -> None:
    damage, message = BAD_FOLDERS[case]
    folder = write_llama(tmp_path / "model")
    open_checkpoint(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 5120}, "13B"),
        ({"position_embedding": "ALIBI"}, "ALiBi"),
        ({"architectures": ["BaichuanForCasualLM"]}, "did you mean 'BaichuanForCausalLM'"),
        ({"architectures": ...}, "architectures is None"),
        ({"num_attention_heads": 5}, "not a multiple"),
    ],
)
def test_bad_baichuan(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_baichuan(tmp_path, 2)
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(folder)


def test_a_norm_head_is_never_the_embedding(tmp_path: Path) -> None:
    folder = write_baichuan(tmp_path, 2)
    edit_config(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    for head in ({}, {"lm_head.weight": tensors["model.embed_tokens.weight"]}):
        rest = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        save_file(rest | head, folder / "model.safetensors")
        with pytest.raises(ConfigError, match="NormHead is never the embedding"):
            open_checkpoint(folder)


def test_baichuan_context_and_rope_base_have_fallbacks(tmp_path: Path) -> None:
    folder = write_baichuan(tmp_path, 2)
    edit_config(folder, max_position_embeddings=..., model_max_length=777)
    config = open_checkpoint(folder).config
    assert (config.max_context, config.rope_theta) == (777, 10000.0)


def test_newer_rope_parameters(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    edit_config(folder, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 1234.0})
    assert open_checkpoint(folder).config.rope_theta == 1234.0


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_unknown_weight_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean 'norm.weight'"):
        open_checkpoint(write_llama(tmp_path)).tensor("norms.weight")
