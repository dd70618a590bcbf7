"""An export that says done runs: odd shapes, what cannot run is told and not published, and the recorded figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from headrace.bundle.folder import MANIFEST, Bundle, open_bundle
from headrace.checkpoint import open_checkpoint
from headrace.errors import BundleError, RecipeError
from headrace.exporter.job import export
from headrace.measure.parity import verify_bundle
from headrace.model.reference import eager_logits
from headrace.text.tokenizer_folder import load_tokenizer
from tests.exports import SMALL, Exports, write_checkpoint

# GroupQueryAttention takes head dimensions of a multiple of 16, MatMulNBits blocks of 16 columns and more.
SHAPES: list[dict[str, int]] = [
    {"head_dim": 100},  # open_llama_3b
    {"head_dim": 8},
    {"head_dim": 18},
    {"ffn": 100},
    {"hidden": 72, "ffn": 50, "head_dim": 10},
]


def made(exports: Exports, tmp_path: Path, shape: dict[str, int], **options: Any) -> tuple[Path, Path]:
    checkpoint = write_checkpoint(tmp_path / "c", "calm", layers=2, **shape)
    small = {**SMALL, "calibration": [exports.text], "parts": 3, **options}
    return checkpoint, export(checkpoint, tmp_path / "out", **small)


@pytest.mark.parametrize("kv", ["int8", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes_run_as_the_eager_decoder_says(
    exports: Exports, tmp_path: Path, shape: dict[str, int], kv: str
) -> None:
    checkpoint, out = made(exports, tmp_path, shape, kv=kv)
    links = verify_bundle(out, checkpoint, through="device" if kv == "int8" else "host")
    assert [link for link in links if not link.ok] == []
    assert len(links) >= 7


def test_biases_of_rows_that_no_block_divides(exports: Exports, tmp_path: Path) -> None:
    from tests.exports import write_checkpoint as write

    checkpoint = write(tmp_path / "c", "qwen2", hidden=72, heads=4, head_dim=18, ffn=100)
    out = export(checkpoint, tmp_path / "out", **SMALL, calibration=[exports.text])
    floats = [link for link in verify_bundle(out, checkpoint) if "Δ" in link.found]
    assert len(floats) == 3 and all(link.ok for link in floats)


@pytest.mark.parametrize("shape", [{"ffn": 101}], ids=str)
def test_an_odd_row_is_refused_before_work(exports: Exports, tmp_path: Path, shape: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.down_proj\.weight has an odd number of columns \(101\)"):
        made(exports, tmp_path, shape)
    assert not (tmp_path / "out.partial").exists()


def test_a_bundle_that_does_not_run_is_not_published(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bundle: Bundle, steps: Any) -> np.ndarray:
        raise RuntimeError("head_size must be\na multiple of 16")

    monkeypatch.setattr("headrace.targets.host.by_parts.logits_by_parts", broken)
    with pytest.raises(BundleError) as error:
        made(exports, tmp_path, {})
    assert "does not run (head_size must be a multiple of 16); nothing is published" in str(error.value)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()


def test_logits_that_are_no_numbers_are_told(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bundle: Bundle, steps: Any) -> np.ndarray:
        logits = np.zeros((sum(map(len, steps)), 420), np.float32)
        logits[1:3, 7] = np.nan
        return logits

    monkeypatch.setattr("headrace.targets.host.by_parts.logits_by_parts", broken)
    with pytest.raises(BundleError, match=r"no finite numbers at 2 of 33 tokens; nothing is published"):
        made(exports, tmp_path, {})


def test_the_recorded_figure_is_what_quantization_cost(exports: Exports) -> None:
    """Against log-probabilities in double precision, written out here."""
    bundle = open_bundle(exports.bundle("calm"))
    checkpoint = open_checkpoint(exports.checkpoint("calm"))
    ids = load_tokenizer(bundle.root).encode(
        "A headrace is the channel that carries a river to the machine. In 2026, 7 of 10 engineers measured first. "
        "百川东到海，何时复西归？引水渠把河水送到机器。先测量，再优化；每一个数字背后都有一次测量。"
    )
    tokens = np.array([(ids * 2)[:160]])
    store = bundle.weights()
    p, q = (
        x - np.log(np.exp(x).sum(-1, keepdims=True))
        for x in (
            eager_logits(checkpoint.config, lambda name: checkpoint.tensor(name).load(), tokens)[0].astype(np.float64),
            eager_logits(bundle.config, store.read, tokens)[0].astype(np.float64),
        )
    )
    expected = (np.exp(p) * (p - q)).sum(-1).mean()
    assert bundle.provenance["quantization_kl"] == pytest.approx(expected, rel=1e-3)


def test_verify_holds_the_checkpoint_against_that_figure(exports: Exports, tmp_path: Path) -> None:
    """One layer of another training is far below any limit that all recipes could share."""
    name = "checkpoint → quantized weights"
    bundle = exports.bundle("calm")
    (link,) = [x for x in verify_bundle(bundle, exports.checkpoint("calm")) if x.name == name]
    assert link.ok
    other = write_checkpoint(tmp_path / "c", "calm")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= np.float32(0.5)
    save_file(tensors, other / "model.safetensors")
    (changed,) = [x for x in verify_bundle(bundle, other) if x.name == name]
    assert not changed.ok and float(changed.found.split()[1].rstrip(",")) < 1.0
    copy = exports.copy(tmp_path / "old", "calm")  # as older versions wrote it
    raw = json.loads((copy / MANIFEST).read_text())
    del raw["provenance"]["quantization_kl"], raw["digest"]
    from headrace.bundle import folder

    raw["digest"] = folder._digest(raw)
    (copy / MANIFEST).write_text(json.dumps(raw, ensure_ascii=False, indent=1))
    (old,) = [x for x in verify_bundle(copy, other) if x.name == name]
    assert old.ok and old.limit == "KL ≤ 2.5"


def test_verify_on_a_disk_without_hard_links(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.measure import parity

    def none(*_arguments: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(parity.os, "link", none)
    copy = exports.copy(tmp_path / "b", "calm")
    assert all(link.ok for link in verify_bundle(copy))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_unknown_method_is_refused_though_nothing_would_use_it(exports: Exports, tmp_path: Path) -> None:
    recipe = tmp_path / "eight.json"
    recipe.write_text(json.dumps({"name": "eight", "rules": [{"match": ".", "bits": 8}]}))
    with pytest.raises(RecipeError, match="method 'gtpq' is unknown; did you mean 'gptq'"):
        export(exports.checkpoint(), tmp_path / "out", **{**SMALL, "recipe": str(recipe), "method": "gtpq"})
