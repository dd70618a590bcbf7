"""What the options of an export do to the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import headrace
from headrace.bundle.folder import MANIFEST, open_bundle
from headrace.bundle.grid import Grid, dequantize, quantize_nearest
from headrace.checkpoint import open_checkpoint
from headrace.errors import CheckpointError, ConfigError, UserError
from headrace.exporter.job import export
from headrace.exporter.options import read_size
from headrace.model.weights import linears, quantized_weights
from tests.checkpoint.test_lora import ALPHA, RANK, merge, write_adapter
from tests.exports import CONTEXT, LAYERS, PHONE, SMALL, VOCAB, Exports, contents, opened_store, write_checkpoint
from tests.oracle.quantized import is_kept
from tests.tiny import MAX_POSITIONS, rewrite_as_baichuan, write_mistral

# A sum over heads in another order moves float32's last bits, and now and then an int8 activation over a tie.
REWRITTEN_SHARE = 0.02


def test_defaults(exports: Exports, tmp_path: Path) -> None:
    """No option at all: five parts, the model's own context, calibration on the text that any Python has."""
    out = headrace.export(exports.checkpoint("mha"), tmp_path / "out", windows=2, window_length=32)
    bundle = open_bundle(out)
    assert (len(bundle.parts), bundle.prompt_lengths, bundle.contexts) == (5, (128,), (MAX_POSITIONS,))
    assert bundle.recipe.name == "w4a16"
    assert bundle.kv_dtype == "int8"
    assert bundle.config.num_kv_heads == bundle.config.num_heads
    assert bundle.read_json("generation_config.json")["assistant_token_id"] == 196


@pytest.mark.parametrize(
    ("text", "size"),
    [("105000000", 105_000_000), ("105MB", 105_000_000), ("105 mb", 105_000_000), ("5.06GB", 5_060_000_000),
     ("80M", 80_000_000), ("1.5g", 1_500_000_000), ("100MiB", 100 << 20), ("1 GiB", 1 << 30), ("64ki", 64 << 10),
     ("7kB", 7_000), ("7b", 7)],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert read_size("--size", text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "lots", "1TB", "-5MB", "1,5GB", "5 M B", "0x10", "\u0661MB", "1e9", "5iB", "9" * 5000]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--size .* is not possible; expected a number of bytes, such as 105MB"):
        read_size("--size", text)


@pytest.mark.parametrize("option", ["windows", "context"])
def test_whole_numbers_too_long_to_read(run: Any, option: str) -> None:
    with pytest.raises(UserError, match=f"--{option} .*999.* is not possible; expected .*whole number"):
        run(**{option: "9" * 5000})


def test_several_contexts(run: Any) -> None:
    bundle = open_bundle(run(context=[200, 64, 128, 64]))
    assert bundle.contexts == (64, 128, 200)
    assert bundle.context == 200


def test_several_texts_share_the_windows(run: Any, exports: Exports, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("百川东到海，何时复西归？" * 100, encoding="utf-8")
    both = open_bundle(run(calibration=[exports.text, other]))
    one = open_bundle(exports.bundle())
    assert both.kv_scales != one.kv_scales
    asked = both.provenance["options"]["calibration"]
    assert [text["name"] for text in asked] == ["text.txt", "other.txt"]


def test_a_recipe_file(run: Any, tmp_path: Path) -> None:
    rules = [
        {"match": "embed|lm_head", "bits": 8},
        {"match": r"layers\.0\.", "bits": 8},
        {"match": "_proj", "bits": 4, "block": 16},
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "kv": "float32", "rules": rules}))
    bundle = open_bundle(run(recipe=str(path)))
    assert bundle.recipe.name == "mine"
    assert bundle.kv_dtype == "float32"
    shapes = {n: t.shape for f in (bundle.root / "weights").iterdir() for n, t in load_file(f).items()}
    assert shapes["layers.0.mlp.up_proj.weight_packed"] == (96, 64)
    assert shapes["layers.1.mlp.up_proj.weight_packed"] == (96, 32)
    assert shapes["layers.1.mlp.up_proj.weight_scale"] == (96, 4)


TWO_BASES = 0.95  # correlation: int8 rounds other weights, and random ones are sharp; an error in a basis gives none


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_a_rotated_model_is_the_same_model(run: Any, exports: Exports, tmp_path: Path, kind: str) -> None:
    recipe = tmp_path / "eight.json"
    recipe.write_text(json.dumps({"name": "eight", "kv": "float32", "rules": [{"match": ".", "bits": 8}]}))
    plain, turned = (
        open_bundle(
            export(exports.checkpoint(kind), tmp_path / f"{rotate}", **SMALL, calibration=[exports.text],
                   recipe=str(recipe), rotate=rotate)
        )
        for rotate in (False, True)
    )  # fmt: skip
    assert not turned.config.tied_head
    assert (plain.recipe.rotate, turned.recipe.rotate) == (False, True)
    with headrace.load(plain.root) as one, headrace.load(turned.root) as other:
        a, b = one.logits(list(range(3, 60))), other.logits(list(range(3, 60)))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > TWO_BASES
    stored = [load_file(next((bundle.root / "weights").glob("*2_of*"))) for bundle in (plain, turned)]
    name = next(name for name in stored[0] if name.endswith("q_proj.weight_packed"))
    assert (stored[0][name] != stored[1][name]).any()


@pytest.mark.qnn
def test_what_a_device_runs_is_rotated(exports: Exports) -> None:
    assert open_bundle(exports.bundle("phone", **PHONE)).recipe.rotate
    assert not open_bundle(exports.bundle("gqa")).recipe.rotate


def test_a_device_has_a_short_context_beside_the_longest(exports: Exports, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    geometry = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**geometry, "max_position_embeddings": 2048}))
    options = {**SMALL, "context": None, "calibration": [exports.text]}
    assert open_bundle(export(folder, tmp_path / "host", **options)).contexts == (2048,)
    bundle = open_bundle(export(folder, tmp_path / "device", **options, keep_onnx=True))
    assert bundle.contexts == (1024, 2048)
    assert {path.name for path in (bundle.root / "device").glob("*_1_of_5.onnx")} == {
        f"ar{s}_cl{c}_1_of_5.onnx" for s in (32, 1) for c in (1024, 2048)
    }


def test_weights_on_their_grid_are_kept_under_a_budget_and_for_other_tools(exports: Exports, tmp_path: Path) -> None:
    """They cost nothing at 4 bits, so nothing is bought for them; and no rotation takes them off their grid."""
    folder = write_checkpoint(tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "_proj" in name:
            tensors[name] = dequantize(quantize_nearest(tensors[name], Grid(4)))
    save_file(tensors, folder / "model.safetensors")
    options = {**SMALL, "calibration": [exports.text], "method": "gptq"}
    bundle = open_bundle(export(folder, tmp_path / "out", **options, keep_grid=True, bits=5, keep_onnx=True))
    store = opened_store(bundle)
    assert not bundle.recipe.rotate and (bundle.root / "device").exists()
    for name in linears(bundle.config):
        assert is_kept(name, store.read(name), tensors[f"model.{name}"])


def test_a_budget_of_bytes_finds_the_grids_that_weights_lie_on(exports: Exports, tmp_path: Path) -> None:
    """Each weight as a GGUF's quantizer would have left it, one kind on no grid; what is kept is given back exactly."""
    folder = write_checkpoint(tmp_path / "c")
    kinds = {"q_proj": "Q5_0", "k_proj": "Q5_0", "v_proj": "Q8_0", "o_proj": "Q5_0", "gate": "Q4_0", "up": "Q8_0"}
    kinds |= {"embed_tokens": "Q5_0", "lm_head": "Q8_0"}
    grids = {"Q4_0": Grid(4, 32), "Q5_0": Grid(5, 32), "Q8_0": Grid(8, 32)}
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name, tensor in tensors.items():
        if kind := next((kind for part, kind in kinds.items() if part in name), None):
            of = gguf.GGMLQuantizationType[kind]
            tensors[name] = np.asarray(gguf.quants.dequantize(gguf.quants.quantize(tensor, of), of), np.float32)
            expected[name.removeprefix("model.")] = name, grids[kind]
    save_file(tensors, folder / "model.safetensors")
    options = {**SMALL, "calibration": [exports.text], "method": "gptq", "recipe": "w4b32", "keep_grid": True}
    bundle = open_bundle(export(folder, tmp_path / "out", **options, size=10**9))
    store = opened_store(bundle)
    for name in quantized_weights(bundle.config):
        if name in expected:
            theirs, grid = expected[name]
            assert store.grids[name] == grid
            assert is_kept(name, store.read(name), tensors[theirs])
        else:
            assert store.grids[name].bits == 8


def test_a_cache_that_saw_only_zeros(exports: Exports, tmp_path: Path) -> None:
    """A model whose values are all zero still gets a scale above zero."""
    folder = write_checkpoint(tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "v_proj" in name:
            tensors[name] = np.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    bundle = open_bundle(export(folder, tmp_path / "out", **SMALL, calibration=[exports.text]))
    assert all(value > 0 for _, value in bundle.kv_scales)
    with headrace.load(bundle.root) as model:
        assert np.isfinite(model.logits([1, 5, 9])).all()


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_rewritten_as_baichuan_it_is_the_same_model(exports: Exports, tmp_path: Path, kind: str) -> None:
    """W_pack with KV heads repeated, plain head, .bin shards: logits through the host graphs as the original's.

    Rounded to nearest, repeated heads have the original's codes and a row's scale is its own, so only the cache's
    layout differs; calibration sees the same values, so its scales are the same too.
    """
    source = exports.checkpoint(kind)
    rewritten = rewrite_as_baichuan(open_checkpoint(source), tmp_path / "baichuan", shards=3)
    for file in source.glob("tokenizer*"):
        (rewritten / file.name).write_bytes(file.read_bytes())
    out = export(rewritten, tmp_path / "out", **SMALL, calibration=[exports.text])
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["geometry"]["architecture"] == "baichuan"
    assert manifest["geometry"]["num_kv_heads"] == 4
    ids = np.random.default_rng(0).integers(0, VOCAB, CONTEXT - 1).tolist()
    with headrace.load(exports.bundle(kind)) as ours, headrace.load(out) as theirs:
        expected, found = ours.logits(ids), theirs.logits(ids)
    spread = expected.std()
    assert np.abs(expected - found).mean() <= REWRITTEN_SHARE * spread


def test_an_adapter_is_merged_before(exports: Exports, tmp_path: Path) -> None:
    """The same weights as an export of the merged checkpoint; the manifest says which adapter it was."""
    base, modules = exports.checkpoint(), [f"model.layers.{layer}.mlp.up_proj" for layer in range(LAYERS)]
    products = write_adapter(tmp_path / "adapter", base, modules)
    merged = merge(base, tmp_path / "merged", {m: p * np.float32(ALPHA / RANK) for m, p in products.items()})
    (merged / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    options = SMALL | {"calibration": [exports.text]}
    one = export(base, tmp_path / "one", lora=tmp_path / "adapter", **options)
    other = export(merged, tmp_path / "other", **options)
    ours, theirs = contents(one), contents(other)
    assert {n for n in theirs if ours[n] != theirs[n]} <= {"headrace.json", "tokenizer_config.json"}
    assert contents(exports.bundle())["weights/part_2_of_5.safetensors"] != ours["weights/part_2_of_5.safetensors"]
    (said,) = open_bundle(one).provenance["options"]["lora"]
    assert said["name"] == "adapter" and len(said["sha256"]) == 64


def test_a_missing_adapter_is_told_before_anything_is_made(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--lora .*nowhere has no adapter_config.json"):
        export(exports.checkpoint(), tmp_path / "out", lora=tmp_path / "nowhere", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_context_beyond_the_sliding_window_is_refused(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "m", sliding_window=128)
    with pytest.raises(ConfigError, match=r"--context 200 .* made for 1 to 128 tokens, where its sliding window ends"):
        export(folder, tmp_path / "out", parts=2, context=200)
