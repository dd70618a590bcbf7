"""The real HTP compiler and emulator on a tiny model: what was compiled, and what it computes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace.bundle.encodings import Encoding
from headrace.bundle.work_folder import SCRATCH
from headrace.errors import ContextFull, TargetError
from headrace.plan import GraphStyle, graph_name, ports
from headrace.targets.device_loop import DeviceLoop, choose_graph, longest_prompt, prompt_steps
from headrace.targets.host.sessions import make_session
from headrace.targets.qualcomm.binary_check import check_binary, check_sharing
from headrace.targets.qualcomm.child import GOODBYE_SECONDS, Child
from headrace.targets.qualcomm.compiler import Emulator, GraphFile, compile_apart, compile_shared
from headrace.targets.qualcomm.context_binary import read_context_binary
from headrace.targets.qualcomm.soc import SOCS, Soc, find_soc
from tests.targets.qualcomm import tiny_qdq
from tests.targets.qualcomm.conftest import CONTEXTS, LENGTHS, TinyTarget

# Measured: int4 linears are up to 23 LSB (of 65536) below ORT CPU's in emulation, and a layer has seven of them.
LAYER_LSB = 200
CACHE_LSB = 1  # uint8: a tie of rounding
EMBEDDING_LSB = 1
INT8_LSB = 2  # of one int8 linear; measured 1


def test_targets_are_found_by_name() -> None:
    assert find_soc("snapdragon-8-gen3").dsp_arch == "v75"
    assert {soc.name: (soc.model, soc.arch) for soc in SOCS} == {
        "snapdragon-8-elite-gen5": (87, 81), "snapdragon-8-elite": (69, 79), "snapdragon-8-gen3": (57, 75),
        "snapdragon-8-gen2": (43, 73), "sm8845": (97, 81), "qcs9100": (77, 73), "sa8255": (52, 73),
        "snapdragon-x-elite": (60, 73),
    }  # fmt: skip
    with pytest.raises(TargetError, match=r"unknown target 'snapdragon-8-elit'; did you mean 'snapdragon-8-elite'"):
        find_soc("snapdragon-8-elit")


def test_steps_are_cut_as_genie_cuts_them() -> None:
    assert prompt_steps(50, 0, (32, 1), (128, 512)) == [(32, 32, 128), (18, 32, 128)]
    assert prompt_steps(33, 0, (32, 1), (128,)) == [(32, 32, 128), (1, 1, 128)]
    assert prompt_steps(40, 0, (128, 8, 32, 1), (512,)) == [(40, 128, 512)]
    assert prompt_steps(100, 0, (32, 1), (128, 512))[-1] == (4, 32, 512)  # 96 + 32 is not below 128
    assert longest_prompt(0, (128, 1), (4096,)) == 3969 and longest_prompt(40, (128,), (128,)) == 0
    assert choose_graph(1, 127, (1,), (128, 512)) == (1, 512) and choose_graph(1, 126, (1,), (128, 512)) == (1, 128)
    with pytest.raises(ContextFull, match="shorten it to 97 tokens"):
        prompt_steps(98, 0, (32, 1), (128,))


@pytest.mark.qnn
def test_shared_binaries_are_what_was_planned(target: TinyTarget) -> None:
    plan = target.plan
    for part, made in zip(plan.parts, target.shared, strict=True):
        check_binary(made.path, made.info, plan.soc, plan.config, part, plan.steps, plan.encodings)
        assert made.info.shared and made.info.build.startswith("v2.")
        assert made.seconds > 0 and made.peak_bytes > 50e6  # the compiler's library alone has 100 MB
    assert not list(target.phone.glob(f"{SCRATCH}*"))


@pytest.mark.qnn
@pytest.mark.parametrize("soc", SOCS, ids=lambda soc: soc.name)
def test_every_chip_gets_a_binary_of_its_own(target: TinyTarget, soc: Soc, tmp_path: Path) -> None:
    plan, part = target.plan, target.plan.parts[1]
    graphs = [GraphFile(name, target.onnx[name]) for name in (graph_name(part, *step) for step in plan.steps)]
    made = compile_shared(graphs, soc, tmp_path / "part.bin")
    check_binary(made.path, read_context_binary(made.path), soc, plan.config, part, plan.steps, plan.encodings)


@pytest.mark.qnn
def test_each_difference_from_the_plan_is_caught(target: TinyTarget) -> None:
    plan, part, made = target.plan, target.plan.parts[1], target.shared[1]

    def refuses(match: str, **changes: object) -> None:
        values = {"info": made.info, "soc": plan.soc, "config": plan.config, "steps": plan.steps}
        values |= {"encodings": plan.encodings} | changes
        with pytest.raises(TargetError, match=match):
            check_binary(made.path, values.pop("info"), part=part, **values)  # type: ignore[call-arg, arg-type]

    refuses("was compiled for snapdragon-8-elite; expected snapdragon-8-gen3", soc=find_soc("snapdragon-8-gen3"))
    refuses("was compiled for soc_model 0", info=replace(made.info, soc_model=0))
    refuses("holds 4 graphs", steps=plan.steps[:2])
    refuses("has no graph named ar8_cl72_2_of_3", steps=[(8, 72), *plan.steps[1:]])
    refuses(
        r"hidden_1 is uint16\[1, 32, 128\]; expected uint16\[1, 32, 256\]", config=replace(plan.config, hidden_size=256)
    )
    wrong = replace(target.model.encodings["hidden_1"], zero_point=3)
    refuses("input hidden_1 has scale .* expected .* zero point 3", encodings={**plan.encodings, "hidden_1": wrong})
    refuses("was planned for 8388608 bytes of VTCM; snapdragon-8-elite has 4 MB", soc=replace(plan.soc, vtcm_mb=4))
    graph = made.info.graphs[0]
    renamed = replace(graph, inputs=(replace(graph.inputs[0], name="hidden"), *graph.inputs[1:]))
    refuses(r"lacking \['hidden_1'\], not expected \['hidden'\]", info=_with(made.info, renamed))


@pytest.mark.qnn
def test_weights_that_are_not_shared_are_caught(target: TinyTarget) -> None:
    info = target.shared[1].info
    apart = tuple(replace(g, shared_bytes=0, own_bytes=g.own_bytes + g.shared_bytes) for g in info.graphs)
    with pytest.raises(TargetError, match="holds the weights of its 4 graphs apart"):
        check_sharing(Path("part"), replace(info, graphs=apart))
    with pytest.raises(TargetError, match="the weights are not shared"):
        check_sharing(Path("part"), replace(info, size=info.size + 4 * 114688 + 4 * 65536))


@pytest.mark.qnn
def test_an_unknown_chip_is_refused(target: TinyTarget, tmp_path: Path) -> None:
    name = "ar1_cl72_1_of_3"
    with pytest.raises(TargetError, match="QNN_DEVICE_ERROR_INVALID_CONFIG"):
        compile_apart([GraphFile(name, target.onnx[name])], replace(target.plan.soc, model=9999), tmp_path)


@pytest.mark.qnn
@pytest.mark.parametrize("length", LENGTHS)
def test_emulation_agrees_with_onnxruntime(target: TinyTarget, emulator: Emulator, length: int) -> None:
    rng = np.random.default_rng(length)
    context, past = CONTEXTS[0], 30
    for part in target.plan.parts:
        name = graph_name(part, length, context)
        feeds = _feeds(target, name, past, rng)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = make_session(str(target.onnx[name]), 1, options)
        names = [output.name for output in session.get_outputs()]
        expected = dict(zip(names, session.run(names, feeds), strict=True))
        found = emulator.run(name, feeds)
        for port in names:
            apart = np.abs(expected[port].astype(int) - found[port].astype(int)).max()
            limit = EMBEDDING_LSB if part.embeds else CACHE_LSB if port.startswith("past") else LAYER_LSB
            assert apart <= limit, (name, port, apart)


@pytest.mark.qnn
@pytest.mark.parametrize("form", ["gemm", "conv"])
def test_other_forms_of_a_linear_compile_and_agree(
    form: str, target: TinyTarget, emulator: Emulator, tmp_path: Path
) -> None:
    name = "ar32_cl72_2_of_3"
    path = tmp_path / f"{name}.onnx"
    onnx.save(tiny_qdq.emit(replace(target.model, linear_form=form), target.plan.parts[1], 32, 72), path)
    feeds = _feeds(target, name, 30, np.random.default_rng(0))
    with Emulator(compile_apart([GraphFile(name, path)], target.plan.soc, tmp_path)) as other:
        found, expected = other.run(name, feeds), emulator.run(name, feeds)
    for port, codes in expected.items():
        assert np.abs(codes.astype(int) - found[port].astype(int)).max() <= CACHE_LSB, port


@pytest.mark.qnn
def test_int8_codes_of_minus_128_are_that(tmp_path: Path) -> None:
    """LPBQ weights of 5 and 6 bits are int8 weights of a device; their smallest code times the largest factor is −128,
    which no symmetric search of int8 gives. One output of this linear has nothing but such codes."""
    rows, columns, outputs = 8, 64, 32
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([-128, -127, 0, 96, 127], np.int8), (columns, outputs))
    codes[:, 3] = -128
    scale = rng.uniform(1e-3, 2e-3, outputs).astype(np.float32)
    given, made = Encoding.of_range(-1.0, 1.0), Encoding.of_range(-12.0, 12.0)
    constants = {"codes": codes, "scale": scale, "zero": np.zeros(outputs, np.int8)}
    for name, encoding in (("given", given), ("made", made)):
        constants[f"{name}_scale"] = np.float32(encoding.scale)
        constants[f"{name}_zero"] = np.uint16(encoding.zero_point)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["x", "given_scale", "given_zero"], ["x_real"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["weight"], axis=1),
            helper.make_node("MatMul", ["x_real", "weight"], ["y_real"]),
            helper.make_node("QuantizeLinear", ["y_real", "made_scale", "made_zero"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.UINT16, [1, rows, columns])],
        [helper.make_tensor_value_info("y", TensorProto.UINT16, [1, rows, outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = tmp_path / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    x = rng.integers(0, 1 << 16, (1, rows, columns)).astype(np.uint16)
    with Emulator(compile_apart([GraphFile("linear", path)], find_soc("snapdragon-8-elite"), tmp_path)) as emulator:
        found = emulator.run("linear", {"x": x})["y"]
    exact = made.quantize((given.dequantize(x) @ (codes * scale)).astype(np.float32))
    assert np.abs(found.astype(int) - exact.astype(int)).max() <= INT8_LSB


@pytest.mark.qnn
def test_prefill_is_token_by_token(target: TinyTarget, emulator: Emulator) -> None:
    plan = target.plan
    ids = np.random.default_rng(3).integers(3, plan.config.vocab_size, 40).tolist()
    whole = DeviceLoop(plan.config, plan.parts, LENGTHS, CONTEXTS, plan.encodings, emulator.run)
    single = DeviceLoop(plan.config, plan.parts, (1,), CONTEXTS, plan.encodings, emulator.run)
    expected, found = whole.feed(ids), single.feed(ids)
    # The same fixed-point arithmetic in another order of accumulation; ties of the 8-bit cache make the difference.
    assert np.abs(expected - found).max() <= 0.02 * np.abs(expected).max()
    whole.rewind(30)
    assert np.array_equal(whole.feed(ids[30:])[-1].argmax(), expected[-1].argmax())


@pytest.mark.qnn
def test_a_shared_binary_is_not_opened_in_emulation(target: TinyTarget) -> None:
    graph = replace(target.apart[0], binary=target.shared[0].path)
    with pytest.raises(TargetError, match="holds weights shared between 4 graphs, which only a phone can open"):
        Emulator([graph])


@pytest.mark.qnn
def test_a_refused_graph_is_a_message_with_the_compilers_words(target: TinyTarget, tmp_path: Path) -> None:
    model = onnx.load(target.onnx["ar1_cl72_2_of_3"])
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Sinh"
    path = tmp_path / "ar1_cl72_2_of_3.onnx"
    onnx.save(model, path)
    with pytest.raises(TargetError, match=r"ar1_cl72_2_of_3\.onnx: .*assigned to the default CPU EP"):
        compile_shared([GraphFile("ar1_cl72_2_of_3", path)], target.plan.soc, tmp_path / "part.bin")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(TargetError, match="there is no device graph"):
        compile_shared([GraphFile("x", tmp_path / "none.onnx")], target.plan.soc, tmp_path / "part.bin")
    with pytest.raises(TargetError, match="expected distinct names"):
        compile_shared([GraphFile("x", path), GraphFile("x", path)], target.plan.soc, tmp_path / "part.bin")


@pytest.mark.qnn
def test_a_dead_compiler_is_a_message() -> None:
    with Child("headrace.targets.qualcomm.worker", "the HTP compiler") as child:
        child._process.kill()
        with pytest.raises(TargetError, match=r"the HTP compiler was ended by SIGKILL \(often: out of memory\)"):
            child.call({"action": "run", "name": "x"}, seconds=10)


@pytest.mark.qnn
def test_an_interrupt_does_not_wait_for_the_compiler() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Child("headrace.targets.qualcomm.worker", "the HTP compiler") as child:
        raise KeyboardInterrupt
    assert not child.alive and time.monotonic() - started < GOODBYE_SECONDS / 2


@pytest.mark.qnn
def test_a_child_whose_talk_was_cut_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer would be taken for the next one's."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with Child("headrace.targets.qualcomm.worker", "the HTP compiler") as child:
        with monkeypatch.context() as patch:
            patch.setattr(Child, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                child.call({"action": "run", "name": "x"}, seconds=10)
        with pytest.raises(TargetError, match="the HTP compiler was interrupted; open it again"):
            child.call({"action": "run", "name": "x"}, seconds=10)


@pytest.mark.qnn
def test_silence_ends_the_child() -> None:
    with Child("headrace.targets.qualcomm.worker", "the HTP compiler") as child:
        with pytest.raises(TargetError, match="gave no answer within 0 s and was ended"):
            child.receive(seconds=0.01)
        assert not child.alive


@pytest.mark.qnn
def test_feeds_that_do_not_fit_are_a_message(emulator: Emulator) -> None:
    with pytest.raises(TargetError, match="ar1_cl72_1_of_3"):
        emulator.run("ar1_cl72_1_of_3", {"input_ids": np.zeros((1, 2), np.int32)})
    with pytest.raises(TargetError, match="nothing"):
        emulator.run("nothing", {})


def _with(info: object, graph: object) -> object:
    return replace(info, graphs=(graph, *info.graphs[1:]))  # type: ignore[type-var, attr-defined]


def _feeds(target: TinyTarget, name: str, past: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A step in the middle of a conversation, on random codes."""
    plan = target.plan
    length, context, number = (int(text.lstrip("arcl")) for text in name.split("_")[:3])
    planned, _ = ports(plan.config, plan.parts[number - 1], GraphStyle.DEVICE, length=length, context=context)
    feeds: dict[str, np.ndarray] = {}
    for port in planned:
        if port.name == "input_ids":
            feeds[port.name] = rng.integers(0, plan.config.vocab_size, port.shape).astype(np.int32)
        elif port.name == "attention_mask":
            feeds[port.name] = np.zeros(port.shape, np.uint16)
            feeds[port.name][..., :past] = 65535
            feeds[port.name][0, 0, :, context - length :] = np.tri(length, dtype=np.uint16) * 65535
        elif port.dtype == "uint8":
            feeds[port.name] = np.full(port.shape, 128, np.uint8)
            where = np.s_[..., :past] if "key" in port.name else np.s_[:, :, :past]
            filled = feeds[port.name][where]
            feeds[port.name][where] = np.clip(np.rint(rng.normal(128, 40, filled.shape)), 1, 255)
        else:
            zero = plan.encodings[port.name].zero_point
            feeds[port.name] = np.clip(np.rint(rng.normal(zero, 8000, port.shape)), 0, 65535).astype(np.uint16)
    return feeds
