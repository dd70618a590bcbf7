"""A tokenizer that does not belong to its model, or that Genie cannot have, is told before anything is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import TokenizerError, UserError
from headrace.exporter.job import export
from headrace.exporter.options import ExportOptions
from headrace.exporter.settings import settle
from headrace.text.tokenizer_folder import load_tokenizer
from tests.exports import SMALL, Exports, write_checkpoint

TARGET = ("snapdragon-8-elite",)


def refusal(checkpoint: Path, tmp_path: Path, **options: Any) -> str:
    """The line that export and plan say, before any work."""
    seen: list[str] = []
    small = {**SMALL, "parts": 3, **options}
    with pytest.raises(UserError) as error:
        export(checkpoint, tmp_path / "out", progress=lambda stage, _d, _t: seen.append(stage), **small)
    with pytest.raises(type(error.value)) as planned:
        settle(checkpoint, ExportOptions.of(small))
    assert str(planned.value) == str(error.value)
    assert not seen and not list(tmp_path.glob("out*"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ordinary_ids_beyond_the_model(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vocab=400)  # its tokenizer has 420 entries
    line = refusal(checkpoint, tmp_path)
    assert line.startswith(f"the tokenizer of {checkpoint} gives id 400 (")
    assert line.endswith("the model knows ids 0 to 399; expected the tokenizer that belongs to it: fetch both again")


def added_token(folder: Path, content: str, token: int) -> None:
    """A special token in tokenizer.json."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["added_tokens"].append(
        {"id": token, "content": content, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")


def test_a_template_that_writes_a_token_beyond_the_model(exports: Exports, tmp_path: Path) -> None:
    rows = load_tokenizer(exports.checkpoint("tied")).vocab_size
    checkpoint = write_checkpoint(tmp_path / "c", "tied", vocab=rows)
    added_token(checkpoint, "<|beyond|>", rows)
    settle(checkpoint, ExportOptions.of(SMALL))  # nothing asks for it, as for many models' <pad>
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "<|beyond|>" + config["chat_template"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert f"gives id {rows} ('<|beyond|>') and the model knows ids 0 to {rows - 1}" in refusal(checkpoint, tmp_path)


def test_turn_ids_beyond_the_model(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", "mha")
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps({**settings, "user_token_id": 500}))
    line = refusal(checkpoint, tmp_path)
    assert "500" in line


@pytest.mark.qnn
def test_a_chip_needs_an_end_token(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", "tied", layers=2)
    (checkpoint / "generation_config.json").unlink()
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("eos_token", "eos_token_ids", "chat_template")}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "eos_token_id"}))
    line = refusal(checkpoint, tmp_path, targets=TARGET)
    assert line == "the model names no end token and Genie needs one: set eos_token_id in generation_config.json"
    settle(checkpoint, ExportOptions.of({**SMALL, "parts": 3}))


@pytest.mark.qnn
def test_a_vocabulary_that_genie_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever cannot be converted is told at once."""
    from headrace.targets.qualcomm import genie_bundle

    def refused(*_arguments: Any) -> str:
        raise TokenizerError("tokenizer.model cannot be converted exactly")

    monkeypatch.setattr(genie_bundle, "sentencepiece_to_tokenizer_json", refused)
    checkpoint = write_checkpoint(tmp_path / "c", "phone")
    assert refusal(checkpoint, tmp_path, targets=TARGET) == "tokenizer.model cannot be converted exactly"
    settle(checkpoint, ExportOptions.of({**SMALL, "parts": 3}))
