"""Genie's folder: what is written follows the plan, and what is wrong in one is told before Genie is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.config import RopeScaling
from headrace.errors import TargetError
from headrace.targets.qualcomm.genie import (
    BACKEND_FILE,
    CONFIG_FILE,
    GeniePlan,
    Sampling,
    binary_name,
    genie_config,
    write_genie_folder,
)
from headrace.targets.qualcomm.genie_check import _check_graphs, check_genie_config, check_genie_folder
from headrace.targets.qualcomm.geniex import geniex_metadata
from headrace.targets.qualcomm.soc import find_soc
from tests.targets.qualcomm import tiny_qdq
from tests.targets.qualcomm.conftest import CONTEXTS, LENGTHS, PARTS, TinyTarget, write_tokenizer


def _plan(**changes: Any) -> GeniePlan:
    config = tiny_qdq.tiny_config()
    parts = tiny_qdq.plan_parts(config, PARTS)
    values = {"lengths": LENGTHS, "contexts": CONTEXTS, "soc": find_soc("snapdragon-8-elite"), "eos": (2,), "pad": 0}
    return GeniePlan(config, parts, **(values | changes))


def test_configuration_follows_the_plan() -> None:
    config = genie_config(_plan(), ["a.bin", "b.bin"])["dialog"]
    assert config["context"] == {
        "version": 1, "size": 512, "n-vocab": 320, "bos-token": -1, "eos-token": [2], "pad-token": 0,
    }  # fmt: skip
    htp = config["engine"]["backend"]["QnnHtp"]
    assert (htp["kv-dim"], htp["pos-id-dim"], htp["rope-theta"]) == (64, 32, 10000.0)
    assert config["sampler"]["top-k"] == 1
    sampling = Sampling(0.3, 5, 0.85, repetition_penalty=1.05)
    sampled = genie_config(_plan(bos=1, sampling=sampling), [])["dialog"]
    assert sampled["context"]["bos-token"] == 1
    assert sampled["sampler"]["top-p"] == 0.85
    assert sampled["sampler"]["token-penalty"]["repetition-penalty"] == 1.05
    assert _plan(lengths=(128, 1), contexts=(4096,)).longest_prompt == 3969


def test_geniex_counts_the_model_from_its_metadata() -> None:
    """As llm_spec_loader.cpp of GenieX's QAIRT plugin reads it."""
    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    plan = _plan(bos=1, sampling=Sampling(0.3, 5, 0.85, repetition_penalty=1.05))
    plan = replace(plan, config=replace(plan.config, rope_scaling=scaling))
    found = json.loads(json.dumps(geniex_metadata(plan, "tiny")))
    assert found["model_id"] == "tiny" and "architectures" not in found  # which would have to be a text there
    graphs = found["model_files"]
    assert set(graphs) == {f"ar{s}_cl{c}_{n}_of_{PARTS}" for n in range(1, PARTS + 1) for s, c in plan.steps}
    tensors = {name: t["shape"] for graph in graphs.values() for name, t in graph["inputs"].items()}
    tensors |= {name: t["shape"] for graph in graphs.values() for name, t in graph["outputs"].items()}
    keys = {int(name.split("_")[2]): shape for name, shape in tensors.items() if name.startswith("past_key")}
    config = plan.config
    assert max(keys) + 1 == config.num_layers
    assert (keys[0][0], keys[0][2]) == (config.num_kv_heads, config.head_dim)
    assert tensors["logits"][-1] == config.vocab_size and tensors["hidden_1"][-1] == config.hidden_size
    assert "input_ids" in graphs[f"ar{LENGTHS[0]}_cl{CONTEXTS[0]}_1_of_{PARTS}"]["inputs"]
    block = found["geniex"]
    assert block["ctx_bins"] == [binary_name(part) for part in plan.parts]
    assert block["context"] == {"max_context_length": 512, "bos_token": 1, "eos_token": [2], "pad_token": 0}
    stretch = block["positional_encoding"]["rope_scaling"]
    assert (stretch["rope_type"], stretch["factor"], stretch["original_max_position_embeddings"]) == (
        "llama3", 32.0, 8192,
    )  # fmt: skip
    assert block["sampler"]["temp"] == 0.3 and block["sampler"]["token-penalty"]["repetition-penalty"] == 1.05


def test_marks_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(TargetError, match="pad id 320 is not in the vocabulary of 320 tokens"):
        _plan(pad=320)
    with pytest.raises(TargetError, match="bos id -1 is not"):
        _plan(bos=-1)
    with pytest.raises(TargetError, match="expected at least one of each"):
        _plan(eos=())


def _set(where: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *way, last = where.split(".")
        for key in way:
            config = config[key]
        config[last] = value

    return change


def _drop(where: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *way, last = where.split(".")
        for key in way:
            config = config[key]
        del config[last]

    return change


HTP = "dialog.engine.backend.QnnHtp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("dialog.context.n_vocab", 320), "unknown key 'n_vocab' in dialog.context; did you mean 'n-vocab'"),
        (_set("dialogue", {}), "unknown key 'dialogue' in the file; did you mean 'dialog'"),
        (_set(f"{HTP}.pos-id-dim", 64), "pos-id-dim is 64; expected 32"),
        (_set(f"{HTP}.kv-dim", 32), "kv-dim is 32; expected 64"),
        (_set("dialog.context.n-vocab", 321), "n-vocab is 321; expected 320"),
        (_set("dialog.context.size", 72), "size is 72; expected 512"),
        (_set("dialog.context.bos-token", 1), "bos-token is 1; expected -1"),
        (_drop("dialog.context.pad-token"), r"dialog\.context\.pad-token is missing; expected 0"),
        (_drop("dialog.context.bos-token"), r"dialog\.context\.bos-token is missing"),
        (_set("dialog.type", "spd"), 'dialog.type is "spd"; expected "basic"'),
        (_set(f"{HTP}", []), "QnnHtp is .*; expected an object"),
        (_set("dialog.engine.model.binary.ctx-bins", ["a.bin", "a.bin"]), "expected every binary once"),
        (_set("dialog.engine.model.binary.ctx-bins", []), "expected every binary once"),
        (_set("dialog.engine.model.binary.ctx-bins", ["../a.bin"]), "each a file beside it"),
    ],
)
def test_a_wrong_configuration_is_one_line(change: Callable[[dict[str, Any]], None], message: str) -> None:
    plan = _plan()
    config = genie_config(plan, ["a.bin", "b.bin"])
    assert check_genie_config(Path(CONFIG_FILE), config, plan) == ["a.bin", "b.bin"]
    change(config)
    with pytest.raises(TargetError, match=message):
        check_genie_config(Path(CONFIG_FILE), config, plan)


def test_matters_of_taste_are_left_alone() -> None:
    plan = _plan()
    config = genie_config(plan, ["a.bin"])
    config["dialog"]["sampler"] = {"version": 1, "temp": 0.7, "token-penalty": {"version": 1, "presence-penalty": 0.1}}
    config["dialog"]["engine"]["n-threads"] = 6
    config["dialog"]["stop-sequence"] = ["\n\n"]
    assert check_genie_config(Path(CONFIG_FILE), config, plan) == ["a.bin"]


@pytest.fixture(scope="module")
def phone(target: TinyTarget) -> Path:
    """The phone's folder, complete."""
    write_tokenizer(target.emulation / "tokenizer.json", target.plan.config.vocab_size)
    written = write_genie_folder(
        target.phone,
        target.plan,
        name="tiny",
        tokenizer=target.emulation / "tokenizer.json",
        sample_prompt="hello",
        qairt_build=target.shared[0].info.build,
        package="onnxruntime-qnn 2.7.0",
    )
    assert {path.name for path in written} >= {CONFIG_FILE, BACKEND_FILE, "README.md", "metadata.yaml"}
    return target.phone


@pytest.mark.qnn
def test_the_phone_folder_is_as_planned(target: TinyTarget, phone: Path) -> None:
    config = check_genie_folder(phone, target.plan)
    assert config["dialog"]["engine"]["model"]["binary"]["ctx-bins"] == [binary_name(p) for p in target.plan.parts]
    readme, metadata = ((phone / name).read_text(encoding="utf-8") for name in ("README.md", "metadata.yaml"))
    for line in ("adb push . ", "lib/hexagon-v79/unsigned", "genie-t2t-run -c genie_config.json", "older than\n2.51.0"):
        assert line in readme
    assert f'qairt_build: "{target.shared[0].info.build}"' in metadata and 'qairt_minimum: "2.51.0"' in metadata
    assert f"Built with QAIRT {target.shared[0].info.build[1:]}; needs at least QAIRT 2.51.0 on the device." in readme


@pytest.mark.qnn
def test_a_phone_folder_is_not_for_emulation(target: TinyTarget, phone: Path) -> None:
    with pytest.raises(TargetError, match="which only a phone can open"):
        check_genie_folder(phone, target.plan, emulation=True)


@pytest.mark.qnn
def test_what_is_wrong_in_a_folder_is_one_line(target: TinyTarget, phone: Path, tmp_path: Path) -> None:
    plan = target.plan

    def refuses(message: str, changed: str, content: str | bytes | None, plan: GeniePlan = plan) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for file in phone.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if content is None:
            (folder / changed).unlink()
        else:
            (folder / changed).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(TargetError, match=message):
            check_genie_folder(folder, plan)

    backend = (phone / BACKEND_FILE).read_text(encoding="utf-8")
    refuses(r"unknown soc_model 9999; expected one of .* 69 ", BACKEND_FILE, backend.replace("69", "9999"))
    refuses("is for soc_model 57, v79; expected 69, v79", BACKEND_FILE, backend.replace("69", "57"))
    refuses("states no soc_model", BACKEND_FILE, "{}")
    refuses("keys .*'memories'.* are unknown", BACKEND_FILE, backend.replace('"memory"', '"memories"'))
    refuses("tokenizer.json is missing", "tokenizer.json", None)
    refuses("is not a tokenizer", "tokenizer.json", "{}")
    refuses("is not JSON", CONFIG_FILE, "{")
    refuses("holds a list; expected a JSON object", CONFIG_FILE, "[]")
    refuses("there is no context binary at", binary_name(plan.parts[1]), None)
    refuses("both hold ar32_cl72_1_of_3", binary_name(plan.parts[1]), target.shared[0].path.read_bytes())
    readme = (phone / "README.md").read_bytes()
    refuses(
        r"graphs missing: \['ar8_cl512_1.*, not expected: \['ar1_cl512_1",
        "README.md",
        readme,
        replace(plan, lengths=(32, 8)),
    )
    other = {**plan.encodings, "hidden_2": replace(target.model.encodings["hidden_2"], scale=0.5)}
    refuses("output hidden_2 has scale .*; expected scale 0.5", "README.md", readme, replace(plan, encodings=other))


@pytest.mark.qnn
def test_parts_that_do_not_meet_are_caught(target: TinyTarget) -> None:
    plan = replace(target.plan, encodings={})
    infos = {made.path: made.info for made in target.shared}
    _check_graphs(Path(), infos, plan)
    path, info = target.shared[1].path, target.shared[1].info

    def refuses(message: str, **changes: Any) -> None:
        graphs = []
        for graph in info.graphs:
            tensors = tuple(replace(t, **changes) if t.name == "hidden_2" else t for t in graph.outputs)
            graphs.append(replace(graph, outputs=tensors))
        with pytest.raises(TargetError, match=message):
            _check_graphs(Path(), {**infos, path: replace(info, graphs=tuple(graphs))}, plan)

    refuses("output hidden_2 of ar32_cl72_2_of_3 is missing .* token 0 forever", name="hidden_two")
    refuses("hidden_2 has scale .* expected one quantization everywhere", offset=-7)
    incomplete = {**infos, path: replace(info, graphs=info.graphs[:3])}
    with pytest.raises(TargetError, match=r"graphs missing: \['ar1_cl512_2_of_3'\]"):
        _check_graphs(Path(), incomplete, plan)
    unnamed = replace(info, graphs=(replace(info.graphs[0], name="main_graph"), *info.graphs[1:]))
    with pytest.raises(TargetError, match="Genie cannot parse graph name 'main_graph'"):
        _check_graphs(Path(), {**infos, path: unnamed}, plan)
