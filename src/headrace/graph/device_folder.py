"""A bundle's device graphs in a folder: written where they are wanted, or kept beside the bundle and made once.

Knows bundles and graphs; who runs or compiles them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from headrace.bundle.derived import derive, derived_folder
from headrace.bundle.encodings import read_encodings
from headrace.bundle.folder import Bundle
from headrace.bundle.recipe import Rule
from headrace.errors import RecipeError
from headrace.graph.emit_device import DeviceGraph, write_device_graphs
from headrace.model.weights import quantized_weights
from headrace.progress import Progress, silent

__all__ = ["bundle_device_graphs", "kept_device_graphs", "refuse_blocks"]

OWN_FOLDER = "device"  # of a bundle that was exported with --keep-onnx


def kept_device_graphs(bundle: Bundle, progress: Progress = silent) -> Path:
    """The folder of a bundle's device graphs: its own, when they were kept, or one beside it, made once.

    Raises:
        RecipeError: linears are in blocks whose scales are not LPBQ.
    """
    own = bundle.root / OWN_FOLDER
    if own.is_dir():
        return own
    folder = derived_folder(bundle, "device")
    return derive(bundle, "device", folder, lambda made: bundle_device_graphs(bundle, made), progress)


def bundle_device_graphs(bundle: Bundle, folder: Path) -> list[DeviceGraph]:
    """All device graphs of a bundle, written into `folder`.

    Raises:
        RecipeError: linears are in blocks whose scales are not LPBQ.
    """
    recipe = bundle.recipe
    refuse_blocks(recipe.resolve(quantized_weights(bundle.config)))
    store = bundle.weights()
    return write_device_graphs(
        bundle.config,
        bundle.parts,
        store.read_stored,
        read_encodings(bundle.root / "encodings.json"),
        folder,
        lengths=bundle.step_lengths,
        contexts=bundle.contexts,
    )


def refuse_blocks(rules: Mapping[str, Rule]) -> None:
    """Raise RecipeError for blocks whose scales are not LPBQ: the compiler would round such scales again."""
    for name, rule in rules.items():
        if rule.block is not None and not rule.lpbq:
            raise RecipeError(
                f"rule {rule.match!r} gives {name} blocks of {rule.block} with scales of their own, which its compiler "
                f'rounds again; expected LPBQ scales ("lpbq": true, --block {rule.block}) or one a channel'
            )
