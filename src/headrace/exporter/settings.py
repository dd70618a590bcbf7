"""What an export's options mean for a checkpoint, settled and checked: everything that decides the bytes of a bundle.

Refuses what cannot work before anything is written. Knows options, geometry and texts; makes no weight and no graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from headrace import __version__
from headrace.bundle.folder import FORMAT, is_bundle
from headrace.bundle.grid import Grid
from headrace.bundle.recipe import Recipe, Rule, load_recipe, parse_block
from headrace.bundle.weights import layouts
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.lora import adapted, adapter_digest
from headrace.config import ModelConfig
from headrace.errors import CalibrationError, CheckpointError, ConfigError, RecipeError, reason
from headrace.exporter.options import ExportOptions
from headrace.exporter.vocabulary import check_vocabulary
from headrace.graph.device_folder import refuse_blocks
from headrace.model.weights import EMBEDDING, HEAD, linears, quantized_weights, weight_table
from headrace.plan import Part, plan_parts
from headrace.quantize.budget import Costs, grids_to_try, guessed_costs, within_budget
from headrace.quantize.methods import find_method
from headrace.quantize.rotation import Rotated
from headrace.quantize.source import Source
from headrace.targets.qualcomm.compile_cost import estimate_compile
from headrace.targets.qualcomm.genie_bundle import refuse_contexts
from headrace.targets.qualcomm.soc import find_soc
from headrace.targets.qualcomm.toolchain import find_toolchain
from headrace.text.tokenizer_config import template_files

__all__ = ["ExportSettings", "settle"]

_CONTEXT = 4096
_COMPILER_MEMORY = 12e9  # bytes: what a laptop of 16 GB has left
_SHORT_CONTEXT = 1024  # a device's second: a quarter of the cache to read, for each token of a short conversation


@dataclass(frozen=True)
class ExportSettings:
    """Everything that decides the bytes of a bundle.

    Attributes:
        options: what was asked, with what was left to the model or the recipe filled in.
        checkpoint: what was opened.
        recipe: with every option in it.
        parts: the plan.
        texts: of calibration.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    recipe: Recipe
    parts: tuple[Part, ...]
    texts: tuple[str, ...]

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
        return self.recipe.resolve(quantized_weights(self.config))

    @property
    def grids(self) -> dict[str, Grid]:
        """Each weight's grid, by canonical name."""
        return {name: rule.grid for name, rule in self.rules.items()}

    @property
    def has_budget(self) -> bool:
        """Whether grids are chosen within a budget."""
        return self.options.bits is not None or self.options.size is not None

    @property
    def tried(self) -> dict[str, tuple[Grid, ...]]:
        """The grids that a budget chooses from, by canonical name; none without a budget."""
        asked = self.options
        if not self.has_budget:
            return {}
        return grids_to_try(
            self.config, self.rules, size=asked.size is not None, keep=asked.keep_grid, device=asked.for_device
        )

    def within_budget(self, costs: Costs) -> ExportSettings:
        """The same with a recipe that spends the budget where it gains most.

        Raises:
            RecipeError: the budget cannot be met.
        """
        asked = self.options
        chosen = within_budget(self.recipe, self.config, costs, bits=asked.bits, size=asked.size, parts=self.parts)
        return replace(self, recipe=chosen.recipe)

    @property
    def has_encodings(self) -> bool:
        """Whether the bundle has static ranges: a float cache never reaches a device, and linears in blocks, which
        hosts run as well, only when one is asked for."""
        blocks = any(grid.block for grid in self.grids.values())
        return self.recipe.kv == "int8" and (self.options.for_device or not blocks)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of prompt steps, longest first."""
        return self.options.prompt_length[::-1]

    @property
    def contexts(self) -> tuple[int, ...]:
        """Context lengths, longest last."""
        assert self.options.context is not None  # settled
        return self.options.context

    def asked(self) -> dict[str, Any]:
        """Every option that decides bytes, as JSON values by field: the manifest keeps them."""
        values: dict[str, Any] = {}
        for option in fields(self.options):
            if option.metadata["decides"]:
                value = getattr(self.options, option.name)
                values[option.name] = list(value) if isinstance(value, tuple) else value
        recipe = self.options.recipe
        assert isinstance(recipe, Recipe)  # settled
        names = [file.name for file in self.options.calibration] or ["English topics of Python"]
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in self.texts]
        texts = [{"name": name, "sha256": digest} for name, digest in zip(names, hashes, strict=True)]
        adapters = [{"name": folder.name, "sha256": adapter_digest(folder)} for folder in self.options.lora]
        return values | {"recipe": recipe.to_dict(), "calibration": texts, "lora": adapters}

    def identity(self) -> dict[str, Any]:
        """What an interrupted export must still be to go on: the options, the program, the checkpoint's files."""
        # Everything beside the weights too: tokenizer and generation settings become part of the bundle.
        root = self.checkpoint.path
        beside = [*root.iterdir(), *template_files(root).values()] if root.is_dir() else []
        found = {file: file.stat() for file in sorted({*self.checkpoint.files, *filter(Path.is_file, beside)})}
        at = root if root.is_dir() else root.parent
        files = {file.relative_to(at).as_posix(): [stat.st_size, stat.st_mtime_ns] for file, stat in found.items()}
        return {"headrace": __version__, "bundle format": FORMAT, "checkpoint": files, **self.asked()}


def settle(checkpoint: Path, options: ExportOptions) -> ExportSettings:
    """The settings that options mean for a checkpoint, which is opened.

    Raises:
        UserError: they are not possible; the message says what and what to do.
    """
    if is_bundle(checkpoint):
        raise CheckpointError(f"{checkpoint} is a bundle that export has made; expected the checkpoint it was made of")
    source = adapted(open_checkpoint(checkpoint), options.lora)
    plan = plan_parts(source.config, options.parts)
    asked = load_recipe(options.recipe) if isinstance(options.recipe, str) else options.recipe
    if options.method is not None:
        find_method(options.method)
    recipe = replace(asked, kv=options.kv or asked.kv).with_linears(
        linears(source.config),
        block="keep" if options.block is None else parse_block(options.block),
        method=options.method,
        lpbq=False if options.keep_grid else None,  # a checkpoint's own blocks have float16 scales
    )
    # A device's fixed grids hold one huge channel only at the cost of all others: see quantize/rotation.py.
    rotate = options.rotate
    if rotate is None:
        rotate = asked.rotate or (options.for_device and not options.keep_grid)
    recipe = replace(recipe, rotate=rotate)
    settled = replace(
        options,
        recipe=asked,
        rotate=rotate,
        kv=recipe.kv,
        context=_contexts(source.config, options, plan),
        window_length=min(options.window_length, source.config.max_context),
    )
    settings = ExportSettings(settled, source, recipe, plan, _texts(options.calibration))
    _check(settings)
    return settings


def _check(settings: ExportSettings) -> None:
    options, recipe, rules = settings.options, settings.recipe, settings.rules
    head = weight_table(settings.config)[HEAD].stored_as
    for name in (EMBEDDING, head):
        if rules[name].bits == 4:
            raise RecipeError(f"recipe {recipe.name!r} gives {name} 4 bits; expected 5, 6 or 8, change its rule")
    for rule in rules.values():
        find_method(rule.method)
    layouts(settings.config, settings.parts, settings.grids)  # refuses blocks that do not divide
    if settings.has_budget:
        settings.within_budget(guessed_costs(settings.tried))
    if options.keep_grid and recipe.rotate:
        raise RecipeError("--keep-grid keeps weights as they are and --rotate changes them; expected one of them")
    for target in options.targets:
        find_soc(target)
    if options.for_device:
        refuse_blocks(rules)
        if recipe.kv != "int8":
            raise RecipeError(
                f"device graphs need an 8-bit cache and recipe {recipe.name!r} has {recipe.kv}: --kv int8"
            )
    if options.targets:
        refuse_contexts((*settings.prompt_lengths, 1), settings.contexts)
        find_toolchain()
    check_vocabulary(settings.checkpoint, for_genie=bool(options.targets))


def _contexts(config: ModelConfig, options: ExportOptions, parts: Sequence[Part]) -> tuple[int, ...]:
    """The context lengths asked for, or those that suit the model and where it runs."""
    _refuse_beyond("--prompt-length", options.prompt_length, config)
    step = options.prompt_length[-1]
    if options.context is None:
        longest = min(_CONTEXT, config.max_context)
        if not options.for_device or not 2 * step < _SHORT_CONTEXT < longest:
            return (longest,)
        affordable = estimate_compile(config, parts, 2).peak_bytes <= _COMPILER_MEMORY
        return (_SHORT_CONTEXT, longest) if affordable else (longest,)
    _refuse_beyond("--context", options.context, config)
    if options.context[0] <= step:
        raise ConfigError(
            f"--context {options.context[0]} does not exceed --prompt-length {step}; make one of them fit"
        )
    return options.context


def _refuse_beyond(option: str, lengths: Sequence[int], config: ModelConfig) -> None:
    for length in lengths:
        if length > config.max_context:
            raise ConfigError(
                f"{option} {length} is not possible; this model was made for 1 to {config.max_context} tokens"
                + (", where its sliding window ends, which is not supported" if config.sliding_window else "")
            )


def _texts(files: Sequence[Path]) -> tuple[str, ...]:
    if not files:
        from pydoc_data import topics  # English, a few hundred kilobytes, in every Python

        return ("\n\n".join(topics.topics.values()),)
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(
                f"calibration text {file} cannot be read ({reason(error)}); expected a UTF-8 file"
            ) from None
    return tuple(texts)
