"""Where a checkpoint came from: what its card, a GGUF or pull's record says reaches the bundle and its model card."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

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
    pulled = {"repository": record["repository"], "revision": "abc"}
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
    assert "license: apache-2.0" in make_card(bundle, {"license": "apache-2.0"})


@pytest.mark.parametrize("text", ["no front matter", "---\n: [\n---\n", "---\nlicense: [1, 2]\n---\n"])
def test_a_card_that_says_nothing_is_no_error(exports: Exports, tmp_path: Path, text: str) -> None:
    source = Path(copytree(exports.checkpoint(), tmp_path / "river"))
    (source / "README.md").write_text(text, encoding="utf-8")
    assert origin_of(open_checkpoint(source)) == {}
