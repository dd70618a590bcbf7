"""verify --genie: each field of a Genie folder against its model, whoever made the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import TargetError
from headrace.measure.genie_folder import verify_genie_folder

# As Llama-3.2-1B-Instruct is published; written out here.
MODEL = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": True,
    "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
# As such folders are published: keys that headrace's own has not, and engine settings of its own.
GENIE = {
    "dialog": {
        "version": 1, "type": "basic",
        "context": {
            "version": 1, "size": 4096, "n-vocab": 128256, "bos-token": 128000,
            "eos-token": [128001, 128009, 128008],
        },
        "sampler": {"version": 1, "seed": 42, "temp": 0.8, "top-k": 40, "top-p": 0.95},
        "tokenizer": {"version": 1, "path": "tokenizer.json"},
        "engine": {
            "version": 1, "n-threads": 3,
            "backend": {"version": 1, "type": "QnnHtp", "QnnHtp": {"version": 1, "kv-dim": 64, "pos-id-dim": 32}},
            "model": {
                "version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": ["a.bin", "b.bin"]},
                "positional-encoding": {
                    "type": "rope", "rope-dim": 32, "rope-theta": 500000,
                    "rope-scaling": {
                        "rope-type": "llama3", "factor": 32.0, "low-freq-factor": 1.0, "high-freq-factor": 4.0,
                        "original-max-position-embeddings": 8192,
                    },
                },
            },
        },
    }
}  # fmt: skip
PATHS = {
    "context": ("context",), "htp": ("engine", "backend", "QnnHtp"), "engine": ("engine",),
    "position": ("engine", "model", "positional-encoding"), "model": ("engine", "model"), "dialog": (),
    "scaling": ("engine", "model", "positional-encoding", "rope-scaling"), "binary": ("engine", "model", "binary"),
}  # fmt: skip


def write(folder: Path, model: dict[str, Any] = MODEL) -> dict[str, Any]:
    """The model's config.json in folder/model, and binaries and tokenizer in folder/genie; the dialog, to be altered
    and stored by `broken`."""
    for name, files in (("model", ["config.json"]), ("genie", ["a.bin", "b.bin", "tokenizer.json"])):
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_text(json.dumps(model))
    return json.loads(json.dumps(GENIE))["dialog"]  # type: ignore[no-any-return]


def broken(folder: Path, dialog: dict[str, Any]) -> list[str]:
    """What does not hold, as "field: found"."""
    (folder / "genie" / "genie_config.json").write_text(json.dumps({"dialog": dialog}))
    links = verify_genie_folder(folder / "genie", folder / "model")
    assert len(links) >= 8
    return [f"{link.name.removeprefix('dialog.')}: {link.found}" for link in links if not link.ok]


def test_a_right_folder_holds(tmp_path: Path) -> None:
    dialog = write(tmp_path)
    assert broken(tmp_path, dialog) == []
    assert broken(tmp_path, {**dialog, "engine": [dialog["engine"]]}) == []  # a list of engines


@pytest.mark.parametrize(
    ("where", "key", "value", "told"),
    [
        ("scaling", "factor", 8.0, "engine.model.positional-encoding.rope-scaling.factor: 8.0"),
        ("scaling", "rope-type", "default", "engine.model.positional-encoding.rope-scaling.rope-type: default"),
        ("scaling", "low-freq-factor", None, "engine.model.positional-encoding.rope-scaling.low-freq-factor: absent"),
        ("position", "rope-theta", 10000.0, "engine.model.positional-encoding.rope-theta: 10000.0"),
        ("position", "rope-dim", 64, "engine.model.positional-encoding.rope-dim: 64"),
        ("htp", "kv-dim", 128, "engine.backend.QnnHtp.kv-dim: 128"),
        ("htp", "pos-id-dim", True, "engine.backend.QnnHtp.pos-id-dim: True"),
        ("context", "n-vocab", 128000, "context.n-vocab: 128000"),
        ("context", "n-vocab", None, "context.n-vocab: absent"),
        ("context", "size", 262144, "context.size: 262144"),
        ("context", "bos-token", 1, "context.bos-token: 1"),
        ("context", "eos-token", [128001], "context.eos-token: [128001]"),
        ("context", "eos-token", 2_000_000, "context.eos-token: [2000000]"),
        ("context", "pad-token", 128256, "context.pad-token: 128256"),
        ("dialog", "embedding", {"size": 4096}, "embedding.size: 4096"),
        ("binary", "ctx-bins", ["a.bin", "c.bin"], "files that it names: c.bin missing"),
        ("binary", "ctx-bins", "a.bin", "files that it names: 0 binaries and a tokenizer"),
    ],
)
def test_each_field_is_held_against_the_model(tmp_path: Path, where: str, key: str, value: Any, told: str) -> None:
    dialog = write(tmp_path)
    inside: Any = dialog
    for step in PATHS[where]:
        inside = inside[step]
    if value is None:
        del inside[key]
    else:
        inside[key] = value
    assert told in broken(tmp_path, dialog)


def test_a_missing_stretch_is_told(tmp_path: Path) -> None:
    dialog = write(tmp_path)
    del dialog["engine"]["model"]["positional-encoding"]
    dialog["engine"]["backend"]["QnnHtp"]["rope-theta"] = 500000
    assert broken(tmp_path, dialog) == ["engine.model.positional-encoding: absent"]


def test_a_model_without_a_stretch(tmp_path: Path) -> None:
    plain = {**MODEL, "rope_scaling": None, "rope_theta": 10000.0}
    dialog = write(tmp_path, plain)
    name = "engine.model.positional-encoding"
    found = broken(tmp_path, dialog)
    assert [line.partition(": ")[0] for line in found] == [f"{name}.rope-theta", f"{name}.rope-scaling"]
    del dialog["engine"]["model"]["positional-encoding"]
    assert broken(tmp_path, dialog) == []  # Genie's own base is the model's
    dialog["engine"]["backend"]["QnnHtp"]["rope-theta"] = 1000000
    assert broken(tmp_path, dialog) == ["engine.backend.QnnHtp.rope-theta: 1000000"]


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    dialog = write(tmp_path)
    with pytest.raises(TargetError, match=r"genie_config\.json.*name a Genie folder"):
        verify_genie_folder(tmp_path / "model", tmp_path / "model")
    broken(tmp_path, dialog)
    with pytest.raises(TargetError, match=r"lies in no bundle; name the model it is of: --checkpoint DIR"):
        verify_genie_folder(tmp_path / "genie")
    with pytest.raises(TargetError, match=r"config\.json"):
        verify_genie_folder(tmp_path / "genie", tmp_path / "nothing")
    (tmp_path / "genie" / "genie_config.json").write_text('{"dialog": 3}')
    with pytest.raises(TargetError, match="has no 'dialog'"):
        verify_genie_folder(tmp_path / "genie", tmp_path / "model")
