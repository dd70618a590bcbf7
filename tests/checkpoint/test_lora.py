"""LoRA adapters: opening a model with them is opening their merge; what does not fit is one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.lora import adapted
from headrace.errors import CheckpointError, ConfigError, UserError
from headrace.quantize.source import load_weight
from tests.tiny import DTYPES, write_baichuan, write_gguf, write_llama, write_qwen2, write_torch

Array = NDArray[np.float32]
ROUNDING = 1e-6  # relative to the largest value: sums of float32 products in another order
RANK, ALPHA = 4, 6.0
Q, DOWN, PACK = "self_attn.q_proj", "mlp.down_proj", "self_attn.W_pack"


def layers(*modules: str, count: int = 3) -> list[str]:
    return [f"model.layers.{layer}.{module}" for layer in range(count) for module in modules]


def write_adapter(
    folder: Path,
    base: Path,
    modules: list[str],
    *,
    ranks: Mapping[str, int] = {},
    seed: int = 0,
    dtype: str = "float32",
    form: str = "safetensors",
    **settings: Any,
) -> dict[str, Array]:
    """An adapter of some modules of a folder, as PEFT writes one; B·A of each, without the factor."""
    rng = np.random.default_rng(seed)
    stored = load_file(base / "model.safetensors")
    tensors, products = {}, {}
    for module in modules:
        rows, columns = stored[f"{module}.weight"].shape
        rank = ranks.get(module, RANK)
        if "embed_tokens" in module:  # its pair gives the table turned, and its names have no ".weight"
            rows, columns = columns, rows
        a, b = (rng.normal(0, 0.3, shape).astype(DTYPES[dtype]) for shape in ((rank, columns), (rows, rank)))
        kind, end = ("lora_embedding_", "") if "embed_tokens" in module else ("lora_", ".weight")
        tensors[f"base_model.model.{module}.{kind}A{end}"] = a
        tensors[f"base_model.model.{module}.{kind}B{end}"] = b
        product = b.astype(np.float32) @ a.astype(np.float32)
        products[module] = product.T if "embed_tokens" in module else product
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "bias": "none"}
    config |= {"fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "modules_to_save": None} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if form == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        write_torch(folder / "adapter_model.bin", tensors)
    return products


def merge(base: Path, out: Path, changes: Mapping[str, Array]) -> Path:
    """The folder with changes added to its float32 tensors."""
    out.mkdir()
    for name in ("config.json", "generation_config.json"):
        (out / name).write_bytes((base / name).read_bytes())
    tensors = load_file(base / "model.safetensors")
    for module, change in changes.items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + change
    save_file(tensors, out / "model.safetensors")
    return out


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.config == expected.config and found.names == expected.names
    changed = 0
    for name in expected.names:
        want, have = expected.tensor(name).load(), found.tensor(name).load()
        np.testing.assert_allclose(have, want, atol=ROUNDING * np.abs(want).max(), err_msg=name)
        np.testing.assert_array_equal(found.tensor(name).read(3, 7), have[3:7], err_msg=name)
        changed += found.tensor(name).dtype == "float32"
    assert changed


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_is_its_merge(tmp_path: Path, form: str, dtype: str) -> None:
    base = write_llama(tmp_path / "base")
    products = write_adapter(tmp_path / "a", base, layers(Q, DOWN), dtype=dtype, form=form)
    merged = merge(base, tmp_path / "merged", {m: p * np.float32(ALPHA / RANK) for m, p in products.items()})
    assert_same(adapted(open_checkpoint(base), [tmp_path / "a"]), open_checkpoint(merged))


def test_rank_stabilised_and_patterns(tmp_path: Path) -> None:
    """The first pattern that fits the end of a name counts, and is a regular expression."""
    base = write_llama(tmp_path / "base")
    modules = layers(Q, DOWN)
    ranks = {module: 2 if "layers.1" in module else 8 if "down" in module else RANK for module in modules}
    products = write_adapter(
        tmp_path / "a", base, modules, ranks=ranks, use_rslora=True,
        rank_pattern={r"layers\.1\..*": 2, "mlp.down_proj": 8}, alpha_pattern={"q_proj": 10},
    )  # fmt: skip
    alphas = {module: 10 if "q_proj" in module else ALPHA for module in modules}
    factors = {module: np.float32(alphas[module] / math.sqrt(ranks[module])) for module in modules}
    merged = merge(base, tmp_path / "merged", {m: p * factors[m] for m, p in products.items()})
    assert_same(adapted(open_checkpoint(base), [tmp_path / "a"]), open_checkpoint(merged))


def test_several_adapters_are_added(tmp_path: Path) -> None:
    base = write_qwen2(tmp_path / "base")
    first = write_adapter(tmp_path / "a", base, layers(Q), lora_alpha=2)
    second = write_adapter(tmp_path / "b", base, [*layers(Q, DOWN), "lm_head", "model.embed_tokens"], seed=1)
    changes = {module: product * np.float32(ALPHA / RANK) for module, product in second.items()}
    for module, product in first.items():
        changes[module] = changes[module] + product * np.float32(2 / RANK)
    merged = merge(base, tmp_path / "merged", changes)
    assert_same(adapted(open_checkpoint(base), [tmp_path / "a", tmp_path / "b"]), open_checkpoint(merged))


def test_rows_are_the_same_bits_whatever_is_read_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows within a piece, from piece to piece and at its borders."""
    monkeypatch.setattr("headrace.checkpoint.lora.PIECE", 5)
    base = write_llama(tmp_path / "base")
    products = write_adapter(tmp_path / "a", base, [*layers(Q, count=1), "model.embed_tokens"])
    found = adapted(open_checkpoint(base), [tmp_path / "a"])
    for module, product in products.items():
        name = f"{module.removeprefix('model.')}.weight"
        tensor, stored = found.tensor(name), open_checkpoint(base).tensor(name).load()
        whole = tensor.load()
        np.testing.assert_allclose(
            whole - stored, product * np.float32(ALPHA / RANK), atol=ROUNDING * np.abs(whole).max()
        )
        for start, stop in ((0, 1), (0, 5), (3, 5), (3, 12), (4, 6), (5, 10), (len(whole) - 1, len(whole)), (7, 7)):
            np.testing.assert_array_equal(tensor.read(start, stop), whole[start:stop])


@pytest.mark.parametrize("split", [False, True], ids=["folder", "gguf"])
def test_a_fused_module_is_cut_as_its_weight_is(tmp_path: Path, split: bool) -> None:
    """Baichuan's W_pack, also over a GGUF, which has q, k and v apart."""
    base = write_baichuan(tmp_path / "base", 1)
    products = write_adapter(tmp_path / "a", base, layers(PACK, DOWN))
    merged = merge(base, tmp_path / "merged", {m: p * np.float32(ALPHA / RANK) for m, p in products.items()})
    source = write_gguf(tmp_path / "m.gguf", architecture="baichuan", kv_heads=4) if split else base
    found = adapted(open_checkpoint(source), [tmp_path / "a"])
    if split:
        assert found.config.rope_theta == 50_000  # the writer's; the weights are what counts here
        for name in found.names:
            want = open_checkpoint(merged).tensor(name).load()
            np.testing.assert_allclose(found.tensor(name).load(), want, atol=ROUNDING * np.abs(want).max())
    else:
        assert_same(found, open_checkpoint(merged))


def test_only_layers_of_a_tied_or_normalised_head(tmp_path: Path) -> None:
    tied, normalised = write_llama(tmp_path / "tied", tied=True), write_baichuan(tmp_path / "v2", 2)
    write_adapter(tmp_path / "a", tied, ["model.embed_tokens"])
    with pytest.raises(ConfigError, match="'embed_tokens', but the embedding and the head of this model are one"):
        adapted(open_checkpoint(tied), [tmp_path / "a"])
    write_adapter(tmp_path / "b", normalised, ["lm_head"])
    with pytest.raises(ConfigError, match="'lm_head', but this head is normalised"):
        adapted(open_checkpoint(normalised), [tmp_path / "b"])


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


def lose(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if part not in name}, path)


BAD: dict[str, tuple[Callable[[Path], Any], type[UserError], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), CheckpointError, "has no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), CheckpointError, "has no weights; expected"),
    "not json": (lambda f: (f / "adapter_config.json").write_text("{"), CheckpointError, "is not JSON"),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"short"), CheckpointError, "5 bytes"),
    "prefix tuning": (lambda f: edit(f, peft_type="PREFIX_TUNING"), ConfigError, "peft_type is 'PREFIX_TUNING'"),
    "dora": (lambda f: edit(f, use_dora=True), ConfigError, "use_dora is True: DoRA scales whole weights"),
    "kasa": (lambda f: edit(f, kasa_config={"beta": 1e-4}), ConfigError, "KaSA cuts singular values off the model"),
    "biases": (lambda f: edit(f, bias="lora_only"), ConfigError, "bias is 'lora_only': trained biases"),
    "pair with bias": (lambda f: edit(f, lora_bias=True), ConfigError, "lora_bias is True"),
    "whole modules": (lambda f: edit(f, modules_to_save=["lm_head"]), ConfigError, "modules_to_save is"),
    **{
        start: (lambda f, start=start: edit(f, init_lora_weights=start), ConfigError, "which changes the model too")
        for start in ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga")
    },
    "unknown module": (
        lambda f: rename(f, "q_proj", "q_porj"), CheckpointError, r"does not have; did you mean 'layers\.\d\.self_attn",
    ),
    "another layer": (lambda f: rename(f, "layers.2", "layers.7"), CheckpointError, "of 3 layers does not have"),
    "another shape": (lambda f: rename(f, "q_proj", "k_proj"), CheckpointError, r"by \[64, 64\]; expected \[32, 64\]"),
    "no pair": (lambda f: lose(f, "lora_B"), CheckpointError, "has A of 'layers.0.self_attn.q_proj'"),
    "a magnitude": (
        lambda f: rename(f, "lora_A.weight", "lora_magnitude_vector"), CheckpointError, "is no part of a LoRA pair",
    ),
    "another rank": (lambda f: edit(f, r=8), ConfigError, r"shapes \[4, 64\] and \[64, 4\]; expected rank 8"),
    "rank is a word": (lambda f: edit(f, r="four"), ConfigError, "r is 'four'; expected a whole number"),
    "a pattern that tries back": (lambda f: edit(f, rank_pattern={r"(a)\1": 4}), ConfigError, "no regular expression"),
    "too large a pattern": (lambda f: edit(f, rank_pattern={"((a{9}){999}){9}": 4}), ConfigError, "10000 places"),
    "a huge factor": (lambda f: edit(f, lora_alpha=1e300), ConfigError, "expected below 1e.06"),
    "a broken pattern": (lambda f: edit(f, rank_pattern={"(": 4}), ConfigError, "no regular expression"),
    "a pattern's word": (lambda f: edit(f, alpha_pattern={"q_proj": "x"}), ConfigError, "gives 'x' for"),
    "pattern is a list": (lambda f: edit(f, rank_pattern=[4]), ConfigError, "expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_adapter_is_one_line(tmp_path: Path, case: str) -> None:
    damage, kind, message = BAD[case]
    base = write_llama(tmp_path / "base")
    write_adapter(tmp_path / "a", base, layers(Q))
    adapted(open_checkpoint(base), [tmp_path / "a"])
    damage(tmp_path / "a")
    with pytest.raises(kind, match=message) as caught:
        adapted(open_checkpoint(base), [tmp_path / "a"])
    assert "\n" not in str(caught.value)


def test_a_sum_beyond_float32_is_named_where_it_is_used(tmp_path: Path) -> None:
    write_llama(tmp_path / "base")
    module = layers(Q)[0]
    write_adapter(tmp_path / "adapter", tmp_path / "base", [module])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * np.float32(1e38) for name, tensor in load_file(file).items()}, file)
    checkpoint = adapted(open_checkpoint(tmp_path / "base"), [tmp_path / "adapter"])
    with pytest.raises(CheckpointError, match=r"q_proj.* no number or beyond"):
        load_weight(checkpoint, "layers.0.self_attn.q_proj.weight")
