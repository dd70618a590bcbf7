"""Which files of a repository are chosen: one format, complete, and nothing that is not the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from headrace.errors import CheckpointError
from headrace.exporter.repository import RepositoryFile, choose

CONFIG = ["config.json", "tokenizer.json", "README.md"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SPLIT = ["big/m-Q8_0-00001-of-00002.gguf", "big/m-Q8_0-00002-of-00002.gguf"]
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}


def chosen(
    names: list[str], wanted: str | None = None, index: Mapping[str, Any] = INDEX
) -> tuple[list[str], list[str]]:
    beside, weights = choose([RepositoryFile(name, 10) for name in names], wanted, lambda _: index)
    return [file.name for file in beside], [file.name for file in weights]


GOOD: dict[str, tuple[list[str], str | None, list[str]]] = {  # files, --file, the weights
    "single": (["model.safetensors", "pytorch_model.bin", "x.gguf"], None, ["model.safetensors"]),
    "single and index": (
        ["model.safetensors", "model.safetensors.index.json", *SHARDS], None, ["model.safetensors"],
    ),
    "index": (
        ["model.safetensors.index.json", *SHARDS, "pytorch_model.bin", "model-00003-of-00003.safetensors"],
        None, [*SHARDS, "model.safetensors.index.json"],
    ),
    "no index": ([*SHARDS, "consolidated.safetensors"], None, SHARDS),
    "other name": (["tiny.safetensors", "adapter_model.safetensors", "optimizer.bin"], None, ["tiny.safetensors"]),
    "bin": (["pytorch_model.bin", "optimizer.bin", "tf_model.h5", "x.gguf"], None, ["pytorch_model.bin"]),
    "only gguf": (["m.gguf", "mmproj-m.gguf"], None, ["m.gguf"]),
    "split gguf": ([*SPLIT, "mmproj-m.gguf"], None, SPLIT),
    "gguf by name": (["model.safetensors", "m-Q4_0.gguf", *SPLIT], "m-Q4_0.gguf", ["m-Q4_0.gguf"]),
    "gguf by a part": (["m-Q4_0.gguf", *SPLIT], "q8_0", SPLIT),
    "gguf by one of its files": (["m-Q4_0.gguf", *SPLIT], SPLIT[1], SPLIT),
    "a whole word wins": (["m-Q4_K.gguf", "m-Q4_K_M.gguf"], "Q4_K", ["m-Q4_K.gguf"]),
    "weights by name": (["model.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors",
                        ["model.fp16.safetensors"]),
    "adapter": (["adapter_model.safetensors", "adapter_config.json"], None, ["adapter_model.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_weights(case: str) -> None:
    names, wanted, expected = GOOD[case]
    assert chosen([*CONFIG, *names], wanted)[1] == expected


def test_what_goes_with_them() -> None:
    more = [
        "LICENSE.txt", "Community License for Baichuan2 Model.pdf", "NOTICE", "tokenizer.model", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    junk = ["trainer_state.json", "modeling_x.py", "onnx/config.json", "../config.json", "/etc/passwd", "a\\b.json"]
    beside, _ = chosen([*CONFIG, *more, *junk, "model.safetensors"])
    assert beside == sorted([*CONFIG, *more])
    assert chosen([*CONFIG, *more, "m.gguf"])[0] == sorted(["README.md", *more[:3]])
    assert chosen([*CONFIG, "adapter_config.json", "adapter_model.bin"])[0] == ["README.md", "adapter_config.json"]


@pytest.mark.parametrize(
    ("names", "wanted", "index", "message"),
    [
        (["a.gguf", "b.gguf"], None, INDEX, r"has 2 models: a.gguf \(0.0 GB\), b.gguf .* add --file NAME"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "q4_0", INDEX, "'q4_0' is in several names; expected one of a-Q4_0.gguf, b"),
        (["a.gguf"], "b.gguf", INDEX, r"'b.gguf' is no file of the repository; did you mean 'a.gguf'\?"),
        (["tf_model.h5"], None, INDEX, r"no weights that are read \(it has .h5, .json, .md\)"),
        ([SHARDS[0]], None, INDEX, "the repository lacks model-00002-of-00002.safetensors"),
        ([SPLIT[0]], None, INDEX, "the repository lacks big/m-Q8_0-00002-of-00002.gguf"),
        (["model.safetensors.index.json"], None, INDEX, f"names '{SHARDS[0]}'; expected files of the repository"),
        (["model.safetensors.index.json"], None, {}, "names no file; expected files of the repository"),
        (["m-00001-of-99999.gguf"], None, INDEX, "lacks m-00002-of-99999.gguf"),
    ],
)
def test_one_line_says_why_not(names: list[str], wanted: str | None, index: Mapping[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        chosen([*CONFIG, *names], wanted, index)
    assert "\n" not in str(caught.value)
