"""Hostile bundles and what is kept beside them: manifest, recipe, encodings, settings, session, measurement, card.

Most inputs are a good file with some of its values changed and its digest made anew: a digest tells of an accident, and
whoever writes a hostile file writes its digest too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from headrace.bundle import folder as bundle_folder
from headrace.bundle.encodings import port_encodings, read_encodings
from headrace.bundle.folder import MANIFEST, MEASUREMENTS, open_bundle
from headrace.bundle.recipe import load_recipe
from headrace.measure import card as card_file
from headrace.measure.card import write_card
from headrace.measure.record import kept_records, make_record, save_record
from headrace.model.weights import quantized_weights
from headrace.native.program import record_program
from headrace.plan import GraphStyle, ports
from headrace.runtime import session as session_file
from headrace.runtime.sampling import Sampler, SamplingOptions, usable_settings
from headrace.runtime.session import Session, read_session, write_session
from headrace.text.tokenizer_folder import load_tokenizer
from headrace.text.turns import Message, turn_format
from tests.exports import Exports
from tests.hostile.chance import Good, Rng, any_json, changed_json, damaged, parsed
from tests.hostile.format import Format

WIDEST = 4096  # ports and layers looked at


def prepare(folder: Path) -> Good:
    """A tiny bundle with a card and a measurement, and a saved conversation of it."""
    (folder / "exports").mkdir(parents=True)
    exports = Exports(folder / "exports")
    exports.text.write_text("The river runs to the sea.\n" * 60)
    root = Path(shutil.copytree(exports.bundle("mha"), folder / "bundle"))
    body = {"threads": 1, "batch": 1, "prompt": [], "generate": [], "memory": {"peak_bytes": 1}, "model_bytes": 2}
    save_record(root, "bench", make_record("bench", open_bundle(root), "host", body))
    messages = (Message("user", "Where to?"), Message("assistant", "The sea.", (5, 6, 7)))
    write_session(folder / "talk", Session("m", "native", messages, (3, 5, 6, 7), bytes(64)))
    (root / MEASUREMENTS / "bench.json").rename(folder / "bench.json")
    write_card(root, {}, pictures=False)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return files | {name: (folder / name).read_bytes() for name in ("talk", "bench.json")} | {
        "recipe": json.dumps(json.loads(files[MANIFEST])["recipe"]).encode()
    }  # fmt: skip


def _json(rng: Rng, good: bytes, keys: tuple[str, ...] = ()) -> bytes:
    """A JSON file with other values, sometimes another one altogether."""
    if rng.randrange(8) == 0:
        return damaged(rng, good)
    value = changed_json(rng, parsed(good), keys) if rng.randrange(20) else any_json(rng)
    return json.dumps(value).encode()


# Manifest


def manifest(rng: Rng, good: Good) -> bytes:
    """A manifest whose digest fits whatever it says."""
    if rng.randrange(8) == 0:
        return damaged(rng, good[MANIFEST])
    raw = {key: value for key, value in parsed(good[MANIFEST]).items() if key != "digest"}
    raw = changed_json(rng, raw, ("weights/part_1_of_5.safetensors", "../x", "/etc/passwd", "a/" * 3000))
    for key in rng.sample(("plan", "geometry"), rng.randrange(3)):
        if isinstance(raw.get(key), dict):
            raw[key] = changed_json(rng, raw[key], ("rope_scaling", "sliding_window"))
    return signed(raw)


def signed(raw: Any) -> bytes:
    """A manifest's text, with its digest where it can have one."""
    try:
        if isinstance(raw, dict):
            raw["digest"] = bundle_folder._digest(raw)
        return bundle_folder._text(raw)
    except (UnicodeEncodeError, ValueError):
        return json.dumps(raw, indent=1).encode()


def _open_bundle(path: Path) -> None:
    bundle = open_bundle(path.parent)
    assert bundle.pad_id >= 0 and bundle.weight_bytes >= 0 and bundle.step_lengths
    store = bundle.weights()
    for name in store.names[:3]:
        store.read_stored(name)
    for part in bundle.parts[:3]:
        for style in GraphStyle:
            ports(bundle.config, part, style, length=bundle.prompt_length, context=bundle.context)
    record_program(bundle).to_dict()


# Files in it


def recipe(rng: Rng, good: Good) -> bytes:
    """A recipe."""
    return _json(rng, good["recipe"], ("about", "rotate", "block", "method"))


def _open_recipe(path: Path) -> None:
    config = _good(path.parent / "bundle" / path.name).config
    load_recipe(str(path)).resolve(quantized_weights(config))


def encodings(rng: Rng, good: Good) -> bytes:
    """encodings.json."""
    return _json(rng, good["encodings.json"], ("channels",))


def _open_encodings(path: Path) -> None:
    found = read_encodings(path)
    for encoding in found.values():
        codes = encoding.quantize(np.array([-1.0, 0.0, 1e9], np.float32))
        assert np.isfinite(encoding.dequantize(codes)).all()
    port_encodings(_good(path).parts, found)


def settings(rng: Rng, good: Good) -> bytes:
    """generation_config.json."""
    keys = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "eos_token_id", "user_token_id")
    return _json(rng, good["generation_config.json"], keys)


def _open_settings(path: Path) -> None:
    bundle = _good(path)._replace(root=path.parent)
    said = bundle.read_json(path.name)
    assert 0 <= bundle.pad_id < bundle.config.vocab_size
    assert all(note.isprintable() for note in usable_settings(said)[1])
    sampler = Sampler(SamplingOptions.from_generation_config(said))
    logits = np.linspace(-3, 3, bundle.config.vocab_size, dtype=np.float32)
    assert 0 <= sampler.sample(logits, [1, 2, 3], []) < len(logits)
    turn_format(load_tokenizer(path.parent), said)


def _good(path: Path) -> bundle_folder.Bundle:
    """The bundle as it was."""
    return _opened(path.parents[1] / "exports" / "mha-0.bundle")


@cache
def _opened(root: Path) -> bundle_folder.Bundle:
    return open_bundle(root)


# Beside it


def session(rng: Rng, good: Good) -> bytes:
    """A saved conversation with a right digest, mostly."""
    data = good["talk"]
    if rng.randrange(6) == 0:
        return damaged(rng, data)
    at = len(session_file.MAGIC) + 8
    length = int.from_bytes(data[at - 8 : at], "little")
    header = changed_json(rng, json.loads(data[at : at + length])) if rng.randrange(12) else any_json(rng)
    text = json.dumps(header).encode()
    said = len(text) if rng.randrange(8) else rng.choice((0, 1, 1 << 26, (1 << 64) - 1))
    body = data[: at - 8] + said.to_bytes(8, "little") + text + data[at + length : -32]
    return body + hashlib.sha256(body).digest()


def _open_session(path: Path) -> None:
    found = read_session(path)
    found.check("m", "native", path)
    assert all(0 <= token < 1 << 31 for token in found.tokens)


def record(rng: Rng, good: Good) -> bytes:
    """A measurement."""
    return _json(rng, good["bench.json"], ("prompt", "generate"))


def _open_record(path: Path) -> None:
    kept_records(path.parents[1])
    _card_problems(path.parents[1])


def card(rng: Rng, good: Good) -> bytes:
    """A card: its text or its block of facts changed."""
    text = good["README.md"]
    before, mark, block = text.partition(b"<!-- headrace-card\n")
    if rng.randrange(3) == 0:
        return damaged(rng, text)
    facts = changed_json(rng, parsed(block.removesuffix(b"\n-->\n")))
    return before + mark + json.dumps(facts).replace("--", "-\\u002d").encode() + b"\n-->\n"


def _open_card(path: Path) -> None:
    assert all(line.isprintable() for line in _card_problems(path.parent))


def _card_problems(root: Path) -> list[str]:
    """The bundle itself is not what lies here, so it is opened once for all inputs."""
    with patch.object(card_file, "open_bundle", _opened):
        return card_file.card_problems(root)


FORMATS = {
    "manifest": Format(prepare, manifest, f"bundle/{MANIFEST}", _open_bundle),
    "recipe": Format(prepare, recipe, "recipe.json", _open_recipe),
    "encodings": Format(prepare, encodings, "bundle/encodings.json", _open_encodings),
    "generation_config": Format(prepare, settings, "bundle/generation_config.json", _open_settings),
    "session": Format(prepare, session, "talk", _open_session),
    "measurement": Format(prepare, record, f"bundle/{MEASUREMENTS}/bench.json", _open_record),
    "card": Format(prepare, card, "bundle/README.md", _open_card),
}
