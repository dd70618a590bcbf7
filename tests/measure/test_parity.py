"""verify: each broken link is found, and named before those after it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.bundle.folder import open_bundle
from headrace.bundle.work_folder import SCRATCH
from headrace.errors import BundleError
from headrace.measure import native_parity, parity
from headrace.measure.native_parity import instruction_sets
from headrace.measure.parity import Link, verify_bundle
from headrace.runtime.engine import Engine
from tests.checkpoint.test_lora import write_adapter
from tests.exports import Exports
from tests.tiny import write_llama

OPTIONS = {"block": 16}


BEST, *OTHERS = instruction_sets() or ("",)
NATIVE = ["as shipped → native"] if not BEST else [
    f"as shipped → native, {BEST}",
    "float → native, token by token",
    *(name for isa in OTHERS for name in (f"as shipped → native, {isa}", f"native, {BEST} → {isa}, few tokens")),
]  # fmt: skip
FEW = [f"native, {BEST} → {isa}, few tokens" for isa in OTHERS]


def names(links: list[Link]) -> list[str]:
    return [link.name for link in links]


def test_the_whole_chain(exports: Exports) -> None:
    steps: list[str] = []
    path = exports.bundle("calm", **OPTIONS)
    links = verify_bundle(path, exports.checkpoint("calm"), progress=lambda stage, *_: steps.append(stage))
    assert all(link.ok for link in links), links
    assert names(links) == [
        "files",
        "checkpoint → quantized weights",
        "quantized weights → one float graph",
        "one graph → 5 parts",
        "prompt steps → token by token, float cache",
        "float → as shipped (int8 arithmetic, cache)",
        "prompt steps → token by token, as shipped",
        *NATIVE,
    ]
    assert {"hashing", "comparing"} <= set(steps)
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(SCRATCH)] == []
    assert links[0].to_dict() == {"name": "files", "found": "13 files as written", "limit": links[0].limit, "ok": True}
    assert json.dumps([link.to_dict() for link in links])


def test_without_a_checkpoint(exports: Exports) -> None:
    links = verify_bundle(exports.bundle("calm", **OPTIONS))
    assert len(links) == 6 + len(NATIVE)
    assert names(verify_bundle(exports.bundle("calm", **OPTIONS), files_only=True)) == ["files"]


def test_a_float_cache(exports: Exports) -> None:
    assert all(link.ok for link in verify_bundle(exports.bundle("calm", kv="float32", **OPTIONS)))


def test_changed_files_end_the_chain(exports: Exports, tmp_path: Path) -> None:
    path = exports.copy(tmp_path / "b", "calm", **OPTIONS)
    (path / "weights" / "part_2_of_5.safetensors").unlink()
    (path / "extra").write_text("x")
    (link,) = verify_bundle(path)
    assert not link.ok
    assert "weights/part_2_of_5.safetensors is missing" in link.found
    assert "extra" in link.found


def test_another_checkpoint(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has another geometry than .*; give the checkpoint it was made of"):
        verify_bundle(exports.bundle("calm", **OPTIONS), write_llama(tmp_path / "c"))
    links = verify_bundle(exports.bundle("calm", **OPTIONS), exports.checkpoint("gqa"))
    assert [link.name for link in links if not link.ok] == ["checkpoint → quantized weights"]


def test_the_adapters_of_a_bundle_are_asked_for(exports: Exports, tmp_path: Path) -> None:
    base, folder = exports.checkpoint("calm"), tmp_path / "adapter"
    write_adapter(folder, base, ["model.layers.1.mlp.up_proj"])
    bundle = exports.bundle("calm", **OPTIONS, lora=str(folder))
    with pytest.raises(BundleError, match=r"made with other adapters \(adapter\); expected the same"):
        verify_bundle(bundle, base)
    assert all(link.ok for link in verify_bundle(bundle, base, adapters=[folder]))
    with pytest.raises(BundleError, match=r"made with other adapters \(none\)"):
        verify_bundle(exports.bundle("calm", **OPTIONS), base, adapters=[folder])


def test_a_wrong_graph_is_found(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary base that graphs and eager decoder do not share breaks the first link between them."""
    from headrace.targets.host import runner

    real = runner.rope_tables
    monkeypatch.setattr(runner, "rope_tables", lambda config, n: real(replace(config, rope_theta=100.0), n))
    links = verify_bundle(exports.bundle("calm", **OPTIONS))
    assert next(link.name for link in links if not link.ok) == "quantized weights → one float graph"


def test_steps_that_forget_their_past_are_found(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.score

    def forgetful(self: Engine, ids: list[int], chunk: int | None = None) -> np.ndarray:
        if chunk == 1:
            return np.concatenate([real(self, [i]) for i in ids])
        return real(self, ids, chunk)

    monkeypatch.setattr(parity.Engine, "score", forgetful)
    broken = [link.name for link in verify_bundle(exports.bundle("calm", **OPTIONS)) if not link.ok]
    steps = ["prompt steps → token by token, float cache", "prompt steps → token by token, as shipped"]
    # Every other instruction set is held to the engine's own tokens, which are wrong now.
    assert broken == [*steps, *NATIVE[1:2], *FEW]


@pytest.mark.kernels
def test_a_wrong_engine_is_found(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary base that only the native engine has breaks its own links and no other."""
    from headrace.native import runner

    real = runner.rope_tables
    monkeypatch.setattr(runner, "rope_tables", lambda config, n: real(replace(config, rope_theta=100.0), n))
    links = verify_bundle(exports.bundle("calm", **OPTIONS))
    assert [link.name for link in links if not link.ok] == [name for name in NATIVE if name not in FEW]


def test_without_the_engine_it_is_told(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_parity, "find_spec", lambda name: None)
    link = verify_bundle(exports.bundle("calm", **OPTIONS))[-1]
    assert (link.name, link.ok) == ("as shipped → native", True)
    assert link.found == "not run: headrace-kernels is not installed"


def test_numbers_that_are_none_fail(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    real = parity.eager_logits
    monkeypatch.setattr(parity, "eager_logits", lambda *a, **k: real(*a, **k) * np.float32(np.nan))
    broken = [link.name for link in verify_bundle(exports.bundle("calm", **OPTIONS)) if not link.ok]
    assert "quantized weights → one float graph" in broken
    assert "float → as shipped (int8 arithmetic, cache)" in broken


def test_a_read_only_place(exports: Exports, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside a bundle that may not be written, the weights are copied into the system's temporary folder."""
    monkeypatch.setattr(parity.os, "access", lambda *_: False)
    monkeypatch.setattr(parity.tempfile, "gettempdir", lambda: str(tmp_path))
    assert all(link.ok for link in verify_bundle(exports.bundle("calm", **OPTIONS)))
    assert not list(tmp_path.iterdir())


def test_the_sample_fits_the_context(exports: Exports) -> None:
    bundle = open_bundle(exports.bundle("calm", context=64))
    assert len(parity._sample(bundle)) == 64
    assert all(link.ok for link in verify_bundle(bundle.root))
