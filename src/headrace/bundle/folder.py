"""The bundle: a folder that holds one exported model, described by a versioned manifest. See docs/bundle-format.md.

A bundle is written beside its final place and renamed when complete, so a folder with a manifest is whole. This file
knows files and hashes; what graphs, weights and recipes mean is others' business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from headrace.bundle.blocks import are_block_sums, block_sums, damaged_blocks
from headrace.bundle.recipe import Recipe
from headrace.bundle.weights import WeightStore
from headrace.config import ModelConfig
from headrace.errors import BundleError, ConfigError, RecipeError, shown
from headrace.files import exchange, read_json, sha256_file, sync, sync_below, temporary_name, write_file
from headrace.plan import Part, plan_parts

__all__ = [
    "CARD",
    "CARD_MARK",
    "FORMAT",
    "MANIFEST",
    "MEASUREMENTS",
    "PICTURES",
    "Bundle",
    "check_files",
    "is_bundle",
    "open_bundle",
    "publish",
]

FORMAT = 2
MANIFEST = "headrace.json"
MEASUREMENTS = "measurements"  # what was measured of the finished bundle, and the card's pictures
PICTURES = ("ttft", "decode")  # of the card, each as .svg and .png
CARD = "README.md"
CARD_MARK = "\n<!-- headrace-card\n"  # before the facts at a card's end: headrace wrote it
_SYSTEMS_OWN = (".DS_Store", "Thumbs.db", "desktop.ini")  # file managers leave these in any folder
LARGEST_SCALE = 3e38  # of a float32
LONGEST_NAME = 200  # characters of a file's name in a manifest
HASHED_WHOLE = 64 << 10  # bytes of a file that opening hashes; of larger ones it looks at some blocks
LONGEST_CONTEXT = 1 << 20  # tokens; tables of all places are made when a bundle is opened
UNLISTED = (CARD, MANIFEST)  # the card may be edited; the manifest has its own digest
_HALF = tuple(
    temporary_name(Path(name)).name for name in UNLISTED
)  # of a process that was killed; the next one goes on


class Bundle(NamedTuple):
    """An opened bundle.

    Attributes:
        root: the folder.
        config: the model's geometry.
        parts: how it is split.
        prompt_lengths: tokens that prompt steps take, longest first; the host has the longest only.
        contexts: context lengths, longest last.
        recipe: how its weights are quantized.
        kv_scales: (key, value) scale of each layer's int8 cache; empty when the cache is float32.
        provenance: where it came from, as JSON values.
        files: bytes and sha256 by path below the root.
        digest: the manifest's own, what a bundle is known by; empty while it is made.
    """

    root: Path
    config: ModelConfig
    parts: tuple[Part, ...]
    prompt_lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    recipe: Recipe
    kv_scales: tuple[tuple[float, float], ...] = ()
    provenance: Mapping[str, Any] = MappingProxyType({})
    files: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    digest: str = ""

    @property
    def prompt_length(self) -> int:
        """Tokens that a prompt step takes at most."""
        return self.prompt_lengths[0]

    @property
    def step_lengths(self) -> tuple[int, ...]:
        """Tokens a step of every graph that a device has."""
        return tuple(dict.fromkeys((*self.prompt_lengths, 1)))

    @property
    def context(self) -> int:
        """The longest context, tokens."""
        return self.contexts[-1]

    @property
    def kv_dtype(self) -> str:
        """Element type of the host cache."""
        return "int8" if self.kv_scales else "float32"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(int(f["bytes"]) for path, f in self.files.items() if path.startswith("weights/"))

    def weights(self) -> WeightStore:
        """The weights, opened one at a time when they are asked for."""
        return WeightStore.open(self.root, self.config, self.parts, self.recipe)

    def graph(self, part: Part) -> Path:
        """The host graph of a part."""
        return self.root / f"{part.name}.onnx"

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the bundle, {} when it has none."""
        path = self.root / name
        return read_json(path) if path.exists() else {}

    def refuse_replaced(self) -> None:
        """Raise BundleError when another bundle has come to its place: what was read since may be of either."""
        if read_json(self.root / MANIFEST).get("digest") != self.digest:
            raise BundleError(f"{self.root} was replaced while it was opened; open it again")

    @property
    def pad_id(self) -> int:
        """The token in places of a step that hold none: the model's pad token, else its first end token, else 0."""
        settings = self.read_json("generation_config.json")
        for name in ("pad_token_id", "eos_token_id"):
            value = settings.get(name)
            first = value[0] if isinstance(value, list) and value else value
            if type(first) is int and 0 <= first < self.config.vocab_size:
                return first
        return 0


def is_bundle(path: Path) -> bool:
    """Whether a folder has a manifest."""
    return (path / MANIFEST).is_file()


def _no_bundle(path: Path) -> BundleError:
    """What a path is instead of a bundle."""
    if is_bundle(path.parent) and path.is_file():
        return BundleError(f"{path} is one file of a bundle; name its folder: {path.parent}")
    if (path.suffix == ".gguf" and path.is_file()) or (path / "config.json").is_file() or any(path.glob("*.gguf")):
        return BundleError(
            f"{path} is a checkpoint; expected a bundle of it: headrace export {path} -o {path.resolve().stem}.bundle"
        )
    what = f"has no {MANIFEST}; expected a folder" if path.is_dir() else "is no folder; expected one"
    return BundleError(f"{path} {what} made by: headrace export")


def open_bundle(path: Path) -> Bundle:
    """Open a bundle: manifest, graphs and small files are hashed, of the others the size and a few blocks are checked.

    Raises:
        BundleError: there is none, its format is newer, or a file is missing or changed.
    """
    raw = _manifest(path)
    listed = _problems(path, raw, hashed=lambda name: not _has_blocks(name, raw["files"][name]["bytes"]))
    for name, problem in chain(listed, damaged_blocks(path, raw["files"])):
        raise BundleError(
            f"{path / name} {problem}; export the bundle again or run: headrace verify {path} --files-only"
        )
    try:
        config, recipe = ModelConfig.from_dict(raw["geometry"]), Recipe.from_dict(raw["recipe"])
        if raw["format"] < 2 and any(rule.grid.high_bits for rule in recipe.rules):
            raise BundleError(
                f"{path} holds 5- or 6-bit weights in the order of format 1; expected {FORMAT}: export the bundle again"
            )
        plan, scales = raw["plan"], raw["kv_scales"]
        lengths, contexts = _lengths(plan, "prompt_lengths", config), _lengths(plan, "contexts", config)
        _expect(lengths == sorted(lengths, reverse=True) and contexts == sorted(contexts), "plan", plan)
        _expect(lengths[0] < contexts[-1] <= LONGEST_CONTEXT, "plan", plan)
        # A layer has two norms in float32: a number of layers that no file holds would make tables without end.
        stored = sum(f["bytes"] for name, f in raw["files"].items() if name.startswith("weights/"))
        _expect(config.num_layers * config.hidden_size * 8 <= stored, "geometry", raw["geometry"])
        pairs = isinstance(scales, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in scales)
        _expect(pairs and len(scales) in (0, config.num_layers), "kv_scales", scales)
        _expect(all(_is_scale(value) for pair in scales for value in pair), "kv_scales", scales)
        _expect(isinstance(raw["provenance"], dict), "provenance", raw["provenance"])
        return Bundle(
            root=path,
            config=config,
            parts=plan_parts(config, plan["parts"]),
            prompt_lengths=tuple(lengths),
            contexts=tuple(contexts),
            recipe=recipe,
            kv_scales=tuple((float(k), float(v)) for k, v in scales),
            provenance=raw["provenance"],
            files=raw["files"],
            digest=_digest(raw),
        )
    except (AttributeError, KeyError, TypeError, ValueError, ConfigError, RecipeError) as error:
        raise BundleError(f"{path / MANIFEST} lacks or misstates {error}; export the bundle again") from None


def _expect(holds: bool, key: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{key!r}: {shown(value)}")


def _lengths(plan: Mapping[str, Any], key: str, config: ModelConfig) -> list[int]:
    """Token counts of a manifest, at least one."""
    values = plan[key]
    whole = isinstance(values, list) and values and all(type(value) is int for value in values)
    _expect(bool(whole) and all(1 <= value <= config.max_context for value in values), key, values)
    return list(values)


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST_SCALE


def check_files(path: Path, progress: Callable[[str], None] | None = None) -> list[tuple[str, str]]:
    """Hash every file of a bundle: (name, what is wrong) of each that is not as it was written.

    Raises:
        BundleError: there is no bundle.
    """
    if not is_bundle(path):
        raise _no_bundle(path)
    try:
        raw = _manifest(path)
    except BundleError as error:
        return [(MANIFEST, str(error))]
    found = list(_problems(path, raw, hashed=lambda _: True, progress=progress))
    found += [(name, "is not in the manifest") for name in _unlisted(path, raw["files"])]
    return found


def publish(work: Path, out: Path, manifest: Mapping[str, Any], *, aside: Path) -> None:
    """Turn a finished work folder into the bundle `out`: hash, write the manifest, sync, rename.

    Args:
        work: the folder, on the disk of `out`.
        out: the final place; a bundle that is already there is replaced, anything else is refused before.
        manifest: all but the files and the digest.
        aside: where the replaced bundle goes, and goes on to be removed; the caller's own, on the same disk.

    Raises:
        BundleError: `out` exists and is no bundle, or holds files that are not the bundle's.
    """
    import shutil  # a few milliseconds, which opening can do without

    refuse_foreign(out)
    temporary_name(work / MANIFEST).unlink(missing_ok=True)  # of a run that was killed while it wrote the manifest
    files = {}
    for file in sorted(p for p in work.rglob("*") if p.is_file()):
        name = file.relative_to(work).as_posix()
        if name not in UNLISTED:
            size = file.stat().st_size
            files[name] = {"bytes": size, "sha256": sha256_file(file)}
            if _has_blocks(name, size):
                files[name]["blocks"] = block_sums(file)
    body = {"format": FORMAT, **manifest, "files": files}
    sync_below(work)
    write_file(work / MANIFEST, _text({**body, "digest": _digest(body)}))
    if out.exists():
        shutil.rmtree(aside, ignore_errors=True)
        # The new bundle waits under the name `aside`, so that what a killed run leaves at `work` is never the old one.
        work.rename(aside)
        if not exchange(aside, out):
            aside.rename(work)
            out.rename(aside)
            work.rename(out)
    else:
        work.rename(out)
    sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _has_blocks(name: str, size: int) -> bool:
    """Whether opening looks at some blocks of a file, and does not hash it."""
    return size > HASHED_WHOLE and not name.endswith(".onnx")


def refuse_foreign(out: Path) -> None:
    """Raise BundleError when `out` exists and is neither an empty folder nor a bundle and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    # A damaged bundle is exported again over itself, so its digest does not matter here.
    listed = read_json(out / MANIFEST).get("files") if is_bundle(out) else None
    if not isinstance(listed, dict):
        raise BundleError(f"{out} exists and is no bundle; choose another -o or remove it")
    for name in (*_unlisted(out, listed), *_written_by_hand(out)):
        raise BundleError(f"{out} holds {name}, which is not the bundle's; choose another -o or move it away")


def _unlisted(path: Path, listed: Collection[str]) -> list[str]:
    """Files in a bundle's folder that are neither in the manifest nor of those that may come later."""
    found = []
    for file in sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()):
        name = file.relative_to(path).as_posix()
        later = name in (*UNLISTED, *_HALF) or name.startswith(f"{MEASUREMENTS}/") or file.name in _SYSTEMS_OWN
        if name not in listed and not later:
            found.append(name)
    return found


def _written_by_hand(path: Path) -> list[str]:
    """What lies where headrace writes once a bundle is made, and is no card, measurement or picture of its own."""
    found = []
    card = path / CARD
    if card.is_file() and CARD_MARK.encode() not in card.read_bytes():
        found.append(CARD)
    for file in sorted(file for file in (path / MEASUREMENTS).rglob("*") if not file.is_dir()):
        picture = file.suffix in (".svg", ".png") and file.stem in PICTURES
        half = file.name.startswith(".") and file.name.endswith(".json.part")  # of a process that was killed
        if file.name not in _SYSTEMS_OWN and not picture and not half and not _is_record(file):
            found.append(file.relative_to(path).as_posix())
    return found


def _is_record(file: Path) -> bool:
    if file.suffix != ".json":
        return False
    try:
        return str(read_json(file).get("format")).startswith("headrace-")
    except (BundleError, OSError):
        return False


def _manifest(path: Path) -> dict[str, Any]:
    if not is_bundle(path):
        raise _no_bundle(path)
    raw = read_json(path / MANIFEST)
    version = raw.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise BundleError(f"{path} has format {version}; this headrace reads up to {FORMAT}: update headrace")
    if type(version) is not int or version < 1:
        raise BundleError(f"{path / MANIFEST} has format {version!r}; expected {FORMAT}: export the bundle again")
    try:
        text = _text(raw)
        digest = raw.pop("digest", None)
        fits = digest == _digest(raw)
    except UnicodeEncodeError:  # half a character, which JSON can spell and no text can hold
        fits, text = False, b""
    # JSON has many spellings of one value (1e-06, 1E-06): the text itself must be the one that was written.
    if not fits or (path / MANIFEST).read_bytes() != text:
        raise BundleError(f"{path / MANIFEST} was changed (its digest differs); export the bundle again")
    files = raw.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(f, dict)
        and (type(size := f.get("bytes")) is int and size >= 0 and isinstance(f.get("sha256"), str))
        and ("blocks" not in f or are_block_sums(f["blocks"], size))
        for f in files.values()
    ):
        raise BundleError(f"{path / MANIFEST} lacks or misstates 'files'; export the bundle again")
    for name in files:
        if not _is_below(path.resolve(), name):
            raise BundleError(
                f"{path / MANIFEST} names {shown(name)}, which is not below the bundle; export the bundle again"
            )
    return raw


def _is_below(root: Path, name: str) -> bool:
    """Neither `..`, nor an absolute name, nor a link may lead to a file that is not the bundle's."""
    if "\\" in name or not name.isprintable() or len(name) > LONGEST_NAME:
        return False
    try:
        return (root / name).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a part that is too long, a ring of links
        return False


def _problems(
    path: Path,
    raw: Mapping[str, Any],
    hashed: Callable[[str], bool],
    progress: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, str]]:
    for name, expected in raw["files"].items():
        file = path / name
        if not file.is_file():
            yield name, "is missing"
        elif (size := file.stat().st_size) != expected["bytes"]:
            yield name, f"has {size} bytes, expected {expected['bytes']}"
        elif hashed(name) and sha256_file(file) != expected["sha256"]:
            yield name, "was changed (its sha256 differs)"
        if progress is not None:
            progress(name)


def _text(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, ensure_ascii=False, indent=1).encode()


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
