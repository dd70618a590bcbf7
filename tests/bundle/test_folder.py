"""The bundle on disk: opened only as it was written, and every changed bit named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.bundle import blocks
from headrace.bundle import folder as bundle_module
from headrace.bundle.folder import (
    FORMAT,
    MANIFEST,
    check_files,
    is_bundle,
    open_bundle,
    publish,
    read_json,
    write_file,
)
from headrace.errors import BundleError, UserError
from headrace.files import temporary_name
from tests.exports import CONTEXT, LAYERS, PROMPT_LENGTH, Exports

FILES = [
    MANIFEST,
    "encodings.json",
    "generation_config.json",
    *(f"part_{i}_of_5.onnx" for i in range(1, 6)),
    "tokenizer.model",
    "tokenizer_config.json",
    *(f"weights/part_{i}_of_5.safetensors" for i in range(1, 6)),
]


@pytest.fixture
def path(exports: Exports, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return exports.copy(tmp_path / "bundle")


def flip(file: Path, at: int | None = None, bit: int = 0) -> None:
    """Alter one bit; in the middle by default."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1 << bit
    file.write_bytes(data)


def restate(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest with other content and a right digest, as another program might have written it."""
    raw = json.loads((path / MANIFEST).read_text())
    raw.pop("digest")
    change(raw)
    raw["digest"] = bundle_module._digest(raw)
    (path / MANIFEST).write_text(json.dumps(raw, ensure_ascii=False, indent=1))


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as error:
        open_bundle(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_manifest_of_before_biases_opens(path: Path) -> None:
    """Its geometry lacks the fields that came later: they have defaults."""
    before = open_bundle(path).config

    def older(raw: dict[str, Any]) -> None:
        for key in ("qkv_bias", "output_bias", "mlp_bias", "sliding_window"):
            del raw["geometry"][key]

    restate(path, older)
    assert open_bundle(path).config == before


def test_the_list_of_files_is_complete(path: Path) -> None:
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) == sorted(FILES)


def test_what_opening_tells(path: Path, exports: Exports) -> None:
    bundle = open_bundle(path)
    assert bundle.root == path
    assert (bundle.prompt_length, bundle.contexts, bundle.context) == (PROMPT_LENGTH, (CONTEXT,), CONTEXT)
    assert (len(bundle.parts), bundle.config.num_layers, len(bundle.kv_scales)) == (5, LAYERS, LAYERS)
    assert all(key > 0 and value > 0 for key, value in bundle.kv_scales)
    assert bundle.kv_dtype == "int8"
    assert bundle.weight_bytes == sum(f.stat().st_size for f in (path / "weights").iterdir())
    assert bundle.graph(bundle.parts[1]) == path / "part_2_of_5.onnx"
    assert bundle.recipe.name == "w4a16"
    assert bundle.provenance["checkpoint"] == exports.checkpoint().name
    assert set(bundle.files) == set(FILES) - {MANIFEST}
    assert bundle.read_json("generation_config.json")["eos_token_id"] == 2
    assert bundle.read_json("absent.json") == {}
    assert open_bundle(exports.bundle("gqa", kv="float32")).kv_dtype == "float32"


def test_an_untouched_bundle_is_as_written(path: Path) -> None:
    seen: list[str] = []
    assert check_files(path, seen.append) == []
    assert sorted(seen) == sorted(set(FILES) - {MANIFEST})
    (path / "README.md").write_text("the card may be edited")
    assert check_files(path) == []
    open_bundle(path)


@pytest.mark.parametrize("name", FILES)
def test_one_altered_bit_is_named(path: Path, name: str) -> None:
    flip(path / name)
    assert [problem[0] for problem in check_files(path)] == [name]
    assert name in refusal(path), "all of these are small, and hashed when the bundle is opened"


def test_blocks_of_larger_files_are_looked_at(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "HASHED_WHOLE", 4000)
    name = "weights/part_1_of_5.safetensors"
    assert 4000 < (path / name).stat().st_size < blocks.BLOCK
    before = path.rename(path.with_name("before"))
    manifest = {key: value for key, value in read_json(before / MANIFEST).items() if key not in ("files", "digest")}
    (before / MANIFEST).unlink()
    publish(before, path, manifest, aside=path.with_name("aside"))
    listed = open_bundle(path).files
    assert "blocks" in listed[name] and not any("blocks" in listed[n] for n in listed if n.endswith(".onnx"))
    monkeypatch.setattr(blocks, "SAMPLED", sum("blocks" in file for file in listed.values()))  # so all are looked at
    flip(path / name)
    assert f"{path / name} was changed (its MiB 0 differs); export the bundle again" in refusal(path)
    flip(path / name)
    for wrong in ("", "0" * 7, None, ["0" * 8]):
        restate(path, lambda raw, wrong=wrong: raw["files"][name].update(blocks=wrong))
        assert "misstates 'files'" in refusal(path)
    flip(path / name)
    restate(path, lambda raw: [file.pop("blocks", None) for file in raw["files"].values()])
    open_bundle(path)  # as bundles that were written before there were sums: the size is right
    assert [problem[0] for problem in check_files(path)] == [name]


def test_a_card_that_was_half_written_is_nobodys_file(path: Path) -> None:
    """A process that was killed leaves it; the next card takes its place."""
    half = temporary_name(path / "README.md")
    half.write_text("half")
    assert check_files(path) == []
    bundle_module.refuse_foreign(path)
    write_file(path / "README.md", b"whole")
    assert not half.exists() and check_files(path) == []


def test_every_bit_of_the_manifest_counts(path: Path) -> None:
    """Also those that JSON does not see: 1e-06 and 1E-06 are one number."""
    original = (path / MANIFEST).read_bytes()
    assert b"e-0" in original, "the example has a number with an exponent"
    exponents = [at for at in range(len(original)) if original[at : at + 2] == b"e-"]
    for number, at in enumerate([*exponents, *range(0, len(original), 7)]):
        data = bytearray(original)
        data[at] ^= 0x20 if number < len(exponents) else 1 << number % 8
        (path / MANIFEST).write_bytes(data)
        with pytest.raises(BundleError):
            bundle_module._manifest(path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_or_longer_file_is_named(path: Path, name: str) -> None:
    size = (path / name).stat().st_size
    with (path / name).open("ab") as file:
        file.write(b"\0")
    assert check_files(path) == [(name, f"has {size + 1} bytes, expected {size}")]
    assert f"{path / name} has {size + 1} bytes, expected {size}" in refusal(path)
    (path / name).unlink()
    assert check_files(path) == [(name, "is missing")]
    assert f"{path / name} is missing" in refusal(path)


def test_an_extra_file_is_named(path: Path) -> None:
    (path / "weights" / "extra.bin").write_bytes(b"x")
    ((name, problem),) = check_files(path)
    assert name == "weights/extra.bin"
    assert "manifest" in problem


def test_a_newer_format_says_update(path: Path) -> None:
    restate(path, lambda raw: raw.update(format=FORMAT + 1))
    assert refusal(path) == f"{path} has format {FORMAT + 1}; this headrace reads up to {FORMAT}: update headrace"


def test_format_1_is_read_but_for_the_weights_that_it_stored_otherwise(path: Path) -> None:
    restate(path, lambda raw: raw.update(format=1))
    open_bundle(path)
    rule = {"match": "_proj", "bits": 6, "block": 32, "method": "gptq"}
    restate(path, lambda raw: raw["recipe"]["rules"].insert(0, rule))
    assert refusal(path) == (
        f"{path} holds 5- or 6-bit weights in the order of format 1; expected {FORMAT}: export the bundle again"
    )


@pytest.mark.parametrize("version", [0, None, "1", 1.5, True])
def test_a_strange_format(path: Path, version: object) -> None:
    restate(path, lambda raw: raw.update(format=version))
    assert f"has format {version!r}; expected {FORMAT}" in refusal(path)


@pytest.mark.parametrize("key", ["files", "geometry", "plan", "recipe", "kv_scales", "provenance"])
@pytest.mark.parametrize("value", [..., None, 3, "x", [1], {"a": 1}], ids=str)
def test_a_manifest_that_lacks_or_misstates(path: Path, key: str, value: object) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw[key] = value
        if value is ...:
            del raw[key]

    if key == "provenance" and value == {"a": 1}:
        return  # whoever uses it says what is missing
    restate(path, change)
    with pytest.raises(UserError) as error:
        open_bundle(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "weights/../../secret", "out/secret", "a\\..\\b", "C:\\x", "a\0b"]
)
def test_a_manifest_that_names_other_peoples_files(path: Path, name: str) -> None:
    (path.parent / "secret").write_text("x")
    (path / "out").symlink_to(path.parent)
    restate(path, lambda raw: raw["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    assert refusal(path).endswith(f"names {name!r}, which is not below the bundle; export the bundle again")
    (problem,) = check_files(path)
    assert problem[0] == MANIFEST


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plan.prompt_lengths", []),
        ("plan.prompt_lengths", [0]),
        ("plan.prompt_lengths", [8, 32]),
        ("plan.prompt_lengths", [32.0]),
        ("plan.prompt_lengths", [True]),
        ("plan.prompt_lengths", "32"),
        ("plan.prompt_lengths", [CONTEXT]),
        ("plan.contexts", [-5]),
        ("plan.contexts", [CONTEXT, 64]),
        ("plan.contexts", [1 << 40]),
        ("plan.parts", 0),
        ("plan.parts", 99),
        ("plan.parts", "five"),
        ("kv_scales", [[1.0, 1.0]]),
        ("kv_scales", [[1.0]] * LAYERS),
        ("kv_scales", [[1.0, 0.0]] * LAYERS),
        ("kv_scales", [[-1.0, 1.0]] * LAYERS),
        ("kv_scales", [[float("nan"), 1.0]] * LAYERS),
        ("kv_scales", [[10**400, 1.0]] * LAYERS),
        ("kv_scales", [[float("inf"), 1.0]] * LAYERS),
        ("kv_scales", [["1", "1"]] * LAYERS),
        ("kv_scales", {"0": [1, 1]}),
        ("provenance", None),
        ("geometry.num_layers", 0),
        ("geometry.num_layers", 1 << 30),
        ("geometry.architecture", ["llama"]),
        ("geometry.tied_head", "yes"),
        ("geometry.rope_theta", 10**400),
        ("geometry.rope_scaling", {"kind": "linear", "factor": "x"}),
        ("geometry.head_dim", -16),
        ("geometry.rms_norm_eps", float("nan")),
    ],
    ids=str,
)
def test_a_manifest_of_values_that_cannot_be(path: Path, key: str, value: object) -> None:
    outer, _, inner = key.partition(".")

    def change(raw: dict[str, Any]) -> None:
        if inner:
            raw[outer][inner] = value
        else:
            raw[outer] = value

    restate(path, change)
    line = refusal(path)
    assert MANIFEST in line and line.endswith("export the bundle again") and len(line) < 400


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", "null", "[" * 100_000])
def test_a_manifest_that_is_none(path: Path, content: str) -> None:
    (path / MANIFEST).write_text(content)
    assert MANIFEST in refusal(path)


def test_no_bundle(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x") == f"{tmp_path / 'x'} is no folder; expected one made by: headrace export"
    assert f"{tmp_path} has no headrace.json" in refusal(tmp_path)
    with pytest.raises(BundleError, match=r"has no headrace\.json"):
        check_files(tmp_path)
    assert not is_bundle(tmp_path)


def test_weights_are_as_long_as_the_geometry_says(path: Path) -> None:
    """A manifest can be right about sizes that its geometry cannot have."""
    restate(path, lambda raw: raw["geometry"].update(vocab_size=raw["geometry"]["vocab_size"] + 1))
    with pytest.raises(BundleError, match=r"part_1_of_5\.safetensors has \d+ bytes; its geometry and recipe want"):
        open_bundle(path).weights()


def test_a_name_that_no_file_can_have(path: Path) -> None:
    for name in ("a" * 300, "a/" * 3000, "a\nb", "\u202e"):
        restate(path, lambda raw, name=name: raw["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
        assert "which is not below the bundle" in refusal(path)
        restate(path, lambda raw, name=name: raw["files"].pop(name))
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"w4a16"', '"\\ud800"'))
    assert MANIFEST in refusal(path)


def test_a_bundle_that_was_replaced_while_it_was_opened(path: Path, exports: Exports) -> None:
    opened = open_bundle(path)
    opened.refuse_replaced()
    shutil.rmtree(path)
    exports.copy(path, parts=3)
    with pytest.raises(BundleError, match="was replaced while it was opened; open it again"):
        opened.refuse_replaced()


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in (b"[1]", b"{", b"\xff{}"):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="expected a JSON object"):
            read_json(path)
    with pytest.raises(BundleError, match="is missing"):
        read_json(tmp_path / "absent.json")
