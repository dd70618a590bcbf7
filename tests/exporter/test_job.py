"""export: what it makes, and what it refuses before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.bundle.recipe import Recipe, Rule
from headrace.checkpoint import open_checkpoint
from headrace.errors import BundleError, CalibrationError, ConfigError, RecipeError, UserError
from headrace.exporter.job import export
from tests.exports import SMALL, Exports, contents, write_checkpoint
from tests.oracle.quantized import stored_weights
from tests.tiny import MAX_POSITIONS

# int4 with an MSE clip on normally distributed weights: relative error of a row.
NEAR = {4: 0.2, 8: 0.02}


@pytest.mark.parametrize("kind", ["gqa", "tied", "mha", "wide"])
def test_the_stored_weights_are_the_checkpoints(exports: Exports, kind: str) -> None:
    bundle = exports.bundle(kind, parts=3)
    checkpoint = open_checkpoint(exports.checkpoint(kind))
    stored = stored_weights(bundle)
    expected = set(checkpoint.names) - ({"lm_head.weight"} if checkpoint.config.tied_head else set())
    assert set(stored) == expected
    for name, weight in stored.items():
        original = checkpoint.tensor(name).load()
        if original.ndim == 1:
            np.testing.assert_array_equal(weight, original)
        else:
            sizes = np.linalg.norm(original, axis=1)
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # rotary pairs may be moved by powers of two
                weight = weight * np.exp2(np.rint(np.log2(sizes / np.linalg.norm(weight, axis=1))))[:, None]
            error = np.linalg.norm(weight - original, axis=1) / sizes
            assert error.max() < NEAR[4 if "_proj" in name else 8], name


def test_progress_reaches_every_end(run: Any, tmp_path: Path) -> None:
    totals: dict[str, list[tuple[int, int]]] = {}
    out = run(progress=lambda stage, done, total: totals.setdefault(stage, []).append((done, total)))
    assert out == tmp_path / "out"
    assert {"embedding and head", "quantizing layers", "host graphs", "writing the bundle"} <= set(totals)
    for stage, steps in totals.items():
        assert steps[-1][0] == steps[-1][1], stage
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no work folder is left"


def test_the_same_export_gives_the_same_bytes(run: Any, exports: Exports) -> None:
    assert contents(run()) == contents(exports.bundle())


def test_a_foreign_folder_is_refused_before_anything_is_done(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    seen: list[str] = []
    with pytest.raises(BundleError, match="exists and is no bundle; choose another -o or remove it"):
        run(progress=lambda stage, *_: seen.append(stage))
    assert not seen
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Refusals


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"context": MAX_POSITIONS + 1}, ConfigError, f"--context {MAX_POSITIONS + 1} is not possible; this model was"),
        ({"context": (100, 4096)}, ConfigError, "--context 4096 is not possible"),
        ({"context": 0}, UserError, "--context '0' is not possible; expected whole numbers above 0"),
        ({"context": ()}, UserError, "--context '' is not possible"),
        ({"prompt_length": ()}, UserError, "--prompt-length '' is not possible"),
        ({"prompt_length": (16, 900)}, ConfigError, "--prompt-length 900 is not possible"),
        ({"context": 32}, ConfigError, "--context 32 does not exceed --prompt-length 32"),
        ({"prompt_length": "8,x"}, UserError, "--prompt-length '8,x' is not possible"),
        ({"prompt_length": 600}, ConfigError, "--prompt-length 600 is not possible"),
        ({"parts": 6}, ConfigError, "--parts 6 is not possible; expected 1 to 5"),
        ({"parts": 0}, UserError, "--parts 0 is not possible; expected a whole number, 1 or more"),
        ({"windows": 0}, UserError, "--windows 0 is not possible"),
        ({"jobs": "many"}, UserError, "--jobs many is not possible; expected a whole number, 1 or more"),
        ({"bits": float("nan")}, RecipeError, "--bits nan is not possible; expected an average from 4 to 8 bits"),
        ({"bits": "inf"}, RecipeError, "--bits inf is not possible"),
        ({"bits": 3.9}, RecipeError, "--bits 3.9 is not possible"),
        ({"size": "5 apples"}, UserError, "--size '5 apples' is not possible; expected a number of bytes, such as"),
        ({"keep_onnx": "yes"}, UserError, "--keep-onnx 'yes' is not possible; expected True or False"),
        ({"kv": ""}, UserError, "--kv '' is not possible"),
        ({"contexts": 64}, UserError, "unknown option 'contexts'; did you mean 'context'?"),
        ({"block": 128}, RecipeError, "block 128 does not divide the rows of layers.0.self_attn.q_proj.weight (64"),
        ({"block": 48}, RecipeError, "block 48 is not possible; expected channel, 16"),
        ({"recipe": "w4a61"}, RecipeError, "recipe 'w4a61' is neither a shipped one"),
        ({"method": "gtpq"}, RecipeError, "method 'gtpq' is unknown; did you mean 'gptq'?"),
        (
            {"keep_grid": True, "rotate": True},
            RecipeError,
            "--keep-grid keeps weights as they are and --rotate",
        ),
        ({"kv": "int4"}, RecipeError, "kv 'int4' is unknown; expected int8 or float32"),
        ({"window_length": 500}, CalibrationError, "tokens, which is less than one window of 500"),
        ({"calibration": ["absent.txt"]}, CalibrationError, "calibration text absent.txt cannot be read"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_impossible_options(
    run: Any, exports: Exports, tmp_path: Path, options: dict[str, Any], kind: type[UserError], message: str
) -> None:
    if "window_length" in options:
        short = tmp_path / "short.txt"
        short.write_text("a short text")
        options = {**options, "calibration": [short]}
    with pytest.raises(kind) as error:
        run(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_calibration_that_is_no_text(run: Any, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match=r"x\.bin cannot be read \(.*\); expected a UTF-8 file"):
        run(calibration=[tmp_path / "x.bin"])


def test_four_bit_tables_are_refused(run: Any) -> None:
    recipe = Recipe("small", (Rule(".", 4, None, "nearest"),))
    with pytest.raises(RecipeError, match=r"recipe 'small' gives embed_tokens\.weight 4 bits; expected 5, 6 or 8"):
        run(recipe=recipe)


def test_a_checkpoint_without_a_tokenizer(exports: Exports, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        export(folder, tmp_path / "out", **SMALL, calibration=[exports.text])
