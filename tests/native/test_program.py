"""The recorded program: an interpreter of the documented format gives the eager decoder's logits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from headrace.bundle.folder import Bundle, open_bundle
from headrace.model.reference import eager_logits
from headrace.model.rope import rope_tables
from headrace.native.listing import program_lines
from headrace.native.program import Program, record_program
from tests.exports import LAYERS, VOCAB, Exports
from tests.native.interpreter import Interpreter

IDS = np.random.default_rng(7).integers(0, VOCAB, 24).tolist()
TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order


def interpreter(program: Program) -> Interpreter:
    cos, sin = rope_tables(program.config, program.context)
    return Interpreter(json.loads(json.dumps(program.to_dict())), {"cos": cos, "sin": sin})


@pytest.fixture(
    params=[
        ("gqa", {}),
        ("gqa", {"recipe": "w4b32"}),
        ("mha", {}),
        ("tied", {}),
        ("wide", {"parts": 1}),
        ("qwen2", {}),
        ("gqa", {"recipe": "lpbq"}),
        ("gqa", {"recipe": "float16"}),
    ],
    ids=["gqa", "blocks", "mha", "tied", "one-part", "biases", "five-and-six", "five-and-six-float16"],
)  # fmt: skip
def bundle(request: pytest.FixtureRequest, exports: Exports) -> Bundle:
    kind, options = request.param
    options_of_kind: dict[str, Any] = {"kv": "float32", **options}
    if (recipe := options.get("recipe")) in ("lpbq", "float16"):
        options_of_kind["recipe"] = exports.mixed(recipe)
    return open_bundle(exports.bundle(kind, **options_of_kind))


def test_program_is_the_decoder(bundle: Bundle) -> None:
    eager = eager_logits(bundle.config, bundle.weights().read, np.array([IDS]))[0]
    found = interpreter(record_program(bundle)).run(IDS, range(len(IDS)))
    assert np.abs(found - eager).max() < TOLERANCE * np.abs(eager).max()


def test_wanted_rows_are_enough_after_the_last_attention(bundle: Bundle) -> None:
    program = record_program(bundle)
    whole = interpreter(program).run(IDS, range(len(IDS)))
    np.testing.assert_allclose(interpreter(program).run(IDS, [5, 23]), whole[[5, 23]], atol=1e-4)
    ops = [instruction.op for instruction in program.instructions]
    assert ops.index("rows") == len(ops) - 1 - ops[::-1].index("attention") + 1
    assert interpreter(program).run(IDS, []).shape == (0, VOCAB)


def test_registers_are_used_again(exports: Exports) -> None:
    program = record_program(open_bundle(exports.bundle("gqa")))
    results = sum(len(i.operands(("out", "sum"))) for i in program.instructions)
    assert len(program.registers) == 7, "the stream, its norm, q, k, v, gate and up; the mixed values take free ones"
    assert results > 7 * LAYERS


def test_only_what_is_used_is_named(exports: Exports) -> None:
    bundle = open_bundle(exports.bundle("tied"))
    said = record_program(bundle).to_dict()
    used = {name for i in said["instructions"] for name in i.get("weights", [i.get("weight")])} - {None}
    assert set(said["weights"]) == {name for name in used if f"{name}_packed" in said["tensors"]}
    assert "lm_head.weight" not in said["weights"]
    assert len(said["files"]) == len(bundle.parts)


def test_cache_and_context(exports: Exports) -> None:
    bundle = open_bundle(exports.bundle("gqa"))
    said = record_program(bundle, 64).to_dict()
    assert said["geometry"]["context"] == 64
    assert said["cache"] == {"dtype": "int8", "scales": [list(pair) for pair in bundle.kv_scales]}
    assert record_program(bundle).to_dict()["geometry"]["context"] == bundle.context


@pytest.mark.parametrize("recipe,group", [("w4a16", 64), ("w4b32", 32)])
def test_prompts_have_scales_as_often_as_blocks_do_and_an_exact_head(exports: Exports, recipe: str, group: int) -> None:
    program = record_program(open_bundle(exports.bundle("gqa", kv="float32", recipe=recipe)))
    groups = {i.op: {j.fields["group"] for j in program.instructions if j.op == i.op} for i in program.instructions
              if "group" in i.fields}  # fmt: skip
    assert groups == {"linear": {group}, "head": {0}}
    listed = "\n".join(program_lines(program))
    assert listed.count(f"int8 by {group}") == 4 * LAYERS and " fine " in listed.splitlines()[-1]


def test_listing_shows_every_instruction_and_every_byte(exports: Exports) -> None:
    bundle = open_bundle(exports.bundle("qwen2"))
    program = record_program(bundle)
    head, body = (part.splitlines() for part in "\n".join(program_lines(program)).split("\n\n"))
    assert len(body) == len(program.instructions)
    assert body[-1].split()[1:4] == ["head", "logits", "←"]
    told = sum(int(line.split()[-2].replace(",", "")) for line in body if line.endswith("bytes"))
    assert f"weights    {told:,} bytes a token" in head
    table = sum(program.tensors[f"embed_tokens.weight_{kind}"].nbytes for kind in ("packed", "scale"))
    stored = sum(tensor.nbytes for tensor in program.tensors.values())
    assert told == stored - table + table // VOCAB, "every weight, and one row of the embedding"
