"""Device graphs against the eager decoder on the same grids, and against what the HTP compiler needs of their form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from headrace.bundle.encodings import ANGLE, ATTENTION_MASK, mask_encoding
from headrace.bundle.grid import Grid, QuantizedTensor, dequantize, quantize_nearest
from headrace.errors import CalibrationError, RecipeError
from headrace.graph import emit_device as emitter
from headrace.graph.device_weights import EmbeddingForm, _Writer, derive_weights
from headrace.graph.emit_device import DeviceGraph, emit_device, write_device_graphs
from headrace.model import decoder
from headrace.model.ops import Array, Eager, Positions
from headrace.model.rope import rope_angles
from headrace.model.weights import EMBEDDING
from headrace.plan import GraphStyle, plan_parts, ports
from headrace.quantize.outliers import SplitEager
from tests.graph.simulated import (
    OUTLIERS,
    QuantizedModel,
    SimulatedDevice,
    apart,
    divergence,
    quantized_model,
    reference_session,
    run_session,
    simulated_logits,
    tiny_model,
)
from tests.tiny import write_llama

S, C = 32, 64

# A result half-way between two codes may go either way, in NumPy's sums or in ONNX Runtime's.
TIE_LSB = 1
# The same over three layers, where one key or value that is one of 256 codes off is seen in everything behind it.
LAYERS_LSB = 200
KL = 1e-3  # three layers with spread-out random weights; 1e-4 measured
CORRELATION = 0.9998

KINDS = ("gqa", "mha", "tied", "outliers", "biased", "deep", "blocks", "widths")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizedModel]:
    return {kind: tiny_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def feeds_for(model: QuantizedModel, ids: NDArray[np.int64], length: int = S, context: int = C) -> dict[str, Any]:
    """A first step of S tokens: nothing is past."""
    c = model.config
    angles = rope_angles(c, length)
    mask = np.zeros((1, 1, length, context), np.uint16)
    mask[..., context - length :] = np.tri(length, dtype=np.uint16) * np.uint16(65535)
    feeds: dict[str, Any] = {
        "input_ids": ids[None].astype(np.int32),
        "position_ids_cos": ANGLE.floor(np.cos(angles))[None, None],
        "position_ids_sin": ANGLE.floor(np.sin(angles))[None, None],
        "attention_mask": mask,
    }
    for i in range(c.num_layers):
        feeds[f"past_key_{i}_in"] = np.full((c.num_kv_heads, 1, c.head_dim, context - length), 128, np.uint8)
        feeds[f"past_value_{i}_in"] = np.full((c.num_kv_heads, 1, context - length, c.head_dim), 128, np.uint8)
    return feeds


def run(path: Path, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return run_session(reference_session(path), feeds)


def chain(graphs: Sequence[DeviceGraph], feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """All parts, one after the other."""
    values = dict(feeds)
    for graph in graphs:
        values |= run(graph.path, values)
    return values


def emit(model: QuantizedModel, folder: Path, parts: int = 3, **options: Any) -> list[DeviceGraph]:
    options = {"lengths": (S,), "contexts": (C,)} | options
    planned = plan_parts(model.config, parts)
    return write_device_graphs(model.config, planned, model.read, model.encodings, folder, **options)


def tokens(model: QuantizedModel, seed: int = 3) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, S)


class Forced(SplitEager):
    """Compares every named result with the graph's, and goes on with the graph's: errors do not add up."""

    def __init__(self, model: QuantizedModel, codes: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(model.config, SimulatedDevice(model)._weight)
        self.model = model
        self.encodings = model.encodings
        self.codes = codes
        self.worst: dict[str, int] = {}

    def outliers(self, name: str, gated: Array) -> Sequence[int]:
        return apart(self.model, name)

    def tap(self, name: str, value: Array) -> Array:
        e, have = self.encodings[name], self.codes[name].reshape(value.shape)
        channels = apart(self.model, name.removesuffix(".gated"))
        if channels:  # what the fine grid makes of outliers is not used
            have = have.copy()
            have[..., channels] = e.zero_point
        self.worst[name] = int(np.abs(e.quantize(value).astype(int) - have.astype(int)).max())
        return e.dequantize(have)


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_follows_from_those_before(models: dict[str, QuantizedModel], kind: str, tmp_path: Path) -> None:
    model = models[kind]
    (graph,) = emit(model, tmp_path, parts=1)
    shown = onnx.load(str(graph.path))
    names = {n.output[0] for n in shown.graph.node if n.op_type == "QuantizeLinear"} & set(model.encodings)
    for name in sorted(names):
        kind_of = onnx.TensorProto.UINT8 if model.encodings[name].bits == 8 else onnx.TensorProto.UINT16
        shown.graph.output.append(onnx.helper.make_tensor_value_info(name, kind_of, None))
    onnx.save(shown, str(tmp_path / "shown.onnx"))
    ids, feeds = tokens(model), half_full(model)
    feeds["input_ids"] = ids[None].astype(np.int32)
    eager = Forced(model, run(tmp_path / "shown.onnx", feeds))
    step(eager, model, feeds)
    assert set(eager.worst) | {f"layers.{i}.self_attn.{x}_rope" for i in range(3) for x in "qk"} == names
    assert {name: worst for name, worst in eager.worst.items() if worst > TIE_LSB} == {}


def test_outliers_have_a_grid_of_their_own(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    model = models["outliers"]
    for layer in range(3):
        found = apart(model, f"layers.{layer}.mlp")
        assert set(OUTLIERS.get(layer, ())) <= set(found)
        assert len(found) == (2 if layer in OUTLIERS else 0)  # never one alone: the compiler does not come back
    few, rest = (model.encodings[f"layers.1.mlp.{name}"] for name in ("gated_outliers", "gated"))
    assert few.scale > 20 * rest.scale
    (graph,) = emit(model, tmp_path, parts=1)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(graph.path)).graph.initializer}
    name = "layers.1.mlp.down_proj.weight"
    whole = model.read(name)
    assert isinstance(whole, QuantizedTensor)
    channels = list(OUTLIERS[1])
    assert not stored[f"{name}.codes"][channels].any()
    back = stored[f"{name}.outliers.codes"].astype(np.float32) * stored[f"{name}.outliers.scale"]
    np.testing.assert_array_equal(back.T, dequantize(whole)[:, channels])


def test_a_grid_of_their_own_is_nearer(models: dict[str, QuantizedModel]) -> None:
    """The same model with and without the split: only the fine grid keeps what all other channels hold."""
    model = models["outliers"]
    ids = tokens(model)
    exact = simulated_logits(model, ids, Eager(model.config, model.real))
    whole = {name: e for name, e in model.encodings.items() if not name.endswith("gated_outliers")}
    for layer in OUTLIERS:
        whole[f"layers.{layer}.mlp.gated"] = model.encodings[f"layers.{layer}.mlp.gated_outliers"]
    without = replace(model, encodings=whole)
    split, joined = (divergence(exact, simulated_logits(m, ids)) for m in (model, without))
    assert split < joined


def test_a_mask_that_is_too_shallow_lets_empty_positions_win(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    """That is what the calibrated depth prevents, see `test_logits_are_the_simulation_s`."""
    model = models["deep"]
    assert -model.encodings[ATTENTION_MASK].low > 100
    shallow = replace(model, encodings={**model.encodings, ATTENTION_MASK: mask_encoding(50)})
    ids = tokens(model)
    codes = chain(emit(shallow, tmp_path), feeds_for(model, ids))["logits"]
    assert divergence(simulated_logits(model, ids), model.encodings["lm_head"].dequantize(codes[0])) > 100 * KL


def half_full(model: QuantizedModel) -> dict[str, Any]:
    """A step over C − S random keys and values, all attended to."""
    feeds = feeds_for(model, tokens(model))
    rng = np.random.default_rng(5)
    for name in feeds:
        if name.startswith("past_"):
            feeds[name] = rng.integers(64, 192, feeds[name].shape).astype(np.uint8)
    feeds["attention_mask"][..., : C - S] = 65535
    return feeds


def step(ops: Eager, model: QuantizedModel, feeds: Mapping[str, Any]) -> None:
    """The eager decoder on a graph's inputs."""
    at = Positions(
        ANGLE.dequantize(feeds["position_ids_cos"]),
        ANGLE.dequantize(feeds["position_ids_sin"]),
        model.encodings[ATTENTION_MASK].dequantize(feeds["attention_mask"]),
    )
    stream: decoder.Residual[Array] = decoder.embed(ops, feeds["input_ids"])
    for i in range(model.config.num_layers):
        past = [
            model.encodings[f"layers.{i}.self_attn.{cache}"]
            .dequantize(feeds[f"past_{kind}_{i}_in"])
            .transpose(1, 0, 2, 3)
            for kind, cache in (("key", "k_cache"), ("value", "v_cache"))
        ]
        stream, _ = decoder.block(ops, i, stream, at, (past[0], past[1]))
        stream = decoder.Residual(stream.settle(ops))
    decoder.head(ops, stream)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_simulation_s(models: dict[str, QuantizedModel], kind: str, tmp_path: Path) -> None:
    model = models[kind]
    ids = tokens(model)
    codes = chain(emit(model, tmp_path), feeds_for(model, ids))["logits"]
    logits = model.encodings["lm_head"].dequantize(codes[0])
    expected = simulated_logits(model, ids)
    assert divergence(expected, logits) <= KL
    assert np.corrcoef(expected.ravel(), logits.ravel())[0, 1] >= CORRELATION


def test_five_parts_are_one_part(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    model = models["gqa"]
    feeds = feeds_for(model, tokens(model))
    one = chain(emit(model, tmp_path / "1", parts=1), feeds)
    four = chain(emit(model, tmp_path / "4", parts=4), feeds)
    for name in one:
        np.testing.assert_array_equal(one[name], four[name], name)


@pytest.mark.parametrize("kind", ["gqa", "mha"])
def test_attention_by_head_is_the_fused_one(
    models: dict[str, QuantizedModel], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[kind]
    heads, size = model.config.num_kv_heads, model.config.head_dim * C
    feeds = half_full(model)
    monkeypatch.setattr(emitter, "FUSED_KV_LIMIT", heads * size)  # exactly fits
    fused = emit(model, tmp_path / "fused", parts=1)
    monkeypatch.setattr(emitter, "FUSED_KV_LIMIT", heads * size - 1)
    split = emit(model, tmp_path / "split", parts=1)
    assert operators(fused[0].path).count("Softmax") == model.config.num_layers
    assert operators(split[0].path).count("Softmax") == model.config.num_layers * heads
    one, other = chain(fused, feeds), chain(split, feeds)
    for name in one:
        difference = np.abs(one[name].astype(int) - other[name].astype(int))
        assert difference.max() <= (TIE_LSB if name.endswith("_0_out") else LAYERS_LSB), name


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]


def test_limit_is_eight_mebibytes_of_keys() -> None:
    assert emitter.FUSED_KV_LIMIT == 16 * 128 * 4096


def test_ports_are_the_plan_s_and_touch_only_quantization(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    model = models["gqa"]
    for written in emit(model, tmp_path, lengths=(S, 1), contexts=(C, 2 * C)):
        graph = onnx.load(str(written.path), load_external_data=False).graph
        inputs, outputs = ports(
            model.config, written.part, GraphStyle.DEVICE, length=written.length, context=written.context
        )
        assert graph.name == written.name == written.path.stem
        assert [v.name for v in graph.input] == [p.name for p in inputs]
        assert [v.name for v in graph.output] == [p.name for p in outputs]
        readers = {port.name: [n for n in graph.node if port.name in n.input] for port in inputs}
        for name, nodes in readers.items():
            assert {n.op_type for n in nodes} == ({"Gather"} if name == "input_ids" else {"DequantizeLinear"}), name
        makers = {output: node for node in graph.node for output in node.output}
        assert {makers[port.name].op_type for port in outputs} == {"QuantizeLinear"}


@pytest.mark.parametrize(("kind", "linears"), [("gqa", 6), ("blocks", 7)])  # down_proj has 8 bits in one
def test_int4_weights_have_zero_points_of_their_own(
    models: dict[str, QuantizedModel], kind: str, linears: int, tmp_path: Path
) -> None:
    """Without them the compiler reads codes as 0 … 15, silently."""
    seen = 0
    for written in emit(models[kind], tmp_path):
        graph = onnx.load(str(written.path), load_external_data=False).graph
        initializers = {t.name: t for t in graph.initializer}
        for node in graph.node:
            codes = initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if codes is None or codes.data_type != onnx.TensorProto.INT4:
                continue
            zero = initializers[node.input[2]]
            assert zero.data_type == onnx.TensorProto.INT4
            assert list(zero.dims) == list(initializers[node.input[1]].dims)
            assert zero.dims[-1] == codes.dims[1] and (kind == "gqa" or zero.dims[0] == codes.dims[0] // 16)
            assert not np.any(numpy_helper.to_array(zero).astype(np.int8))
            seen += 1
    assert seen == linears * models[kind].config.num_layers


def test_five_and_six_bits_are_int8_with_a_scale_a_row(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    """A device has no such widths; codes times factors are the same values, −128 among them."""
    model = models["widths"]
    part = plan_parts(model.config, 1)[0]
    weights = derive_weights(model.config, part, model.read, model.encodings, tmp_path)
    assert set(weights.bits.values()) == {8}
    data, least = weights.path.read_bytes(), 0

    def stored(name: str) -> NDArray[Any]:
        t = weights.tensors[name]
        return np.frombuffer(data[t.offset : t.offset + t.nbytes], t.dtype).reshape(t.shape)

    for name in weights.bits:
        codes, scale = stored(f"{name}.codes"), stored(f"{name}.scale")
        assert codes.dtype == np.int8
        assert scale.shape == codes.shape[1:]
        if not name.endswith(".outliers") and f"{name}.outliers" not in weights.bits:
            np.testing.assert_array_equal((codes * scale).T, model.real(name))
        least = min(least, codes.min())
    assert least == -128


def test_all_graphs_of_a_part_share_their_weights(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    written = emit(models["tied"], tmp_path, lengths=(S, 1), contexts=(C, 2 * C))
    places: dict[int, set[tuple[tuple[str, str, str], ...]]] = {}
    for graph in written:
        found = []
        for tensor in onnx.load(str(graph.path), load_external_data=False).graph.initializer:
            where = {e.key: e.value for e in tensor.external_data}
            if where:
                found.append((tensor.name, where["location"], where["offset"]))
            else:
                assert tensor.ByteSize() < 4096, tensor.name  # scales of activations, shapes, zero points
        places.setdefault(graph.part.number, set()).add(tuple(sorted(found)))
        assert graph.path.stat().st_size < graph.path.parent.joinpath(f"{graph.part.name}.weights").stat().st_size * 20
    assert [len(p) for p in places.values()] == [1, 1, 1]
    assert {where for p in places.values() for found in p for _, where, _ in found} == {
        f"part_{n}_of_3.weights" for n in (1, 2, 3)
    }


def test_moved_data_keeps_its_grid(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    """The compiler takes a Reshape, Slice, Transpose or Gather between equal grids only."""
    for written in emit(models["gqa"], tmp_path):
        graph = onnx.load(str(written.path), load_external_data=False).graph
        makers = {output: node for node in graph.node for output in node.output}
        for node in graph.node:
            if node.op_type in ("Reshape", "Slice", "Transpose", "Gather"):
                before = makers[node.input[0]]
                (after,) = [n for n in graph.node if node.output[0] in n.input]
                assert (before.op_type, after.op_type) == ("DequantizeLinear", "QuantizeLinear"), node.name
                assert list(before.input[1:]) == list(after.input[1:]), node.name


@given(rows=st.integers(1, 9), pairs=st.integers(1, 9), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_stored_codes_come_back_transposed(
    tmp_path_factory: pytest.TempPathFactory, rows: int, pairs: int, bits: int, seed: int
) -> None:
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    codes = np.random.default_rng(seed).integers(low, high, (rows, 2 * pairs)).astype(np.int8)
    path = tmp_path_factory.mktemp("codes") / "w"
    with path.open("wb") as file:
        writer = _Writer(file, "w")
        writer.add("something", np.zeros(3, np.uint8))
        writer.add_transposed("codes", codes, bits)
    t = writer.tensors["codes"]
    raw = path.read_bytes()[t.offset : t.offset + t.nbytes]
    kind = onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8
    proto = onnx.helper.make_tensor("codes", kind, t.shape, raw, raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(proto).astype(np.int8), codes.T)


# Steps of the result's grid that a table's form may cost. Rows: half a step of the scale's grid times a code of up to
# 127, a quarter of the result's step, on top of the rounding. The narrow table has 127 steps up to its largest value.
FORM_LSB = {EmbeddingForm.WIDE: 0, EmbeddingForm.ROWS: 1, EmbeddingForm.NARROW: 65535 // 127 // 2 + 4}


@pytest.mark.parametrize("form", EmbeddingForm)
@pytest.mark.parametrize("grid", [Grid(8), Grid(8, 16), Grid(6, 16), Grid(5, 16, lpbq=True), Grid(6, 32, lpbq=True)])
def test_embedding_forms_cost_what_is_said(
    models: dict[str, QuantizedModel], form: EmbeddingForm, grid: Grid, tmp_path: Path
) -> None:
    model = models["gqa"]
    if grid != Grid(8):
        table = quantize_nearest(model.real(EMBEDDING), grid)
        model = replace(model, weights={**model.weights, EMBEDDING: table})
    graph = emit(model, tmp_path, embedding=form)[0]
    ids = tokens(model)
    got = run(graph.path, {"input_ids": ids[None].astype(np.int32)})["hidden_1"][0].astype(int)
    expected = model.encodings["embed_tokens"].quantize(model.real(EMBEDDING)[ids]).astype(int)
    assert np.abs(got - expected).max() <= FORM_LSB[form]


def test_rows_keep_small_rows_that_a_narrow_table_loses(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    model = models["gqa"]
    table = model.real(EMBEDDING).copy()
    table[::2] /= 100  # as rare tokens' rows are
    model = replace(model, weights={**model.weights, EMBEDDING: quantize_nearest(table, Grid(8))})
    ids = np.arange(0, 2 * S, 2)
    error = {}
    for form in EmbeddingForm:
        graph = emit(model, tmp_path / form.value, embedding=form)[0]
        codes = run(graph.path, {"input_ids": ids[None].astype(np.int32)})["hidden_1"][0]
        got = model.encodings["embed_tokens"].dequantize(codes)
        error[form] = np.linalg.norm(got - model.real(EMBEDDING)[ids]) / np.linalg.norm(model.real(EMBEDDING)[ids])
    assert error[EmbeddingForm.ROWS] < 0.01
    assert error[EmbeddingForm.WIDE] < 0.01
    assert error[EmbeddingForm.NARROW] > 0.1


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_blocks_are_refused_with_a_way_out(models: dict[str, QuantizedModel], bits: int, tmp_path: Path) -> None:
    model = models["gqa"]
    name = "layers.1.mlp.up_proj.weight"
    blocks = quantize_nearest(model.real(name), Grid(bits, 32))
    model = replace(model, weights={**model.weights, name: blocks})
    with pytest.raises(
        RecipeError,
        match=r"layers\.1\.mlp\.up_proj\.weight .*blocks of 32 with scales of their own.*--block 32 or channel",
    ):
        emit(model, tmp_path)
    assert not list(tmp_path.glob("part_2_of_3.weights"))


def test_a_missing_encoding_is_named(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    model = models["gqa"]
    part = plan_parts(model.config, 3)[1]
    weights = derive_weights(model.config, part, model.read, model.encodings, tmp_path)
    for missing in ("layers.0.mlp.gated", "embed_tokens", "layers.1.residual", "layers.0.self_attn.k_cache"):
        encodings = {name: e for name, e in model.encodings.items() if name != missing}
        with pytest.raises(CalibrationError, match=missing):
            emit_device(model.config, part, length=S, context=C, weights=weights, encodings=encodings)


def test_a_tied_head_is_the_embedding_s_codes(models: dict[str, QuantizedModel], tmp_path: Path) -> None:
    model = models["tied"]
    part = plan_parts(model.config, 3)[2]
    weights = derive_weights(model.config, part, model.read, model.encodings, tmp_path)
    t = weights.tensors["lm_head.weight.codes"]
    stored = np.frombuffer(weights.path.read_bytes()[t.offset : t.offset + t.nbytes], np.int8).reshape(t.shape)
    table = model.weights[EMBEDDING]
    assert isinstance(table, QuantizedTensor)
    np.testing.assert_array_equal(stored, table.codes.T)


def test_stretched_rope_and_odd_sizes(tmp_path: Path) -> None:
    """Head dim not hidden / heads, a feed-forward and vocabulary of odd multiples, llama3 frequencies."""
    from headrace.checkpoint import open_checkpoint

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = write_llama(
        tmp_path / "m", layers=2, hidden=48, heads=6, kv_heads=3, head_dim=8, ffn=70, vocab=77, rope_scaling=scaling
    )
    checkpoint = open_checkpoint(folder)
    windows = np.random.default_rng(0).integers(0, 77, (4, 64))
    model = quantized_model(checkpoint.config, lambda name: checkpoint.tensor(name).load(), windows)
    ids = tokens(model)
    codes = chain(emit(model, tmp_path / "d", parts=2), feeds_for(model, ids))["logits"]
    assert divergence(simulated_logits(model, ids), model.encodings["lm_head"].dequantize(codes[0])) <= KL
