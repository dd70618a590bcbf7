"""export: the main job. checkpoint → quantize → graphs → bundle, in resumable steps with one layer in memory.

Orchestrates; what an interrupted run left is workspace.py's business, and how a weight is quantized, a graph emitted or
a file laid out is written elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace import __version__
from headrace.bundle.encodings import write_encodings
from headrace.bundle.folder import Bundle, publish
from headrace.bundle.weights import WeightStore
from headrace.errors import BundleError
from headrace.exporter.calibration import calibration_windows
from headrace.exporter.estimate import estimate_disk
from headrace.exporter.options import ExportOptions
from headrace.exporter.origin import origin_of, write_terms
from headrace.exporter.proof import quantization_kl, refuse_broken
from headrace.exporter.settings import ExportSettings, settle
from headrace.exporter.snapdragon import compile_target
from headrace.exporter.vocabulary import write_vocabulary
from headrace.exporter.workspace import Workspace, output_folder, refuse_full_disk, workspace
from headrace.files import full_disk
from headrace.graph.device_folder import OWN_FOLDER, bundle_device_graphs
from headrace.graph.emit_host import HostWeights, emit_host
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, layer_weights, weight_table
from headrace.progress import Progress, silent
from headrace.quantize.budget import Costs
from headrace.quantize.device_encodings import device_encodings
from headrace.quantize.gradients import gradient_energy
from headrace.quantize.layer import QuantizedLayer
from headrace.quantize.methods import find_method
from headrace.quantize.parallel import cores
from headrace.quantize.pipeline import quantize_layers
from headrace.quantize.ranges import RANGE_WINDOWS, collect_ranges
from headrace.quantize.sensitivity import measure_sensitivity
from headrace.quantize.source import load_weight
from headrace.quantize.statistics import InputStatistics
from headrace.quantize.tables import final_states, head_statistics, quantize_table
from headrace.quantize.windows import evenly_spaced
from headrace.text.sample import sample_ids
from headrace.text.turns import turn_format

__all__ = ["export"]

KV_LEVELS = 127  # int8, symmetric
EMPTY_SCALE = 1 / KV_LEVELS  # a cache that calibration saw only zeros in


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    restart: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Path:
    """Make a bundle of a checkpoint.

    Args:
        checkpoint: a Hugging Face folder or a GGUF file.
        out: the bundle's folder; a bundle that is there is replaced when the new one is complete.
        resume: go on where an interrupted export stopped; refused when what is asked now differs.
        restart: throw away what an interrupted export left; with `resume`, only where it differs.
        progress: told how far it is.
        options: fields of `headrace.exporter.options.ExportOptions`: recipe, bits, context, calibration, targets, …

    Returns:
        The bundle's folder.

    Raises:
        UserError: anything in the above is not possible; the message says what and what to do.
    """
    settings = settle(Path(checkpoint), ExportOptions.of(options))
    place = output_folder(out, settings.checkpoint.path)
    with (
        full_disk(BundleError, place.parent, "go on with --resume, which keeps what is done"),
        workspace(place, settings.identity(), resume=resume, restart=restart) as work,
    ):
        _make(settings, place, work, progress)
    progress("writing the bundle", 1, 1)
    return Path(out)


def _make(settings: ExportSettings, out: Path, work: Workspace, progress: Progress) -> None:
    """Every step, each skipped where an earlier run has done it."""
    asked, jobs = settings.options, settings.options.jobs
    refuse_full_disk(out.parent, estimate_disk(settings) - _bytes_below(work.root))
    tokenizer = write_vocabulary(settings.checkpoint, work.bundle)
    write_terms(settings.checkpoint, work.bundle)
    turns = turn_format(tokenizer, settings.checkpoint.generation_config)
    windows = calibration_windows(tokenizer, turns, settings.texts, asked.windows, asked.window_length)
    settings = _within_budget(settings, work, windows, jobs, progress)
    kv_scales = _quantize(settings, work, windows, jobs, progress)
    _emit_graphs(settings, work.bundle, kv_scales, progress)
    manifest = _manifest(settings, kv_scales)
    made = _unpublished(settings, work.bundle, manifest)
    _prove(settings, made, manifest, sample_ids(tokenizer, made.context), progress)
    if settings.has_encodings:
        _calibrate_device(settings, work.bundle, kv_scales, evenly_spaced(windows, RANGE_WINDOWS), progress)
    if asked.for_device:
        graphs = bundle_device_graphs(made, work.bundle / OWN_FOLDER if asked.keep_onnx else work.device)
        for target in asked.targets:
            compile_target(made, target, graphs, work.device, progress)
    progress("writing the bundle", 0, 1)
    publish(work.bundle, out, manifest, aside=work.replaced)


def _prove(
    settings: ExportSettings, made: Bundle, manifest: dict[str, Any], ids: Sequence[int], progress: Progress
) -> None:
    """The bundle runs, and the manifest says what quantization cost."""
    progress("checking", 0, 2)
    with cores(settings.options.jobs):
        manifest["provenance"]["quantization_kl"] = quantization_kl(settings.checkpoint, made, ids)
    progress("checking", 1, 2)
    refuse_broken(made, ids)
    progress("checking", 2, 2)


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _within_budget(
    settings: ExportSettings, work: Workspace, windows: NDArray[np.int64], jobs: int, progress: Progress
) -> ExportSettings:
    """The settings with a recipe that spends the budget where it gains most; measured once an export."""
    if not settings.has_budget:
        return settings
    costs: Costs | None = work.costs(settings.grids)
    if costs is None:
        with cores(jobs):
            costs = measure_sensitivity(
                settings.model,
                settings.rules,
                windows,
                grids=settings.tried,
                keep=settings.options.keep_grid,
                progress=lambda done, total: progress("measuring sensitivity", done, total),
            )
        work.keep_costs(costs)
    return settings.within_budget(costs)


def _quantize(
    settings: ExportSettings, work: Workspace, windows: NDArray[np.int64], jobs: int, progress: Progress
) -> list[tuple[float, float]]:
    """Fill the weights files; scales (key, value) of each layer's cache, or none for a float32 one."""
    source, config, rules = settings.model, settings.config, settings.rules
    store = WeightStore(work.bundle, config, settings.parts, settings.grids, create=not work.layers)
    progress("embedding and head", 0, 1)
    if not work.layers:  # else an earlier run wrote them before its first layer
        with cores(jobs):
            head, keep = weight_table(config)[HEAD].stored_as, settings.options.keep_grid
            statistics = dict[str, InputStatistics]()
            if find_method(rules[head].method).calibrated:
                statistics[head] = head_statistics(source, final_states(source, windows))
            for name in dict.fromkeys((EMBEDDING, head)):
                table = quantize_table(source, name, rules[name], statistics=statistics.get(name), keep=keep)
                store.write(name, table)
            store.write(FINAL_NORM, load_weight(source, FINAL_NORM))
    embedding = store.read_codes(EMBEDDING)
    progress("embedding and head", 1, 1)

    def emit(layer: QuantizedLayer) -> None:
        for name, linear in layer.linears.items():
            store.write(name, linear)
        for name, norm in layer.norms.items():
            store.write(name, norm)
        store.sync()
        work.finish_layer(layer.number, layer.key_peak, layer.value_peak)

    def finished(number: int) -> QuantizedLayer | None:
        peaks = work.layers.get(number)
        if peaks is None:
            return None
        rows = layer_weights(config, number).values()
        linears = {row.name: store.read_codes(row.name) for row in rows if row.quantized}
        norms = {row.name: store.read(row.name) for row in rows if row.role.is_norm}
        return QuantizedLayer(number, linears, norms, *peaks)

    quantize_layers(
        source,
        rules,
        windows,
        emit,
        embedding=embedding,
        finished=finished,
        stage=work.stage,
        energy=_gradient_energy(settings, work, windows, progress),
        jobs=jobs,
        keep=settings.options.keep_grid,
        progress=lambda done, total: progress("quantizing layers", done, total),
    )
    if settings.recipe.kv == "float32":
        return []
    peaks = [work.layers[i] for i in range(config.num_layers)]
    return [(key / KV_LEVELS or EMPTY_SCALE, value / KV_LEVELS or EMPTY_SCALE) for key, value in peaks]


def _gradient_energy(
    settings: ExportSettings, work: Workspace, windows: NDArray[np.int64], progress: Progress
) -> Mapping[str, NDArray[np.float32]] | None:
    """How much each token counts, for the methods that ask; measured once an export."""
    if not any(find_method(rule.method).uses_gradients for rule in settings.rules.values()):
        return None
    energy = work.energy()
    if energy is None:
        with cores(settings.options.jobs):
            energy = gradient_energy(
                settings.model, windows, progress=lambda done, total: progress("measuring gradients", done, total)
            )
        work.keep_energy(energy)
    return energy


def _emit_graphs(
    settings: ExportSettings, folder: Path, kv_scales: Sequence[tuple[float, float]], progress: Progress
) -> None:
    config, grids = settings.config, settings.grids
    weights = HostWeights(WeightStore(folder, config, settings.parts, grids).tensors, grids, kv_scales)
    for number, part in enumerate(settings.parts):
        progress("host graphs", number, len(settings.parts))
        emit_host(config, part, weights).save(folder / f"{part.name}.onnx")
    progress("host graphs", len(settings.parts), len(settings.parts))


def _calibrate_device(
    settings: ExportSettings,
    folder: Path,
    kv_scales: Sequence[tuple[float, float]],
    windows: NDArray[np.int64],
    progress: Progress,
) -> None:
    """encodings.json: static ranges of every result of the quantized decoder, and the scales of its weights."""
    config, grids = settings.config, settings.grids
    store = WeightStore(folder, config, settings.parts, grids)
    with cores(settings.options.jobs):
        ranges = collect_ranges(
            config, store.read, windows, progress=lambda done, total: progress("static ranges", done, total)
        )
    parameters = {
        name: (grid, store.read_scales(name))
        for name, grid in grids.items()
        if (grid.block is None or grid.lpbq) and name != EMBEDDING
    }
    write_encodings(folder / "encodings.json", device_encodings(config, ranges, kv_scales), parameters)


def _unpublished(settings: ExportSettings, folder: Path, manifest: Mapping[str, Any]) -> Bundle:
    """The bundle in the making, for what is derived from it."""
    return Bundle(
        root=folder,
        config=settings.config,
        parts=settings.parts,
        prompt_lengths=settings.prompt_lengths,
        contexts=settings.contexts,
        recipe=settings.recipe,
        kv_scales=tuple((key, value) for key, value in manifest["kv_scales"]),
        provenance=manifest["provenance"],
    )


def _manifest(settings: ExportSettings, kv_scales: Sequence[tuple[float, float]]) -> dict[str, Any]:
    source = settings.checkpoint
    return {
        "headrace": __version__,
        "geometry": settings.config.to_dict(),
        "plan": {
            "parts": len(settings.parts),
            "prompt_lengths": list(settings.prompt_lengths),
            "contexts": list(settings.contexts),
        },
        "recipe": settings.recipe.to_dict(),
        "kv_scales": [list(pair) for pair in kv_scales],
        "provenance": {
            "checkpoint": source.path.name,
            "checkpoint_files": {file.name: file.stat().st_size for file in source.files},
            "origin": origin_of(source),
            "options": settings.asked(),
        },
    }
