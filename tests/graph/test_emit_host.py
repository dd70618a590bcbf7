"""Host graphs: the eager decoder's numbers, however they are split, fed and cached; weights only pointed to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.bundle.folder import Bundle, open_bundle
from headrace.bundle.grid import Grid
from headrace.errors import RecipeError
from headrace.graph.check import check_graph
from headrace.graph.emit_host import HostWeights, emit_host, kernel_block
from headrace.model.reference import eager_logits
from headrace.model.weights import EMBEDDING
from headrace.plan import GraphStyle, plan_parts, ports
from headrace.runtime.engine import Engine
from headrace.targets.host.runner import HostRunner
from headrace.targets.host.sessions import make_session
from tests.exports import INT8_ACTIVATIONS, LAYERS, VOCAB, Exports, opened_store, re_emitted
from tests.oracle.quantized import forward

IDS = np.random.default_rng(3).integers(0, VOCAB, 150).tolist()
KINDS = ["gqa", "tied", "mha", "wide", "qwen2"]

# Logits of these models reach 20 to 60. float32 sums in another order, through a few layers.
FLOAT_TOLERANCE = 1e-3
# The same operations, but where two parts meet the residual is added before the norm and not in one operator with it.
SPLIT_TOLERANCE = 2e-4
# As above, and a code of the cache on the other side of a tie.
CACHE_TIE_TOLERANCE = 0.1
# A code of the int8 cache may fall on the other side of a tie by float32 rounding; one step of one key or value then
# moves these models' logits, whose attention is far sharper than a trained model's, by up to this share of their
# spread (measured 0.004).
INT8_CACHE_SHARE = 0.05
# int8 activations: 1/254 of a block's largest value, through 4 layers of random weights; share of the logits' spread
# (measured 0.01 … 0.06).
INT8_ACTIVATIONS_SHARE = 0.15
# How far from a half a quotient may be and still round either way: float32 noise of the layers before, in steps.
TIE = 0.02
TIES_SHARE = 0.02  # of all codes


def run(bundle: Bundle, ids: list[int] = IDS, chunk: int | None = None) -> NDArray[np.float32]:
    engine = Engine(HostRunner(bundle))
    logits = engine.score(ids, chunk)
    engine.close()
    return logits


def share(expected: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    """Root mean square of the difference over that of the logits."""
    return float(np.sqrt(np.square(expected - found).mean() / np.square(expected - expected.mean(1)[:, None]).mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_equal_the_eager_decoder(exports: Exports, tmp_path: Path, kind: str) -> None:
    path = exports.bundle(kind, kv="float32", parts=3)
    bundle = re_emitted(path, tmp_path / "float")
    store = opened_store(bundle)
    eager = eager_logits(bundle.config, store.read, np.array([IDS]))[0]
    found = run(bundle)
    assert eager.std() > 0.5
    np.testing.assert_allclose(found, eager, atol=FLOAT_TOLERANCE)
    np.testing.assert_allclose(found[:50], forward(path, IDS[:50], int8_cache=False).logits, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("kv", ["float32", "int8"])
@pytest.mark.parametrize("parts", range(2, LAYERS + 2))
def test_any_split_is_the_same_model(exports: Exports, tmp_path: Path, parts: int, kv: str) -> None:
    path = exports.bundle("gqa", kv=kv, parts=3)
    one, split = (re_emitted(path, tmp_path / str(n), parts=n) for n in (1, parts))
    assert len(split.parts) == parts
    tolerance = SPLIT_TOLERANCE if kv == "float32" else CACHE_TIE_TOLERANCE
    np.testing.assert_allclose(run(split, IDS[:60]), run(one, IDS[:60]), atol=tolerance)


def test_five_parts_are_one_part_as_shipped(exports: Exports) -> None:
    one, five = (open_bundle(exports.bundle("gqa", parts=n)) for n in (1, 5))
    assert len(five.parts) == 5
    assert share(run(one), run(five)) <= INT8_CACHE_SHARE


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_is_token_by_token_with_a_float_cache(exports: Exports, tmp_path: Path, kind: str) -> None:
    bundle = re_emitted(exports.bundle(kind, kv="float32", parts=3), tmp_path / "float")._replace(prompt_lengths=(128,))
    whole = run(bundle, chunk=128)
    for chunk in (1, 7, 127):
        np.testing.assert_allclose(run(bundle, chunk=chunk), whole, atol=FLOAT_TOLERANCE, err_msg=str(chunk))


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_is_token_by_token_as_shipped(exports: Exports, kind: str) -> None:
    bundle = open_bundle(exports.bundle(kind, parts=3))._replace(prompt_lengths=(128,))
    assert bundle.kv_dtype == "int8"
    whole = run(bundle, chunk=128)
    for chunk in (1, 32):
        assert share(whole, run(bundle, chunk=chunk)) <= INT8_CACHE_SHARE


@pytest.mark.parametrize("kind", ["gqa", "mha", "tied"])
def test_int8_activations_stay_near_float(exports: Exports, tmp_path: Path, kind: str) -> None:
    path = exports.bundle(kind, kv="float32", parts=3)
    plain, rounded = (
        run(re_emitted(path, tmp_path / str(level), accuracy_level=level)) for level in (1, INT8_ACTIVATIONS)
    )
    assert 0 < share(plain, rounded) <= INT8_ACTIVATIONS_SHARE


@pytest.mark.parametrize("kind", ["gqa", "mha", "qwen2"])
@pytest.mark.parametrize("chunk", [1, 40, 128])
def test_the_int8_cache_holds_rounded_keys_and_values(exports: Exports, tmp_path: Path, kind: str, chunk: int) -> None:
    """Codes against an own float64 forward pass over the stored weights: equal but for ties."""
    path = exports.bundle(kind, parts=3)
    bundle = re_emitted(path, tmp_path / "int8")._replace(prompt_lengths=(128,))
    runner = HostRunner(bundle)
    logits = Engine(runner).score(IDS, chunk)
    expected = forward(path, IDS, int8_cache=True)
    assert share(expected.logits, logits) <= INT8_CACHE_SHARE
    for name, exact in expected.caches.items():
        codes = runner.cache.buffers[name][0].astype(np.float64)
        np.testing.assert_array_equal(codes[:, len(IDS) :], 0, err_msg="positions not reached are untouched")
        difference = codes[:, : len(IDS)] - np.clip(np.rint(exact), -128, 127)
        layer = int(name.rsplit("_", 1)[1])
        if layer == 0:  # nothing before it was quantized: only float32 rounding
            tie = np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < TIE
            assert not difference[~tie].any(), name
        assert np.abs(difference).max() <= 1, name
        assert (difference != 0).mean() <= TIES_SHARE, name
    runner.close()


@pytest.mark.parametrize("block", [None, 16, 32, 64, 128, 256])
def test_blocks(exports: Exports, tmp_path: Path, block: int | None) -> None:
    """The stored block is the recipe's; the kernel's is a power of two that divides it and the row."""
    path = exports.bundle("wide", kv="float32", parts=2, block=block)
    bundle = open_bundle(path)
    store = opened_store(bundle)
    name = "layers.0.mlp.down_proj.weight"
    assert store.grids[name].block == block
    assert store.tensors[f"{name}_scale"].shape == (256, 1)
    if block is not None:
        assert store.tensors[f"{name}_factors"].shape == (256, -(-512 // block // 2))
    node = next(
        node for node in onnx.load(path / "part_2_of_2.onnx", load_external_data=False).graph.node
        if node.op_type == "MatMulNBits" and "layers.0.mlp.down_proj" in node.name
    )  # fmt: skip
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes == {"K": 512, "N": 256, "bits": 4, "block_size": block or 256, "accuracy_level": 4}
    eager = eager_logits(bundle.config, store.read, np.array([IDS[:40]]))[0]
    np.testing.assert_allclose(run(re_emitted(path, tmp_path / "float"), IDS[:40]), eager, atol=FLOAT_TOLERANCE)


def test_a_table_in_blocks(exports: Exports, tmp_path: Path) -> None:
    """Embedding and (tied) head with more than one scale a row."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        '{"name": "blocks", "kv": "float32", "rules": [{"match": "embed", "bits": 8, "block": 32},'
        ' {"match": "_proj", "bits": 8}]}'
    )
    path = exports.bundle("tied", recipe=str(recipe), parts=2)
    bundle = re_emitted(path, tmp_path / "float")
    np.testing.assert_allclose(
        run(bundle, IDS[:50]), forward(path, IDS[:50], int8_cache=False).logits, atol=FLOAT_TOLERANCE
    )


@pytest.mark.parametrize("scales", ["lpbq", "float16"])
@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen2"])
def test_five_and_six_bits(exports: Exports, tmp_path: Path, kind: str, scales: str) -> None:
    """Beside 4 and 8, in tables and linears, joined ones too: what the stored bits say, by two readers of their own."""
    path = exports.bundle(kind, recipe=exports.mixed(scales, kind), kv="float32", parts=3)
    bundle = re_emitted(path, tmp_path / "float")
    store = opened_store(bundle)
    assert {grid.bits for grid in store.grids.values()} == {4, 5, 6, 8}
    found = run(bundle, IDS[:60])
    assert found.std() > 0.5
    np.testing.assert_allclose(
        found, eager_logits(bundle.config, store.read, np.array([IDS[:60]]))[0], atol=FLOAT_TOLERANCE
    )
    np.testing.assert_allclose(found, forward(path, IDS[:60], int8_cache=False).logits, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("scales", ["lpbq", "float16"])
def test_bytes_of_five_and_six_bits_are_made_with_the_session(exports: Exports, tmp_path: Path, scales: str) -> None:
    """What runs in a step has one MatMulNBits a product and nothing that makes its weights; only an embedding's rows
    are put together in each step."""
    bundle = open_bundle(exports.bundle("gqa", recipe=exports.mixed(scales), kv="float32", parts=3))
    for part in bundle.parts:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / f"{part.name}.onnx")
        make_session(str(bundle.graph(part)), 1, options)
        model = onnx.load(tmp_path / f"{part.name}.onnx", load_external_data=False)
        used = Counter(node.op_type for node in model.graph.node)
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        if part.embeds:
            assert used["BitwiseOr"] == 1
            continue
        assert not {"BitwiseOr", "Cast", "Expand"} & set(used)
        assert used["Gather"] == part.heads, "the rows whose logits are wanted"
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                assert {node.input[1], node.input[2]} <= set(constants)
        packed = [t for t in constants.values() if t.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.UINT4)]
        assert len(packed) == used["MatMulNBits"], "stored bits are not kept beside the bytes made of them"


@given(columns=st.integers(1, 1000).map(lambda n: 16 * n), stored=st.sampled_from([None, 16, 32, 64, 128, 256]))
def test_kernel_block(columns: int, stored: int | None) -> None:
    block = kernel_block(columns, stored)
    assert block in (16, 32, 64, 128, 256)
    assert columns % block == 0
    if stored is not None and columns % stored == 0:
        assert stored % block == 0
    larger = [b for b in (32, 64, 128, 256) if b > block and columns % b == 0 and (stored is None or stored % b == 0)]
    assert not larger, "the largest there is"


def test_design_examples_of_kernel_blocks() -> None:
    assert [kernel_block(n, None) for n in (576, 192, 11008, 4096)] == [64, 64, 256, 256]


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_graphs_have_the_planned_ports_and_no_weights(exports: Exports, kind: str) -> None:
    bundle = open_bundle(exports.bundle(kind))
    store = opened_store(bundle)
    for part in bundle.parts:
        path = bundle.graph(part)
        check_graph(path, *ports(bundle.config, part, GraphStyle.HOST, kv_dtype=bundle.kv_dtype))
        graph = onnx.load(path, load_external_data=False).graph
        pointed = 0
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                at = {entry.key: entry.value for entry in tensor.external_data}
                assert (bundle.root / at["location"]).is_file()
                # One stored tensor, or several of one input behind each other.
                mine = [s for s in store.tensors.values() if s.file == at["location"]]
                start, end = int(at["offset"]), int(at["offset"]) + int(at["length"])
                assert start in {s.offset for s in mine} and end in {s.offset + s.nbytes for s in mine}
                pointed += 1
            else:
                assert len(tensor.SerializeToString()) < 256, f"{tensor.name} should be pointed to"
        assert pointed
    if kind == "tied":
        last = onnx.load(bundle.graph(bundle.parts[-1]), load_external_data=False).graph
        files = {e.value for t in last.initializer for e in t.external_data if e.key == "location"}
        assert "weights/part_1_of_5.safetensors" in files, "a tied head points into part 1's file"


def test_graphs_are_written_the_same_each_time(exports: Exports, tmp_path: Path) -> None:
    path = exports.bundle("gqa")
    again = re_emitted(path, tmp_path / "again", accuracy_level=INT8_ACTIVATIONS)
    for part in again.parts:
        assert again.graph(part).read_bytes() == (path / f"{part.name}.onnx").read_bytes()


def test_a_four_bit_embedding_is_refused(exports: Exports) -> None:
    bundle = open_bundle(exports.bundle("gqa"))
    store = opened_store(bundle)
    weights = HostWeights(store.tensors, {**store.grids} | {EMBEDDING: Grid(4)}, bundle.kv_scales)
    with pytest.raises(RecipeError, match=r"embed_tokens.weight has 4 bits; the embedding takes 5, 6 or 8"):
        emit_host(bundle.config, plan_parts(bundle.config)[0], weights)
