"""What an export was asked for, settled and checked: everything that decides the bytes of a bundle.

Refuses what cannot work before anything is written. Knows options, geometry and texts; makes no weight and no graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headrace import __version__
from headrace.bundle.grid import Grid
from headrace.bundle.recipe import Recipe, Rule, load_recipe
from headrace.bundle.weights import layouts, quantized_names
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.config import ModelConfig
from headrace.errors import CalibrationError, ConfigError, RecipeError
from headrace.exporter.snapdragon import refuse_blocks, refuse_contexts
from headrace.model.decoder import EMBEDDING, HEAD
from headrace.plan import Part, plan_parts
from headrace.quantize.budget import spend
from headrace.quantize.methods import find_method
from headrace.quantize.pipeline import Source
from headrace.quantize.rotation import Rotated
from headrace.targets.qualcomm.compile_cost import estimate_compile
from headrace.targets.qualcomm.soc import find_soc
from headrace.targets.qualcomm.toolchain import find_toolchain

__all__ = ["ExportSettings", "settle"]

_NO_COSTS: Mapping[str, float] = defaultdict(float)
_CONTEXT = 4096
_COMPILER_MEMORY = 12e9  # bytes: what a laptop of 16 GB has left
_SHORT_CONTEXT = 1024  # a device's second: a quarter of the cache to read, for each token of a short conversation


@dataclass(frozen=True)
class ExportSettings:
    """Everything that decides the bytes of a bundle; an interrupted export goes on only under the same ones.

    Attributes:
        checkpoint: what was opened.
        recipe: with every option in it.
        parts: the plan.
        prompt_lengths: tokens of prompt steps, falling.
        contexts: context lengths, rising.
        calibration: texts.
        windows, window_length: how texts are cut, tokens.
        bits, size: the budget; at most one is given.
        targets: chips to compile for.
        keep_onnx: device graphs stay in the bundle.
        keep_grid: weights that lie on their grid stay as they are.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    parts: tuple[Part, ...]
    prompt_lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    calibration: tuple[str, ...]
    windows: int
    window_length: int
    bits: float | None
    size: int | None
    targets: tuple[str, ...]
    keep_onnx: bool
    keep_grid: bool

    @property
    def model(self) -> Source:
        """The weights that are quantized: the checkpoint's, in another basis where the recipe says so."""
        return Rotated(self.checkpoint) if self.recipe.rotate else self.checkpoint

    @property
    def config(self) -> ModelConfig:
        """The geometry of what is quantized."""
        return self.model.config

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Each weight's rule, by canonical name."""
        return self.recipe.resolve(quantized_names(self.config))

    @property
    def grids(self) -> dict[str, Grid]:
        """Each weight's grid, by canonical name."""
        return {name: rule.grid for name, rule in self.rules.items()}

    def fingerprint(self) -> str:
        """sha256 over everything above, and over the checkpoint's files by name, size and time."""
        # Everything beside the weights too: tokenizer and generation settings become part of the bundle.
        root = self.checkpoint.path
        beside = [file for file in root.iterdir() if file.is_file()] if root.is_dir() else []
        files = sorted({*self.checkpoint.files, *beside})
        source = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        texts = [hashlib.sha256(text.encode()).hexdigest() for text in self.calibration]
        body = [
            __version__, source, self.recipe.to_dict(), len(self.parts), self.prompt_lengths, self.contexts,
            texts, self.windows, self.window_length, self.bits, self.size, self.targets, self.keep_onnx,
            self.keep_grid,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def settle(
    checkpoint: Path,
    *,
    recipe: str | Recipe,
    block: int | str | None,
    method: str | None,
    rotate: bool | None,
    bits: float | None,
    size: int | None,
    kv: str | None,
    parts: int,
    prompt_length: int | Sequence[int],
    context: int | Sequence[int] | None,
    calibration: Sequence[str | os.PathLike[str]],
    windows: int,
    window_length: int,
    targets: Sequence[str],
    keep_onnx: bool,
    keep_grid: bool,
) -> ExportSettings:
    """The settings that the options of `export` mean, with the checkpoint opened.

    Raises:
        UserError: they are not possible; the message says what and what to do.
    """
    source = open_checkpoint(checkpoint)
    plan, for_device = plan_parts(source.config, parts), bool(targets) or keep_onnx
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    chosen = replace(chosen, kv=kv or chosen.kv).with_linears(block=block, method=method)
    # A device's fixed grids hold one huge channel only at the cost of all others: see quantize/rotation.py.
    if rotate is None:
        rotate = chosen.rotate or (for_device and not keep_grid)
    chosen = replace(chosen, rotate=rotate)
    settings = ExportSettings(
        checkpoint=source,
        recipe=chosen,
        parts=plan,
        prompt_lengths=_lengths("--prompt-length", prompt_length, source.config)[::-1],
        contexts=_contexts(source.config, context, prompt_length, plan if for_device else None),
        calibration=_texts(calibration),
        windows=windows,
        window_length=min(window_length, source.config.max_context),
        bits=bits,
        size=size,
        targets=tuple(targets),
        keep_onnx=keep_onnx,
        keep_grid=keep_grid,
    )
    _check(settings)
    return settings


def _check(settings: ExportSettings) -> None:
    recipe, rules = settings.recipe, settings.rules
    if rules[EMBEDDING].bits != 8 or rules.get(HEAD, rules[EMBEDDING]).bits != 8:
        raise RecipeError(
            f"recipe {recipe.name!r} gives embedding or head less than 8 bits; expected 8, change its rule"
        )
    for rule in rules.values():
        find_method(rule.method)
    layouts(settings.config, settings.parts, settings.grids)  # refuses blocks that do not divide
    if settings.bits is not None or settings.size is not None:
        spend(recipe, settings.config, _NO_COSTS, bits=settings.bits, size=settings.size, parts=settings.parts)
    if settings.keep_grid and recipe.rotate:
        raise RecipeError("--keep-grid keeps weights as they are and --rotate changes them; expected one of them")
    for target in settings.targets:
        find_soc(target)
    if settings.targets or settings.keep_onnx:
        refuse_blocks(rules)
        if recipe.kv != "int8":
            raise RecipeError(
                f"device graphs need an 8-bit cache and recipe {recipe.name!r} has {recipe.kv}: --kv int8"
            )
    if settings.targets:
        refuse_contexts((*settings.prompt_lengths, 1), settings.contexts)
        find_toolchain()


def _contexts(
    config: ModelConfig,
    context: int | Sequence[int] | None,
    prompt_length: int | Sequence[int],
    device: Sequence[Part] | None,
) -> tuple[int, ...]:
    """Rising; `device`: the parts that a device's compiler will see."""
    step = _lengths("--prompt-length", prompt_length, config)[-1]
    if context is None:
        longest = min(_CONTEXT, config.max_context)
        if device is None or not 2 * step < _SHORT_CONTEXT < longest:
            return (longest,)
        affordable = estimate_compile(config, device, 2).peak_bytes <= _COMPILER_MEMORY
        return (_SHORT_CONTEXT, longest) if affordable else (longest,)
    contexts = _lengths("--context", context, config)
    if contexts[0] <= step:
        raise ConfigError(f"--context {contexts[0]} does not exceed --prompt-length {step}; make one of them fit")
    return contexts


def _lengths(option: str, wanted: int | Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    """Rising, each possible."""
    lengths = tuple(sorted({wanted} if isinstance(wanted, int) else set(wanted)))
    if not lengths:
        raise ConfigError(f"{option} is empty; expected a length, or several separated by commas")
    for length in lengths:
        if not 1 <= length <= config.max_context:
            raise ConfigError(
                f"{option} {length} is not possible; this model was made for 1 to {config.max_context} tokens"
            )
    return lengths


def _texts(files: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    if not files:
        from pydoc_data import topics  # English, a few hundred kilobytes, in every Python

        return ("\n\n".join(topics.topics.values()),)
    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"calibration text {file} cannot be read: {error}; expected a UTF-8 file") from None
    return tuple(texts)
