"""Folders as people have them: every layout that holds the whole model opens, any other says why not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from headrace.checkpoint import open_checkpoint
from headrace.errors import CheckpointError, ConfigError, UserError
from tests.checkpoint.torch_writer import Stored, write_legacy, write_zip
from tests.tiny import write_baichuan, write_gguf, write_llama

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4965799096\n"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; `...` removes one."""
    value = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_config(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", **changes)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """The single safetensors file with other tensors."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path)


def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {change(name): t for name, t in tensors.items()})


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k not in names})


def drop_from_index(folder: Path, *names: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in names}
    path.write_text(json.dumps(index))


def add_to_shard(folder: Path, shard: str, **tensors: np.ndarray) -> None:
    save_file({k: v.copy() for k, v in load_file(folder / shard).items()} | tensors, folder / shard)


def as_bin(folder: Path, write: Callable[[Path, Any], Path] = write_zip, **extra: Stored) -> None:
    """The weights as one pytorch_model.bin, wrapped in Parameters, with `extra` beside them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin", {k: Stored(v, parameter=True) for k, v in tensors.items()} | extra)


def as_bins(folder: Path) -> None:
    """Each shard as a pytorch_model-0000N-of-00002.bin; the index goes."""
    (folder / "model.safetensors.index.json").unlink()
    for name in (FIRST, SECOND):
        tensors = load_file(folder / name)
        (folder / name).unlink()
        path = folder / name.replace("model", "pytorch_model").replace("safetensors", "bin")
        write_legacy(path, {k: Stored(v) for k, v in tensors.items()})


GOOD: dict[str, tuple[int, Callable[[Path], Any]]] = {  # name → shards, what is done to the folder
    "bin shards without an index": (2, as_bins),
    "the original format beside": (2, lambda f: (f / "consolidated.safetensors").write_bytes(b"x")),
    "a byte order mark": (
        1, lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
    ),
    "index forgets a tensor": (2, lambda f: drop_from_index(f, "model.norm.weight", "lm_head.weight")),
    "index forgets a shard": (
        2, lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"model.norm.weight": FIRST}),
    ),
    "index lists what no shard has": (
        2, lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"a.rotary_emb.inv_freq": FIRST}),
    ),
    "no index": (2, lambda f: (f / "model.safetensors.index.json").unlink()),
    "shards of another name": (
        2,
        lambda f: [
            (f / "model.safetensors.index.json").unlink(),
            *((f / name).rename(f / name.replace("model-", "tiny-llama-")) for name in (FIRST, SECOND)),
        ],
    ),
    "index of another format, too": (
        2, lambda f: edit_json(f / "pytorch_model.bin.index.json", weight_map={"a": "pytorch_model-00001-of-1.bin"}),
    ),
    "only the other format's shards": (
        1,
        lambda f: [
            as_bin(f), edit_json(f / "model.safetensors.index.json", weight_map={"a": FIRST}),
        ],
    ),
    "a single file and an index": (
        1, lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"a": FIRST}),
    ),
    "another name": (1, lambda f: (f / "model.safetensors").rename(f / "tiny.fp32.safetensors")),
    "another name, and an optimizer": (
        1,
        lambda f: [
            as_bin(f), (f / "pytorch_model.bin").rename(f / "tiny.pt"), (f / "optimizer.pt").write_bytes(b"x"),
            (f / "training_args.bin").write_bytes(b"x"), (f / "rng_state_0.pth").write_bytes(b"x"),
        ],
    ),
    "a tensor in two shards": (2, lambda f: [
        add_to_shard(f, FIRST, **{n: t.copy() for n, t in load_file(f / SECOND).items() if n == "lm_head.weight"}),
        add_to_shard(f, SECOND, **{n: t.copy() for n, t in load_file(f / FIRST).items() if n == "model.norm.weight"}),
    ]),
    "compiled": (1, rename(lambda name: f"_orig_mod.{name}")),
    "data parallel": (1, rename(lambda name: f"module.{name}")),
    "rotary tables and positions": (
        1,
        lambda f: rewrite(f, lambda t: t | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float64),
            "model.rotary_emb.original_inv_freq": np.ones(8, np.float32),
            "model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 9, 16), np.float32),
            "model.position_ids": np.arange(9)[None],
            "model.causal_mask": np.ones((9, 9), bool),
        }),
    ),
    "bin with parameters and unused buffers": (
        1,
        lambda f: as_bin(f, **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": Stored(np.ones(8)), "steps": Stored(np.arange(3)),
        }),
    ),
    "bin of an old torch": (1, lambda f: as_bin(f, write_legacy)),
    "float64": (1, lambda f: rewrite(f, lambda t: {k: v.astype(np.float64) for k, v in t.items()})),
    "quantization section, plain weights": (
        1, lambda f: edit_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ),
    "null head sizes": (1, lambda f: edit_config(f, hidden_act=None, attention_bias=None)),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_the_same_weights(tmp_path: Path, case: str) -> None:
    shards, change = GOOD[case]
    expected = open_checkpoint(write_llama(tmp_path / "plain"))
    folder = write_llama(tmp_path / "model", shards=shards)
    change(folder)
    found = open_checkpoint(folder)
    assert found.config == expected.config
    assert found.names == expected.names
    for name in found.names:
        np.testing.assert_array_equal(found.tensor(name).load(), expected.tensor(name).load(), err_msg=name)


@pytest.mark.parametrize("meant", [FIRST, SECOND])
def test_of_two_copies_the_index_says_which(tmp_path: Path, meant: str) -> None:
    folder = write_llama(tmp_path, shards=2)
    for number, shard in enumerate((FIRST, SECOND)):
        add_to_shard(folder, shard, **{"model.norm.weight": np.full(64, number + 1, np.float32)})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = meant
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = 1 + (meant == SECOND)
    np.testing.assert_array_equal(open_checkpoint(folder).tensor("norm.weight").load(), np.full(64, expected))


def test_a_tied_model_may_be_stored_as_its_head(tmp_path: Path) -> None:
    expected = open_checkpoint(write_llama(tmp_path / "plain", tied=True))
    folder = write_llama(tmp_path / "model", tied=True)
    rename(lambda name: name.replace("model.embed_tokens", "lm_head"))(folder)
    found = open_checkpoint(folder)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found.tensor(name).load(), expected.tensor(name).load())


def test_a_decoder_saved_without_its_language_model(tmp_path: Path) -> None:
    expected = open_checkpoint(write_llama(tmp_path / "plain", tied=True))
    folder = write_llama(tmp_path / "model", tied=True)
    rename(lambda name: name.removeprefix("model."))(folder)
    found = open_checkpoint(folder)
    np.testing.assert_array_equal(found.tensor("norm.weight").load(), expected.tensor("norm.weight").load())
    untied = write_llama(tmp_path / "untied")
    without("lm_head.weight")(untied)
    with pytest.raises(CheckpointError, match=r"lacks tensor 'lm_head.weight' .* does not tie it to the embedding"):
        open_checkpoint(untied)


def test_bfloat16_shards(tmp_path: Path) -> None:
    one, two = (write_llama(tmp_path / str(n), dtype="bfloat16", shards=n) for n in (1, 3))
    for name in open_checkpoint(one).names:
        np.testing.assert_array_equal(
            open_checkpoint(two).tensor(name).load(), open_checkpoint(one).tensor(name).load()
        )


def test_a_gguf_beside_a_config_is_the_model(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    write_gguf(folder / "tiny.gguf")
    assert open_checkpoint(folder).path == folder / "tiny.gguf"


CODES = np.zeros((8, 8), np.int32)
LINEAR = "model.layers.0.mlp.up_proj"


def coded(section: dict[str, Any], dtype: Any = np.int32, *endings: str) -> Callable[[Path], None]:
    """A folder whose linears are codes."""

    def change(folder: Path) -> None:
        edit_config(folder, **section)
        rewrite(folder, lambda tensors: tensors | {f"{LINEAR}.{ending}": CODES.astype(dtype) for ending in endings})

    return change


QUANTIZED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gptq": (
        coded({"quantization_config": {"quant_method": "gptq", "bits": 4}}, np.int32, "qweight", "qzeros", "g_idx"),
        r"\(gptq, 4 bits\)",
    ),
    "gptq without a section": (coded({}, np.int32, "qweight", "g_idx"), r"\(gptq\)"),
    "awq": (
        coded({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, np.int32, "qweight", "qzeros"),
        r"\(awq, 4 bits\)",
    ),
    "bitsandbytes, 4 bits": (
        coded({"quantization_config": {"load_in_4bit": True}}, np.uint8, "weight", "weight.absmax"),
        r"\(bitsandbytes, 4 bits, tensors of uint8\)",
    ),
    "bitsandbytes, 8 bits": (
        coded({"quantization_config": {"load_in_8bit": True}}, np.int8, "weight", "SCB"),
        r"\(bitsandbytes, tensors of int8\)",
    ),
    "compressed-tensors": (
        coded({"quantization_config": {"quant_method": "compressed-tensors"}}, np.int32, "weight_packed"),
        r"\(compressed-tensors\)",
    ),
    "fp8": (
        coded({"quantization_config": {"quant_method": "fp8"}}, ml_dtypes.float8_e4m3fn, "weight"),
        r"\(fp8, tensors of float8_e4m3fn\)",
    ),
    "fp8 without a section": (coded({}, ml_dtypes.float8_e5m2, "weight"), r"\(.*, tensors of float8_e5m2\)"),
    "mlx": (coded({"quantization": {"bits": 4}}, np.uint32, "weight", "scales"), r"\(mlx or gptq, 4 bits, .*uint32\)"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_already_quantized(tmp_path: Path, case: str) -> None:
    change, message = QUANTIZED[case]
    folder = write_llama(tmp_path)
    change(folder)
    with pytest.raises(CheckpointError, match=rf"is already quantized {message}; expected the model's own floats"):
        open_checkpoint(folder)


def emptied(folder: Path, *names: str) -> None:
    """Without weights, but with other files."""
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")


def moved(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (lambda f: (f / "model.safetensors").write_text(LFS), "a git-lfs pointer.*; run: git lfs pull$"),
    "pointer config": (lambda f: (f / "config.json").write_text(LFS), "config.json is a git-lfs pointer.*git lfs pull"),
    "pointer bin": (
        lambda f: [emptied(f), (f / "pytorch_model.bin").write_text(LFS)], "a git-lfs pointer.*; run: git lfs pull$",
    ),
    "a page": (lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html><p>Sign in"), "is a page of HTML"),
    "a hub's answer": (lambda f: (f / "config.json").write_text("Entry not found"), "'entry not found' …"),
    "a pipe": (lambda f: [emptied(f), __import__("os").mkfifo(f / "model.safetensors")], "is no file"),
    "a folder": (lambda f: [emptied(f), (f / "model.safetensors").mkdir()], "is no file"),
    "one shard of two": (lambda f: moved(f, FIRST), "model-00002-of-00002.safetensors is missing, although"),
    "too many shards": (lambda f: moved(f, "m-00001-of-99999.safetensors"), "one of 99999 files; expected 1 to"),
    "two models": (
        lambda f: [shutil.copy(f / "model.safetensors", f / "a.safetensors"), moved(f, "b.safetensors")],
        r"2 .safetensors files \(a.safetensors, b.safetensors\) and no index",
    ),
    "adapter": (lambda f: emptied(f, "adapter_model.safetensors", "adapter_config.json"), "a LoRA adapter; give the"),
    "trainer's folder": (lambda f: emptied(f, "checkpoint-5/x", "checkpoint-10/x"), "are in checkpoint-10: name that"),
    "consolidated": (lambda f: emptied(f, "consolidated.safetensors"), "original format of Meta and Mistral"),
    "deepspeed": (lambda f: emptied(f, "global_step10/x", "zero_to_fp32.py"), "run its zero_to_fp32.py"),
    "fsdp": (lambda f: emptied(f, "__0_0.distcp"), "accelerate merge-weights"),
    "tensorflow": (lambda f: emptied(f, "tf_model.h5"), r"tf_model.h5 \(TensorFlow's\), which is not read"),
    "onnx": (lambda f: emptied(f, "model.onnx"), "an ONNX graph"),
    "several gguf": (lambda f: emptied(f, "a.gguf", "b.gguf"), r"2 .gguf files \(a.gguf, b.gguf\).*name one of them"),
    "params.json": (lambda f: [(f / "config.json").rename(f / "params.json")], "original format of Meta and Mistral"),
    "not merged": (rename(lambda n: n.replace("up_proj.", "up_proj.base_layer.")), "an adapter that is not merged"),
    "integer weight": (
        lambda f: rewrite(f, lambda t: t | {"model.norm.weight": np.ones(64, np.int64)}), "already quantized.*int64",
    ),
    "shapes of two shards": (
        lambda f: [add_to_shard(f, "model.safetensors"), moved(f, FIRST),
                   save_file({"lm_head.weight": np.ones((2, 2), np.float32)}, f / SECOND)],
        "expected the shards of one model",
    ),
    "two tensors of one name": (
        lambda f: (f / "model.safetensors").write_bytes(twice(f / "model.safetensors")), "a key stands twice",
    ),
    "a model with images": (
        lambda f: edit_config(f, model_type="llava", text_config={"model_type": "llama"}),
        r"model_type 'llava' is a 'llama' language model inside another model \(text_config\)",
    ),
}  # fmt: skip


def twice(path: Path) -> bytes:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = b'{"lm_head.weight":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
    header = entry + data[9 : 8 + length]
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.parametrize("case", BAD)
def test_one_line_says_why_not(tmp_path: Path, case: str) -> None:
    damage, message = BAD[case]
    folder = write_llama(tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_file_of_a_folder_is_answered_with_the_folder(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    with pytest.raises(CheckpointError, match=f"is one file of a model; expected its folder; name {folder}"):
        open_checkpoint(folder / "model.safetensors")


def test_a_file_without_its_config_is_answered_with_what_lacks(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model") / "model.safetensors"
    path.with_name("config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected its folder; fetch config.json and name .*model$"):
        open_checkpoint(path)


def test_a_hubs_cache_is_answered_with_its_snapshot(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--tiny"
    folder = write_llama(cache / "snapshots" / "abc")
    with pytest.raises(CheckpointError, match=f"is a hub's cache.* name {folder}"):
        open_checkpoint(cache)


# The config


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"max_position_embeddings": ...}, 2048),
        ({"max_position_embeddings": None}, 2048),
        ({"max_position_embeddings": ..., "max_sequence_length": 777}, 777),
    ],
)
def test_a_context_that_is_not_stated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], context: int
) -> None:
    folder = write_llama(tmp_path)
    edit_config(folder, **changes)
    with caplog.at_level(logging.WARNING, "headrace"):
        assert open_checkpoint(folder).config.max_context == context
    (record,) = caplog.records
    assert f"has no max_position_embeddings; taken as {context};" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_stated_context_is_not_talked_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_checkpoint(write_llama(tmp_path))
    assert not caplog.records


def test_null_head_sizes_are_derived(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, kv_heads=4)
    edit_config(folder, head_dim=None, num_key_value_heads=None)
    config = open_checkpoint(folder).config
    assert (config.head_dim, config.num_kv_heads) == (16, 4)
    baichuan = write_baichuan(tmp_path / "b")
    edit_config(baichuan, max_position_embeddings=..., model_max_length=...)
    assert open_checkpoint(baichuan).config.max_context == 4096


ROPE: dict[str, tuple[dict[str, Any], str | tuple[float, str | None]]] = {
    "older linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, (50000.0, "linear")),
    "both names": ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}}, (50000.0, "linear")),
    "null type": ({"rope_scaling": {"rope_type": None}}, (50000.0, None)),
    "parameters": (
        {"rope_theta": ..., "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e5}},
        (7e5, "linear"),
    ),
    "both": (
        {
            "rope_theta": 7e5, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e5},
            "rope_scaling": {"type": "linear", "factor": 4},
        },
        (7e5, "linear"),
    ),
    "two kinds": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "rope_parameters and rope_scaling state different scalings; expected one;",
    ),
    "two factors": (
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        "rope_parameters and rope_scaling state different scalings; expected one;",
    ),
    "the older is not supported": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}}, "'yarn' is not supported",
    ),
    "two bases": ({"rope_theta": 5e4, "rope_parameters": {"rope_theta": 7e5}}, "is 50000 in config.json and 700000 in"),
    "two bases, both newer": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 7e5}, "rope_scaling": {"rope_theta": 1e6}},
        r"rope_theta is 700000 in rope_parameters and 1e\+06 in rope_scaling; expected one value;",
    ),
    "theta is null": ({"rope_theta": None}, (10000.0, None)),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        "rope_scaling 'yarn' is not supported.*not trained with it is right without it up to 32768 tokens: for those,",
    ),
    "dynamic": (
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' is.*changes nothing up to 512 tokens: to",
    ),
    "longrope": ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "'longrope' is not supported"),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}}, "'mrope' is not supported"),
    "hidden mrope": ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1]}}, "'mrope' is not supported"),
    "mrope of both names": ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "'mrope' is not supported"),
    "by layer": ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "differ by layer"),
    "a part of a head": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    "a part, older": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    "a number beyond floats": ({"rope_theta": 10**400}, "rope_theta is 1000.*0; expected a finite number"),
    "a list": ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling \['yarn'\] is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPE)
def test_rope_is_read_or_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, expected = ROPE[case]
    folder = write_llama(tmp_path)
    edit_config(folder, **changes)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected) as caught:
            open_checkpoint(folder)
        assert "\n" not in str(caught.value)
        return
    config = open_checkpoint(folder).config
    assert (config.rope_theta, config.rope_scaling and config.rope_scaling.kind) == expected
