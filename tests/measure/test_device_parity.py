"""verify beyond the host: a sound model passes every link, a broken layer is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.bundle.encodings import ATTENTION_MASK, mask_encoding, read_encodings, write_encodings
from headrace.bundle.folder import open_bundle
from headrace.bundle.grid import QuantizedTensor
from headrace.cli.main import _run
from headrace.measure import device_parity
from headrace.measure.device_parity import Depth, device_links
from headrace.measure.link import Link
from headrace.measure.parity import _sample
from tests.exports import PHONE, Exports

LAYERS = ["  layer 0", "  layer 1"]
MASK = "blocked positions' share of attention"
GRIDS = ["eager → the device's grids", "the same at the end of the context"]
DEVICE = [GRIDS[0], MASK, GRIDS[1], "the device's grids → device graphs on this CPU"]


def broken(links: list[Link]) -> list[str]:
    return [link.name for link in links if not link.ok]


@pytest.mark.parametrize("kind", ["phone", "calm"])
def test_the_device_graphs_of_a_sound_model(exports: Exports, kind: str) -> None:
    options = {"parts": 3} if kind == "phone" else {}
    bundle = open_bundle(exports.bundle(kind, **options))
    links = list(device_links(bundle, _sample(bundle), Depth.DEVICE, layers=True))
    assert broken(links) == []
    layers = [f"  layer {i}" for i in range(bundle.config.num_layers - 1)]
    assert [link.name for link in links] == [*DEVICE[:-1], *layers, DEVICE[-1]]
    assert all("SQNR" in link.found and "LSB" in link.found for link in links if link.name != MASK)


@pytest.mark.qnn
@pytest.mark.parametrize("form", ["channel", "block of 16", "every width"])
def test_the_whole_chain(exports: Exports, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    own = {"channel": {}, "block of 16": {"block": 16}, "every width": {"recipe": exports.mixed("lpbq", "phone")}}
    path = exports.bundle("phone", **PHONE, **own[form])
    status = _run(["verify", str(path), "--through", "genie", "--json"])
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    links = {link["name"]: link for link in report["links"]}
    assert [link for link in report["links"] if not link["ok"]] == [] and status == 0
    assert list(links)[-6:] == [*DEVICE, "device graphs → HTP emulation", "HTP emulation → Genie's tokens"]
    assert links["HTP emulation → Genie's tokens"]["found"] == "8 of 8 equal"


Break = Callable[[pytest.MonkeyPatch, Path], None]


def _double_a_scale(monkeypatch: pytest.MonkeyPatch, _bundle: Path) -> None:
    """The device graphs' layer 1 with one matrix twice as large."""
    write = device_parity.write_device_graphs

    def other(config: Any, parts: Any, read: Any, *rest: Any, **options: Any) -> Any:
        def changed(name: str) -> Any:
            value = read(name)
            if name == "layers.1.mlp.down_proj.weight":
                assert isinstance(value, QuantizedTensor)
                value = value._replace(scales=value.scales * 2)
            return value

        return write(config, parts, changed, *rest, **options)

    monkeypatch.setattr(device_parity, "write_device_graphs", other)


def _swap_nibbles(monkeypatch: pytest.MonkeyPatch, _bundle: Path) -> None:
    """The device graphs' layer 0 with the columns of a matrix exchanged pairwise."""
    write = device_parity.write_device_graphs

    def other(config: Any, parts: Any, read: Any, *rest: Any, **options: Any) -> Any:
        def changed(name: str) -> Any:
            value = read(name)
            if name == "layers.0.self_attn.o_proj.weight":
                codes = value.codes.copy()
                codes[:, 0::2], codes[:, 1::2] = value.codes[:, 1::2], value.codes[:, 0::2]
                value = value._replace(codes=codes)
            return value

        return write(config, parts, changed, *rest, **options)

    monkeypatch.setattr(device_parity, "write_device_graphs", other)


@pytest.mark.parametrize(("change", "first"), [(_double_a_scale, 1), (_swap_nibbles, 0)])
def test_a_broken_layer_is_the_first_that_is_named(
    exports: Exports, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], change: Break, first: int
) -> None:
    path = exports.bundle("calm")
    change(monkeypatch, path)
    bundle = open_bundle(path)
    links = list(device_links(bundle, _sample(bundle), Depth.DEVICE, layers=True))
    assert broken(links)[0] == f"  layer {first}"
    assert DEVICE[-1] not in broken(links), "the kept graphs are another derivation and sound"
    assert _run(["verify", str(path), "--through", "device", "--layers"]) == 1
    assert f"failed: layer {first}: SQNR" in capfd.readouterr().err


def test_a_range_that_is_too_small_breaks_the_grids(
    exports: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = exports.copy(tmp_path / "b", "calm")
    bundle = open_bundle(path)
    file = path / "encodings.json"
    body = json.loads(file.read_text(encoding="utf-8"))
    entry = next(e for e in body["activation_encodings"] if e["name"] == "layers.1.residual")
    entry["scale"] = [s / 100 for s in entry["scale"]]
    file.write_text(json.dumps(body), encoding="utf-8")
    # The simulation and the graphs both clip there: the links from the eager model are what breaks.
    assert broken(list(device_links(bundle, _sample(bundle), Depth.DEVICE))) == GRIDS
    # In a bundle that is opened anew the manifest's digest catches it before.
    assert _run(["verify", str(path), "--through", "device"]) == 1
    assert "encodings.json" in capfd.readouterr().err


def test_a_mask_that_is_too_shallow_is_named(exports: Exports, tmp_path: Path) -> None:
    path = exports.copy(tmp_path / "b", "calm")
    bundle = open_bundle(path)
    encodings = read_encodings(path / "encodings.json")
    write_encodings(path / "encodings.json", encodings | {ATTENTION_MASK: mask_encoding(1)})
    links = device_links(bundle, _sample(bundle), Depth.DEVICE)
    mask = next(link for link in links if link.name == MASK)
    assert not mask.ok and "mask 1 deep" in mask.found


def test_depths_are_ordered_and_known(exports: Exports, capfd: pytest.CaptureFixture[str]) -> None:
    assert [depth.rank for depth in Depth] == [0, 1, 2, 3]
    assert _run(["verify", str(exports.bundle("calm")), "--through", "geni"]) == 2
    assert "did you mean 'genie'" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["verify", "--through", "emulation"], ["verify", "--through", "device"], ["chat", "-p", "x", "--runner=genie"]],
)
def test_a_bundle_for_computers_alone_says_so(
    exports: Exports, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def compared(*arguments: object) -> None:
        raise AssertionError("compared what cannot be finished")

    monkeypatch.setattr("headrace.measure.parity._numbers", compared)
    bundle = exports.bundle("calm", block=16)
    assert _run([*words, str(bundle)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {bundle} has no encodings.json: it was made for computers alone")
    assert last.endswith("export with --target or --keep-onnx")
