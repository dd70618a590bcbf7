"""verify: the chain from files to logits, link by link, each with what was found and its limit.

    files ─► checkpoint → quantized weights (eager) → one float graph → N parts → token by token → as shipped → native

Each link compares with the one before, so the first that fails is the one that broke. Compares; exports nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.encodings import read_encodings
from headrace.bundle.folder import Bundle, check_files, open_bundle
from headrace.bundle.weights import WeightStore
from headrace.bundle.work_folder import scratch_folder
from headrace.errors import UserError, did_you_mean
from headrace.graph.emit_host import HostWeights, emit_host
from headrace.measure.link import Link, divergence
from headrace.measure.native_parity import instruction_sets, native_links
from headrace.model.reference import eager_logits
from headrace.plan import plan_parts
from headrace.progress import Progress, silent
from headrace.runners import open_runner
from headrace.runtime.engine import Engine
from headrace.text.sample import sample_ids
from headrace.text.tokenizer_folder import load_tokenizer

__all__ = ["DEPTHS", "verify_bundle"]

DEPTHS = ("host", "device", "emulation", "genie")

Logits = NDArray[np.float32]

# Float graphs do the eager decoder's arithmetic in another order: differences are float32 rounding, relative to the
# largest logit, which grows with depth.
FLOAT_LIMIT = 1e-3
# The same graph cut at other places does the very same operations.
PARTS_LIMIT = 1e-5
# int8 activations and an int8 cache are approximations; measured 0.004 … 0.03 on real models.
SHIPPED_KL = 0.1
# Rounding an int8 activation depends on its block alone, so a step's length changes only the cache's rounding.
STEPS_KL = 0.02
# Against the checkpoint, the export's own figure on the very same tokens; another computer's float32 sums differ in the
# last bits, which moves it by less than this.
EXPORT_MARGIN, EXPORT_SLACK = 1.05, 1e-3
# For a bundle without that figure: far above any usable recipe (plain per-channel rounding of a 135M model: 1.2), far
# below what a wrong layer gives (8 and more).
CHECKPOINT_KL = 2.5
FLOAT_ARITHMETIC = 1  # MatMulNBits accuracy_level: float32 inside


def verify_bundle(
    path: Path,
    checkpoint: Path | None = None,
    *,
    adapters: Sequence[Path] = (),
    files_only: bool = False,
    through: str = "host",
    layers: bool = False,
    progress: Progress = silent,
) -> list[Link]:
    """Check a bundle.

    Args:
        path: the bundle.
        checkpoint: what it was made of; adds the link from there.
        adapters: LoRA adapters that were merged into the checkpoint.
        files_only: only hash the files.
        through: the last link: "host", "device" (graphs on this CPU), "emulation" (HTP) or "genie".
        layers: also hold each layer of the device graphs against the simulation.
        progress: told how far it is.

    Returns:
        The links, in order; it ends at changed files, since nothing after them would mean anything.

    Raises:
        BundleError: there is no bundle.
        CheckpointError: the checkpoint cannot be opened.
        UserError: `through` is unknown.
    """
    if through not in DEPTHS:
        raise UserError(
            f"--through {through!r} is unknown{did_you_mean(through, DEPTHS)}; expected {', '.join(DEPTHS)}"
        )
    links = [_files(path, progress)]
    if files_only or not links[0].ok:
        return links
    bundle = open_bundle(path)
    if through != "host":
        read_encodings(bundle.root / "encodings.json")  # what a device needs and is not there is told before the work
    total = (5 if checkpoint is None else 6) + (2 * len(instruction_sets()) or 1)
    for link in _numbers(bundle, checkpoint, adapters):
        links.append(link)
        progress("comparing", len(links) - 1, total)
    if through != "host":
        from headrace.measure.device_parity import Depth, device_links

        links += device_links(bundle, _sample(bundle), Depth(through), layers=layers)
    return links


def _files(path: Path, progress: Progress) -> Link:
    seen = 0

    def count(_: str) -> None:
        nonlocal seen
        seen += 1
        progress("hashing", seen, seen + 1)

    problems = check_files(path, count)
    progress("hashing", seen, seen)
    found = "; ".join(f"{name} {problem}" for name, problem in problems) or f"{seen} files as written"
    return Link("files", found, "every sha256 as in the manifest", not problems)


def _numbers(bundle: Bundle, checkpoint: Path | None, adapters: Sequence[Path]) -> Iterator[Link]:
    config = bundle.config
    store = bundle.weights()
    ids = _sample(bundle)
    eager = eager_logits(config, store.read, np.array([ids]))[0]
    if checkpoint is not None:
        from headrace.measure.original import open_original

        source = open_original(bundle, checkpoint, adapters)
        reference = eager_logits(config, lambda name: source.tensor(name).load(), np.array([ids]))[0]
        recorded = bundle.provenance.get("quantization_kl")
        limit = recorded * EXPORT_MARGIN + EXPORT_SLACK if isinstance(recorded, int | float) else CHECKPOINT_KL
        yield divergence("checkpoint → quantized weights", reference, eager, limit)

    with _variant(bundle, 1, store) as whole:
        one = _score(whole, ids)
    yield _difference("quantized weights → one float graph", eager, one, FLOAT_LIMIT)
    with _variant(bundle, len(bundle.parts), store) as split:
        parts = _score(split, ids)
        yield _difference(f"one graph → {len(bundle.parts)} parts", one, parts, PARTS_LIMIT)
        yield _difference("prompt steps → token by token, float cache", parts, _score(split, ids, 1), FLOAT_LIMIT)
    shipped = _score(bundle, ids)
    yield divergence("float → as shipped (int8 arithmetic, cache)", eager, shipped, SHIPPED_KL)
    yield divergence("prompt steps → token by token, as shipped", shipped, _score(bundle, ids, 1), STEPS_KL)
    yield from native_links(bundle, ids, eager, shipped)


def _sample(bundle: Bundle) -> list[int]:
    return sample_ids(load_tokenizer(bundle.root), bundle.context)


def _score(bundle: Bundle, ids: list[int], chunk: int | None = None) -> Logits:
    engine = Engine(open_runner(bundle, "host"))
    try:
        return engine.score(ids, chunk)
    finally:
        engine.close()


@contextmanager
def _variant(bundle: Bundle, parts: int, store: WeightStore) -> Iterator[Bundle]:
    """The same weights under other graphs, float arithmetic, in a temporary folder beside the bundle: graphs may
    only point to files below their own folder, so the weights are linked there (copied where links are impossible)."""
    parent = bundle.root.resolve().parent
    if not os.access(parent, os.W_OK):
        parent = Path(tempfile.gettempdir())
    with scratch_folder(parent, "a check of a bundle") as folder:
        (folder / "weights").mkdir()
        for file in sorted((bundle.root / "weights").iterdir()):
            try:
                os.link(file, folder / "weights" / file.name)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(file, folder / "weights" / file.name)
        plan = plan_parts(bundle.config, parts)
        weights = HostWeights(store.tensors, store.grids)
        for part in plan:
            emit_host(bundle.config, part, weights, accuracy_level=FLOAT_ARITHMETIC).save(folder / f"{part.name}.onnx")
        yield bundle._replace(root=folder, parts=plan, kv_scales=())


def _difference(name: str, expected: Logits, found: Logits, limit: float) -> Link:
    worst = float(np.abs(expected - found).max() / max(1.0, float(np.abs(expected).max())))
    return Link(name, f"max |Δ| {worst:.1e} of the largest logit", f"≤ {limit:g}", worst <= limit)
