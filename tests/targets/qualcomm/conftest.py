"""Compiled tiny graphs for the tests of Qualcomm's toolchain, made once for the session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from headrace.targets.qualcomm.compiler import (
    Compiled,
    EmulationGraph,
    Emulator,
    GraphFile,
    compile_apart,
    compile_shared,
)
from headrace.targets.qualcomm.genie import (
    BACKEND_FILE,
    CONFIG_FILE,
    GeniePlan,
    backend_config,
    binary_name,
    genie_config,
)
from headrace.targets.qualcomm.soc import find_soc
from tests.targets.qualcomm import tiny_qdq

PARTS = 3
LENGTHS = (32, 1)
CONTEXTS = (72, 512)
EOS = 2


@dataclass(frozen=True)
class TinyTarget:
    """The tiny model's graphs, compiled both ways."""

    model: tiny_qdq.TinyModel
    plan: GeniePlan
    onnx: dict[str, Path]
    shared: list[Compiled]
    apart: list[EmulationGraph]
    phone: Path
    emulation: Path


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level vocabulary without merges: <0> … <2>, printable ASCII and the bytes of 河, then <101>, <102> …, so
    that whatever the tiny model says is (nearly always) text: Genie holds back what is not UTF-8."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, range(32, 127))) + "河"
    letters = sorted(set(byte_level.pre_tokenize_str(text)[0][0]))
    pieces = [f"<{i}>" for i in range(3)] + letters
    pieces += [f"<{i}>" for i in range(len(pieces), vocab_size)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> TinyTarget:
    """Two layers in three parts, S 32 and 1, contexts 72 and 512, for Snapdragon 8 Elite."""
    root = tmp_path_factory.mktemp("qnn")
    folders = {name: root / name for name in ("onnx", "phone", "emulation")}
    for folder in folders.values():
        folder.mkdir()
    model = tiny_qdq.make(tiny_qdq.tiny_config(), PARTS)
    soc = find_soc("snapdragon-8-elite")
    parts = tiny_qdq.plan_parts(model.config, PARTS)
    onnx = tiny_qdq.write(model, parts, LENGTHS, CONTEXTS, folders["onnx"])
    plan = GeniePlan(
        model.config, parts, LENGTHS, CONTEXTS, soc, eos=(EOS,), pad=0, encodings=tiny_qdq.port_encodings(model, parts)
    )
    shared, apart = [], []
    for part in parts:
        names = [tiny_qdq.graph_name(part, *step) for step in plan.steps]
        graphs = [GraphFile(name, onnx[name]) for name in names]
        shared.append(compile_shared(graphs, soc, folders["phone"] / binary_name(part)))
        apart += compile_apart(graphs, soc, folders["emulation"])
    binaries = [graph.binary.name for graph in apart]
    (folders["emulation"] / CONFIG_FILE).write_text(json.dumps(genie_config(plan, binaries)), encoding="utf-8")
    (folders["emulation"] / BACKEND_FILE).write_text(json.dumps(backend_config(soc)), encoding="utf-8")
    write_tokenizer(folders["emulation"] / "tokenizer.json", model.config.vocab_size)
    return TinyTarget(model, plan, onnx, shared, apart, folders["phone"], folders["emulation"])


@pytest.fixture(scope="session")
def emulator(target: TinyTarget) -> Iterator[Emulator]:
    """The emulated graphs of the tiny model."""
    with Emulator(target.apart) as opened:
        yield opened
