"""Where an export works: the folder beside its final place, what is finished in it, and who may go on there.

    OUT.partial/
      state.json            what the export is of, and the layers that are finished
      states.bin            hidden states after the layers that are finished
      sensitivity.json      what each linear costs on each grid that was tried, for a budget
      gradients.npz         how much each token counts, for methods that ask
      bundle/               becomes OUT when everything is there
      device/               device graphs, and what is compiled of them
      replaced/             the bundle that was at OUT, for a moment

An interrupted export goes on only as the very same one, and hours of work are never thrown away unasked. Knows what is
kept here, not how it is made.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.folder import refuse_foreign
from headrace.bundle.grid import Grid
from headrace.bundle.recipe import parse_block
from headrace.bundle.work_folder import clear, work_folder
from headrace.errors import BundleError, reason
from headrace.exporter.options import ExportOptions, flag, spelled
from headrace.files import read_json, temporary_name, whole_file, write_file

__all__ = ["Workspace", "differences", "output_folder", "refuse_full_disk", "work_place", "workspace"]

STATE, HIDDEN, SENSITIVITY, GRADIENTS = "state.json", "states.bin", "sensitivity.json", "gradients.npz"
BUNDLE, DEVICE, REPLACED = "bundle", "device", "replaced"
# state.json is removed first: without it the others are no work, also where a process is killed in between.
_FILES = (STATE, HIDDEN, SENSITIVITY, GRADIENTS)
_NAMES = (*_FILES, *(temporary_name(Path(name)).name for name in _FILES), BUNDLE, DEVICE, REPLACED)


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states after some layers, in one file: how many layers, 8 bytes, and the arrays, float32.

    A run that is interrupted between a layer and its states computes that layer's once more.
    """

    path: Path

    def read(self, states: Sequence[NDArray[np.float32]]) -> int:
        """Fill `states` with what is kept, and say after how many layers it was; 0 when nothing of that size is."""
        if not self.path.is_file() or self.path.stat().st_size != 8 + sum(array.nbytes for array in states):
            return 0
        with self.path.open("rb") as file:
            layers = int.from_bytes(file.read(8), "little")
            for array in states:
                for window in array:
                    file.readinto(memoryview(window).cast("B"))
        return layers

    def write(self, layers: int, states: Sequence[NDArray[np.float32]]) -> None:
        """Keep `states` in place of what was kept."""
        with whole_file(self.path) as out:
            out.write(layers.to_bytes(8, "little"))
            for array in states:
                for window in array:
                    out.write(np.ascontiguousarray(window).data)


@dataclass
class Workspace:
    """An export's folder, open and locked.

    Attributes:
        root: the folder.
        identity: what the export is of, as JSON values.
        layers: peaks of keys and values of the layers that are finished, by number.
    """

    root: Path
    identity: Mapping[str, Any]
    layers: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def bundle(self) -> Path:
        """The bundle in the making."""
        return self.root / BUNDLE

    @property
    def device(self) -> Path:
        """Device graphs, and what is known of their binaries."""
        return self.root / DEVICE

    @property
    def stage(self) -> HiddenStates:
        """Where hidden states wait between two runs."""
        return HiddenStates(self.root / HIDDEN)

    @property
    def replaced(self) -> Path:
        """Where the bundle that is replaced goes for a moment."""
        return self.root / REPLACED

    def finish_layer(self, number: int, key_peak: float, value_peak: float) -> None:
        """A layer is on disk: an interrupted export begins after it."""
        self.layers[number] = key_peak, value_peak
        self._save()

    def costs(self, grids: Mapping[str, Grid]) -> dict[str, dict[Grid, float]] | None:
        """What was measured for a budget (see `quantize.budget.Costs`), or None.

        An export that an earlier headrace began has blocks for keys, those of the rule's own grid, of `grids`; what
        8 bits cost it took for nothing.
        """
        path = self.root / SENSITIVITY
        if not path.exists():
            return None
        found: dict[str, dict[Grid, float]] = {}
        for name, kept in read_json(path).items():
            if isinstance(kept, dict):
                by_block = {replace(grids[name], block=parse_block(block)): kl for block, kl in kept.items()}
                found[name] = {**by_block, Grid(8): 0.0}
            else:
                found[name] = {Grid(*grid): kl for *grid, kl in kept}
        return found

    def keep_costs(self, costs: Mapping[str, Mapping[Grid, float]]) -> None:
        """Keep what was measured for a budget: of each linear rows of bits, block, lpbq and KL."""
        rows = {name: [[*astuple(grid), kl] for grid, kl in by_grid.items()] for name, by_grid in costs.items()}
        write_file(self.root / SENSITIVITY, json.dumps(rows).encode())

    @property
    def has_work(self) -> bool:
        """There is something that took long and need not be done again."""
        kept = bool(self.layers) or (self.root / SENSITIVITY).exists() or (self.root / GRADIENTS).exists()
        return kept and (self.root / STATE).exists()

    def energy(self) -> dict[str, NDArray[np.float32]] | None:
        """What was measured by `quantize.gradients.gradient_energy`, or None."""
        path = self.root / GRADIENTS
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as kept:
            return dict(kept)

    def keep_energy(self, energy: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep it."""
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **energy)
        write_file(self.root / GRADIENTS, data.getvalue())

    def _save(self) -> None:
        state = {"identity": self.identity, "layers": {str(number): peaks for number, peaks in self.layers.items()}}
        write_file(self.root / STATE, json.dumps(state).encode())


def output_folder(out: str | os.PathLike[str], checkpoint: Path) -> Path:
    """The folder that `-o` names, absolute; a link is followed, so that it stays a link.

    Raises:
        BundleError: no folder can be made there, or something that is no bundle of headrace's own is there.
    """
    text = os.fspath(out)
    if not text.strip():
        raise BundleError("-o is empty; expected the bundle's folder, such as: -o model.bundle")
    try:
        place = Path(text).resolve()
        here = Path.cwd()
    except (OSError, RuntimeError, ValueError) as error:  # a ring of links, a name that no file can have
        raise BundleError(f"-o {text!r} is no possible folder ({reason(error)}); choose another") from None
    if not place.name:
        raise BundleError(f"-o {text} is the root of a disk; expected a folder that export may make")
    for taken, what in ((here, "the folder you are in"), (checkpoint.resolve(), "the checkpoint")):
        if taken.is_relative_to(place):
            raise BundleError(f"-o {text} is or holds {what}; expected a folder that export may make")
    refuse_foreign(place)
    return place


def refuse_full_disk(folder: Path, need: int) -> None:
    """Raise BundleError when the disk of a folder that may not exist yet has less than `need` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise BundleError(
            f"{folder} has {free / 1e9:.2f} GB free and this export needs {need / 1e9:.2f} GB more; free some, or "
            "choose another -o"
        )


def work_place(out: Path) -> Path:
    """Where the export of the bundle `out` works, and what is done of it waits when it was interrupted."""
    place = out.resolve()
    return place.with_name(f"{place.name}.partial")


@contextmanager
def workspace(out: Path, identity: Mapping[str, Any], *, resume: bool, restart: bool) -> Iterator[Workspace]:
    """OUT.partial, for one export at a time. It goes when the export is done, or stopped before it has work to keep.

    Args:
        out: the final place.
        identity: what decides the bundle's bytes, as JSON values.
        resume: go on with the finished layers of an interrupted export that is the very same.
        restart: begin anew. With both: go on if it is the same, else begin anew.

    Raises:
        BundleError: something else is at OUT.partial, another process works there, or an interrupted export is there
            that is neither to go on nor to be thrown away; the message says what differs.
    """
    root = work_place(out)
    done = False
    with work_folder(root, f"an export into {out.name}"):
        if not out.exists() and (root / REPLACED).exists():  # a run was killed while it replaced the bundle
            (root / REPLACED).rename(out)
        found = Workspace(root, identity, _finished(root))
        has_work = found.has_work
        if has_work and not _goes_on(root, found, resume=resume, restart=restart):
            has_work = False
        if not has_work:
            clear(root, _NAMES)
            found.layers.clear()
            found._save()
        if not found.bundle.exists():  # it is new, or has gone to its place just before a run was interrupted
            clear(root, [HIDDEN])  # of layers that went with it
            found.bundle.mkdir()
        try:
            yield found
            done = True
        finally:
            if done or not found.has_work:
                clear(root, _NAMES)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of an interrupted export is not as now asked: `--block 32 → channel`."""
    flags = {option.name: flag(option) for option in fields(ExportOptions)}
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        name = flags.get(key, key)
        if key == "checkpoint":
            before, after = before or {}, after or {}
            changed = [file for file in sorted({*before, *after}) if before.get(file) != after.get(file)]
            found.append(f"the checkpoint's {', '.join(changed[:3])}{' …' if len(changed) > 3 else ''}")
        elif (was := _told(key, before)) == (now := _told(key, after)):
            found.append(f"the content of {name} {now}")
        else:
            found.append(f"{name} {was} → {now}")
    return found


def _told(key: str, value: Any) -> str:
    if key == "recipe" and isinstance(value, dict):
        return str(value.get("name"))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return ",".join(str(item.get("name")) for item in value)  # texts, adapters
    return spelled(value) or "by default"


def _finished(root: Path) -> dict[int, tuple[float, float]]:
    if not (root / STATE).exists() or not (root / BUNDLE).is_dir():
        return {}
    layers = read_json(root / STATE).get("layers", {})
    return {int(number): (float(key), float(value)) for number, (key, value) in layers.items()}


def _goes_on(root: Path, found: Workspace, *, resume: bool, restart: bool) -> bool:
    """Whether the interrupted export is the one that is asked for; False where it is to be thrown away."""
    old = read_json(root / STATE).get("identity") or {}
    # As JSON has it, where a tuple is a list.
    changed = differences(old, json.loads(json.dumps(found.identity)))
    if resume and not changed:
        return True
    if restart:
        return False
    done = f"{len(found.layers)} layers done"
    if changed:
        raise BundleError(
            f"{root} holds an interrupted export ({done}) that differs: {'; '.join(changed)}; ask as before with "
            "--resume to go on, or begin anew with --restart"
        )
    raise BundleError(f"{root} holds an interrupted export ({done}); go on with --resume, or begin anew with --restart")
