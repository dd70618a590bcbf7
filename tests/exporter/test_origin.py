"""Where a checkpoint came from: what its card, a GGUF or pull's record says reaches the bundle and its model card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import huggingface_hub
import pytest

import headrace
from headrace.bundle.folder import open_bundle
from headrace.checkpoint import open_checkpoint
from headrace.exporter.hub import RECORD
from headrace.exporter.origin import LICENCES, licence_line, origin_of
from headrace.measure.card import make_card
from tests.exports import SMALL, Exports

CARD = """---
license: other
license_name: baichuan2-community-license
license_link: https://example.org/terms.pdf
language: [zh, en, 7]
---
# A river
"""
COMMUNITY = {
    "license": "other",
    "license_name": "baichuan2-community-license",
    "license_link": "https://example.org/terms.pdf",
}


def test_nothing_is_known_of_a_bare_folder(exports: Exports) -> None:
    origin = origin_of(open_checkpoint(exports.checkpoint()))
    assert origin == {}
    assert licence_line(origin).startswith("licence: not stated")


def test_a_licence_goes_from_the_checkpoint_to_the_card(exports: Exports, tmp_path: Path) -> None:
    source = Path(copytree(exports.checkpoint("mha"), tmp_path / "river"))
    (source / "README.md").write_text(CARD, encoding="utf-8")
    record = {"repository": "baichuan-inc/Baichuan2-7B-Chat", "revision": "abc", "license": "other"}
    (source / RECORD).parent.mkdir(parents=True)
    (source / RECORD).write_text(json.dumps(record), encoding="utf-8")
    pulled = {"repository": record["repository"], "revision": "abc", "languages": "zh,en"}
    assert origin_of(open_checkpoint(source)) == pulled | COMMUNITY
    assert "baichuan2-community-license (https://example.org/terms.pdf)" in licence_line(COMMUNITY)
    (source / "LICENSE").write_text("the terms", encoding="utf-8")
    (source / "Community License for Baichuan.PDF").write_bytes(b"%PDF")
    (source / "NOTICE").symlink_to(tmp_path / "nowhere")
    bundle = headrace.export(source, tmp_path / "b", **{**SMALL, "calibration": [exports.text]})
    assert {file.name: file.read_bytes() for file in (bundle / LICENCES).iterdir()} == {
        "LICENSE": b"the terms",
        "Community License for Baichuan.PDF": b"%PDF",
    }
    assert f"{LICENCES}/LICENSE" in open_bundle(bundle).files
    assert open_bundle(bundle).provenance["origin"] == pulled | COMMUNITY
    text = make_card(bundle, {})
    assert "| [baichuan2-community-license](https://example.org/terms.pdf) |" in text
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data["license_name"] == COMMUNITY["license_name"] and data["base_model"] == record["repository"]
    assert "headrace.json#/provenance/origin" in text
    assert data["language"] == ["zh", "en"] and "Supported languages: Chinese and English" in text
    assert "license: apache-2.0" in make_card(bundle, {"license": "apache-2.0"})


@pytest.mark.parametrize(
    "text", ["no front matter", "---\n: [\n---\n", "---\nlicense: [1, 2]\nlanguage: {a: b}\n---\n"]
)
def test_a_card_that_says_nothing_is_no_error(exports: Exports, tmp_path: Path, text: str) -> None:
    source = Path(copytree(exports.checkpoint(), tmp_path / "river"))
    (source / "README.md").write_text(text, encoding="utf-8")
    assert origin_of(open_checkpoint(source)) == {}


def test_a_card_claims_no_language_that_nobody_stated(exports: Exports) -> None:
    text = make_card(exports.bundle(), {})
    assert "Supported languages: not stated; see the original model" in text
    assert "language" not in huggingface_hub.ModelCard(text).data.to_dict()
    assert "Supported languages: fr, Chinese and English" in make_card(exports.bundle(), {"languages": "fr,zh,en"})


@pytest.mark.parametrize(("stated", "languages"), [(["en"], "en"), (["zh", "en"], "zh,en"), (["e n", 3], None)])
def test_a_gguf_states_its_languages(exports: Exports, stated: list[Any], languages: str | None) -> None:
    source = replace(open_checkpoint(exports.checkpoint()), metadata={"general.languages": stated})
    assert origin_of(source).get("languages") == languages
