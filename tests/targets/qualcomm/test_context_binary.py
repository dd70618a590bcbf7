"""Reading context binaries: real ones, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import TargetError
from headrace.targets.qualcomm import toolchain
from headrace.targets.qualcomm.context_binary import read_context_binaries, read_context_binary
from tests.targets.qualcomm.conftest import TinyTarget
from tests.targets.qualcomm.tiny_qdq import MASK_DEPTH

HEADER = 4096  # a binary starts with tables of offsets


@pytest.mark.qnn
def test_tensors_are_read_as_compiled(target: TinyTarget) -> None:
    info = read_context_binary(target.shared[1].path)
    assert (info.soc_model, info.arch, len(info.graphs)) == (69, 79, 4)
    assert info.size == target.shared[1].path.stat().st_size
    graph = next(g for g in info.graphs if g.name.startswith("ar32_cl72_2_of_3_"))
    by_name = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    mask = by_name["attention_mask"]
    assert (mask.shape, mask.dtype, mask.offset, mask.zero_point) == ((1, 1, 32, 72), "uint16", -65535, 65535)
    assert mask.scale == pytest.approx(MASK_DEPTH / 65535)
    assert (by_name["past_key_0_in"].shape, by_name["past_key_0_in"].dtype) == ((2, 1, 64, 40), "uint8")
    ids = read_context_binary(target.shared[0].path).graphs[0].inputs[0]
    assert (ids.dtype, ids.scale, ids.zero_point) == ("int32", None, None)


@pytest.mark.qnn
def test_files_that_are_no_binaries(target: TinyTarget, tmp_path: Path) -> None:
    good = target.apart[0].binary
    data = good.read_bytes()
    damaged = {
        "empty": b"",
        "short": data[: len(data) // 2],
        "noise": bytes(range(256)) * 64,
        "header": bytes(b ^ 0xFF for b in data[:HEADER]) + data[HEADER:],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(content)
        with pytest.raises(TargetError, match=rf"{name}\.bin is not a readable QNN context binary"):
            read_context_binaries([good, path])
    with pytest.raises(TargetError, match="there is no context binary at"):
        read_context_binary(tmp_path / "none.bin")


def test_a_missing_toolchain_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"onnxruntime-qnn is not installed; .* pip install 'headrace\[qnn\]'"):
        toolchain.find_toolchain()


@pytest.mark.qnn
def test_the_toolchain_states_its_release() -> None:
    found = toolchain.find_toolchain()
    assert (found.version, found.qairt) == ("2.7.0", "2.51.0")
    path = toolchain.child_environment(found)["LD_LIBRARY_PATH"]
    assert path.split(":")[0] == str(found.folder)
