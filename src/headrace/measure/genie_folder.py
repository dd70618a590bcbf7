"""verify --genie: a Genie folder's genie_config.json held field by field against the model it is of.

For any folder, ours or another's: a published bundle had a rotary factor of 8 for a model of 32, and Genie takes that
without a word. Only what follows from the model is compared; sampling is a matter of taste. Knows no binary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.architectures import architecture_for
from headrace.bundle.folder import is_bundle, open_bundle
from headrace.config import ModelConfig
from headrace.errors import TargetError
from headrace.files import read_json
from headrace.measure.link import Link
from headrace.targets.qualcomm.genie import CONFIG_FILE, NO_TOKEN, positional_encoding

__all__ = ["verify_genie_folder"]

ROPE_THETA = 10000.0  # what a configuration without one means
_HTP = "engine.backend.QnnHtp"
_POSITION = "engine.model.positional-encoding"


def verify_genie_folder(folder: Path, model: Path | None = None) -> list[Link]:
    """Every field of a folder's genie_config.json that follows from the model, with what it should be.

    Args:
        folder: with genie_config.json.
        model: a bundle, or a Hugging Face folder of which config.json and generation_config.json are read; None for
            the bundle that the folder lies in.

    Raises:
        TargetError: there is no such file, or no model to compare with.
        ConfigError: the model is none that headrace knows.
    """
    dialog = read_json(folder / CONFIG_FILE, error=TargetError, advice="name a Genie folder").get("dialog")
    if not isinstance(dialog, Mapping):
        raise TargetError(f"{folder / CONFIG_FILE} has no 'dialog'; expected Genie's configuration of a dialog")
    if model is None and not is_bundle(folder.resolve().parent):
        raise TargetError(
            f"{folder} lies in no bundle; name the model it is of: --checkpoint DIR, with its config.json"
        )
    config, marks = _model(folder.resolve().parent if model is None else model)
    return [*_tokens(dialog, config, marks), *_sizes(dialog, config), *_rotary(dialog, config), *_files(folder, dialog)]


def _model(path: Path) -> tuple[ModelConfig, Mapping[str, Any]]:
    """A model's geometry, and what names its bos and eos."""
    if is_bundle(path):
        bundle = open_bundle(path)
        return bundle.config, bundle.read_json("generation_config.json")
    raw = read_json(path / "config.json", error=TargetError, advice="name the model's Hugging Face folder")
    marks = dict(raw)
    if (path / "generation_config.json").exists():
        marks |= read_json(path / "generation_config.json", error=TargetError, advice="fetch the model's folder again")
    return architecture_for(raw.get("model_type")).config(raw), marks


def _tokens(dialog: Mapping[str, Any], config: ModelConfig, marks: Mapping[str, Any]) -> Iterator[Link]:
    yield _equal(dialog, "context.n-vocab", config.vocab_size)
    size = _find(dialog, "context.size")
    yield _link("context.size", size, f"at most {config.max_context}", _is_count(size) and size <= config.max_context)
    bos, own = _find(dialog, "context.bos-token"), marks.get("bos_token_id")
    allowed = [NO_TOKEN] if own is None else [NO_TOKEN, own]
    yield _link("context.bos-token", bos, f"{' or '.join(map(str, allowed))} ({NO_TOKEN}: none)", bos in allowed)
    eos, ends = _ids(_find(dialog, "context.eos-token")), _ids(marks.get("eos_token_id"))
    among = f", {', '.join(map(str, ends))} among them" if ends else ""
    inside = bool(eos) and all(0 <= token < config.vocab_size for token in eos)
    yield _link("context.eos-token", eos, f"ids of the vocabulary{among}", inside and set(ends) <= set(eos))
    pad = _find(dialog, "context.pad-token")
    if pad is not None:
        yield _link("context.pad-token", pad, "an id of the vocabulary", _is_count(pad) and pad < config.vocab_size)


def _sizes(dialog: Mapping[str, Any], config: ModelConfig) -> Iterator[Link]:
    for where, wanted in (
        (f"{_HTP}.kv-dim", config.head_dim),
        (f"{_HTP}.pos-id-dim", config.head_dim // 2),
        ("embedding.size", config.hidden_size),
    ):
        if _find(dialog, where) is not None:  # none of them is needed by every version of Genie
            yield _equal(dialog, where, wanted)


def _rotary(dialog: Mapping[str, Any], config: ModelConfig) -> Iterator[Link]:
    """The rotary base and what stretches it: of the positional encoding, or of the backend in older files."""
    position = _find(dialog, _POSITION)
    if not isinstance(position, Mapping):
        theta = _find(dialog, f"{_HTP}.rope-theta")
        found = ROPE_THETA if theta is None else theta
        yield _link(f"{_HTP}.rope-theta", found, str(config.rope_theta), found == config.rope_theta)
        if config.rope_scaling is not None:
            yield _link(_POSITION, None, f"rope-scaling {config.rope_scaling.kind!r}", False)
        return
    expected = positional_encoding(config)
    scaling = expected.pop("rope-scaling", {})
    for key, wanted in expected.items():
        if key != "type":
            yield _equal(dialog, f"{_POSITION}.{key}", wanted)
    inside = f"{_POSITION}.rope-scaling"
    stated = _find(dialog, inside)
    kind = stated.get("rope-type", stated.get("type", "default")) if isinstance(stated, Mapping) else "default"
    yield _link(
        f"{inside}.rope-type", kind, scaling.get("rope-type", "default"), kind == scaling.get("rope-type", kind)
    )
    if not scaling and kind != "default":
        yield _link(inside, stated, "none: the model has no rope_scaling", False)
    for key, wanted in scaling.items():
        if key != "rope-type":
            yield _equal(dialog, f"{inside}.{key}", wanted)


def _files(folder: Path, dialog: Mapping[str, Any]) -> Iterator[Link]:
    listed = _find(dialog, "engine.model.binary.ctx-bins")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    tokenizer = _find(dialog, "tokenizer.path")
    missing = [name for name in (*names, str(tokenizer)) if not (folder / name).is_file()]
    found = f"{', '.join(missing)} missing" if missing else f"{len(names)} binaries and a tokenizer"
    yield Link("files that it names", found, "all there", bool(names) and not missing)


def _equal(dialog: Mapping[str, Any], where: str, wanted: float) -> Link:
    found = _find(dialog, where)
    return _link(where, found, str(wanted), not isinstance(found, bool) and found == wanted)


def _link(where: str, found: Any, limit: str, ok: bool) -> Link:
    return Link(f"dialog.{where}", "absent" if found is None else str(found), limit, ok)


def _find(dialog: Mapping[str, Any], where: str) -> Any:
    """What stands at a path of keys, or None; of several engines, the first is the model."""
    value: Any = dialog
    for key in where.split("."):
        value = value[0] if isinstance(value, list) and value else value
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if _is_count(token)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
