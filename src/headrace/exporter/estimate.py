"""plan: what an export will need before anything is made: time, memory and disk, beside what its bundle will need
(forecast/).

Everything is derived from geometry and recipe; what is measured is how fast this computer multiplies matrices and
rounds weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.bundle.grid import Grid, quantize_nearest
from headrace.bundle.recipe import Recipe, Rule
from headrace.bundle.weights import layouts
from headrace.config import ModelConfig
from headrace.exporter.settings import ExportSettings
from headrace.forecast.fit import PHONE_MEMORY
from headrace.forecast.model import plan_model
from headrace.model.weights import EMBEDDING, HEAD, input_groups, linears, quantized_weights
from headrace.quantize.budget import guessed_costs
from headrace.quantize.descent import SWEEPS
from headrace.quantize.gptq import ROW_STRIP
from headrace.quantize.gradients import GRADIENT_TOKENS, TOGETHER
from headrace.quantize.methods import find_method
from headrace.quantize.parallel import cores
from headrace.quantize.ranges import HEAD_TOKENS, range_tokens
from headrace.quantize.sensitivity import RANKING_WINDOWS
from headrace.quantize.tables import HEAD_WINDOWS
from headrace.targets.qualcomm.compile_cost import estimate_compile
from headrace.text.sample import SAMPLE_TOKENS

__all__ = ["ExportEstimate", "estimate_export", "plan_export"]

_PROBE = 1024  # rows of the matrices that are multiplied and rounded to learn this computer's speed
_TRIES = 10  # of which the best counts
# Shares of the plain matrix product's speed: of passes and second moments, which are large products beside some
# attention, and of solving for codes, whose products are narrow and whose columns follow each other. A profile of a
# layer of Baichuan2-7B's shape gave 0.87 and 0.5.
_PASSING, _SOLVING_SHARE = 0.9, 0.5
_WORKING = 350_000_000  # bytes: Python and its libraries, and the temporary arrays of the weight in work
_SOLVED = 4  # float32 arrays of a strip of rows that a core solves
# All weights are read and dequantized for the layers, for the proof and for static ranges; each time takes so much of
# what rounding them takes.
_READINGS, _READING = 3, 0.5
_BESIDE_WEIGHTS = 32 << 20  # bytes: graphs, tokenizer, activations' encodings, the folder itself
_ROW_TEXT = 40  # bytes that encodings.json has of a weight's row: its scale and its offset
# Operations of each method in units of N·K². GPTQ takes one; descent GPTQ's one, one to begin and two a sweep (scales,
# codes); best two more before that, for the correction's product and its two triangular solutions.
_SOLVING = {"nearest": 0, "awq": 0, "gptq": 1, "descent": 2 + 2 * SWEEPS, "best": 4 + 2 * SWEEPS}
# A ranking costs so many forward passes: two, one back and one to quantize from, and for each grid that is tried one
# with its errors.
_RANKING_PASSES, _TRIAL_PASSES = 4, 1
# Seconds that a trial takes for each column besides, which is Python's own: it is solved three times, twice for a few
# rows. A search for the scales of blocks takes so many times what rounding to one scale a row takes.
_COLUMN, _BLOCK_SEARCH = 4e-5, 3
# Gradients cost so many forward passes of layers, and of the head: forward, and forward again and back on the tape.
_GRADIENT_PASSES, _GRADIENT_HEAD_PASSES = 3, 2


@dataclass(frozen=True)
class ExportEstimate:
    """A whole export, without compiling.

    Attributes:
        seconds: on this computer, when nothing else runs on it.
        work_seconds: of processor time, which does not depend on who else is at work.
        peak_bytes: memory of the process's own; mapped files of the checkpoint leave it as they are read.
    """

    seconds: float
    work_seconds: float
    peak_bytes: int


def plan_export(settings: ExportSettings, phone_memory: int = PHONE_MEMORY) -> dict[str, Any]:
    """What an export of these settings and its bundle will need.

    Args:
        settings: of the export.
        phone_memory: of the phone it is for, bytes.

    Returns:
        what `plan_model` returns, and: export {seconds, work_seconds, peak_bytes, tokens}; disk_bytes; compile
        {targets, seconds, peak_bytes} or None without a target.

    Raises:
        RecipeError: a rule does not fit.
    """
    options, config = settings.options, settings.config
    tokens = options.windows * options.window_length
    report = plan_model(
        config,
        _forecast_recipe(settings),
        settings.parts,
        settings.contexts,
        settings.prompt_lengths[0],
        phone_memory,
    )
    report["disk_bytes"] = estimate_disk(settings)
    ranged = range_tokens(config, options.windows, options.window_length) if settings.has_encodings else 0
    need = estimate_export(
        config,
        settings.rules,
        tokens,
        ranked=RANKING_WINDOWS * options.window_length,
        tried=settings.tried,
        ranged=ranged,
        jobs=options.jobs,
    )
    report["export"] = {
        "seconds": round(need.seconds, 1),
        "work_seconds": round(need.work_seconds, 1),
        "peak_bytes": need.peak_bytes,
        "tokens": tokens,
    }
    report["compile"] = None
    if options.targets:
        # A prompt step's graph is compiled together with the token step's: one pair for each prompt length.
        pairs = len(settings.contexts) * len(settings.prompt_lengths)
        compiling = estimate_compile(config, settings.parts, pairs)
        report["compile"] = {
            "targets": list(options.targets),
            "seconds": round(compiling.seconds * len(options.targets), 1),
            "peak_bytes": compiling.peak_bytes,
        }
    return report


def estimate_disk(settings: ExportSettings) -> int:
    """Bytes that an export writes before it is done, device graphs and binaries included."""
    rules = _forecast_recipe(settings).resolve(quantized_weights(settings.config))
    grids = {name: rule.grid for name, rule in rules.items()}
    weights, on_device = (
        sum(layout.nbytes for layout in layouts(settings.config, settings.parts, each))
        for each in (grids, {name: grid.on_device for name, grid in grids.items()})
    )
    # Device graphs have the weights in a form of their own, and so has each chip's binary.
    copies = settings.options.for_device + len(settings.options.targets)
    rows = sum(row.matrix[0] for row in quantized_weights(settings.config).values())
    states = 4 * settings.options.windows * settings.options.window_length * settings.config.hidden_size
    return weights + copies * on_device + _ROW_TEXT * rows + states + _BESIDE_WEIGHTS


def _forecast_recipe(settings: ExportSettings) -> Recipe:
    """With a budget, the export measures which grids are chosen; any choice that fills the budget has its size."""
    return settings.within_budget(guessed_costs(settings.tried)).recipe if settings.has_budget else settings.recipe


def estimate_export(
    config: ModelConfig,
    rules: Mapping[str, Rule],
    tokens: int,
    *,
    ranked: int = 0,
    tried: Mapping[str, Sequence[Grid]] | None = None,
    ranged: int = 0,
    jobs: int = 2,
) -> ExportEstimate:
    """Time and memory of an export, from its operations and this computer's speed.

    For T tokens, a linear (N, K) costs 2·T·N·K to compute what calibrates the next. A method that looks at its input
    takes T·K² for the input's second moment, the first group's two of them, K³/3 for a linear's factor, and N·K² as
    often as _SOLVING says. The proof computes the float and the quantized model for SAMPLE_TOKENS, static ranges the
    quantized one for theirs. Each weight is rounded once and read several times.

    Args:
        config: the geometry.
        rules: canonical name → rule: methods differ in cost.
        tokens: of calibration, T.
        ranked: tokens that linears are ranked with, for a budget: forward, back, and a quick method.
        tried: canonical name → grids that are tried for a budget; nothing is ranked without any.
        ranged: tokens that static ranges are found with.
        jobs: cores to use.
    """
    table = config.vocab_size * config.hidden_size
    weights = table if config.tied_head else 2 * table
    speed, rounding = _core_speed()
    walked = _gradient_tokens(rules, tokens)
    tried = tried or {}
    ranked = ranked if tried else 0
    solving = searching = 0.0

    def search(size: int, grids: Iterable[Grid]) -> float:
        return rounding * size * sum(_BLOCK_SEARCH if grid.block else 1 for grid in grids)

    passing = 2.0 * table * (2 * SAMPLE_TOKENS + min(ranged, HEAD_TOKENS) + _GRADIENT_HEAD_PASSES * (walked + ranked))
    head = EMBEDDING if config.tied_head else HEAD
    walked_for_head = min(tokens, HEAD_WINDOWS * ranked // RANKING_WINDOWS) if head in tried else 0
    for name in {EMBEDDING, HEAD} & set(tried):
        searching += search(table, tried[name])
        if name == head:
            passing += 2.0 * table * ranked * len(tried[name])
            solving += table * config.hidden_size * (len(tried[name]) + 1)
    for layer in range(config.num_layers):
        for number, group in enumerate(input_groups(config, layer)):
            shapes = {linear.name: linear.matrix for linear in group}
            columns = group[0].matrix[1]
            methods = {name: find_method(rules[name].method) for name in shapes}
            moments = (2 if number == 0 else 1) * any(method.calibrated for method in methods.values())
            if walked:
                moments = len(group)  # each linear weights tokens in its own way
            moments += any(method.uses_reference for method in methods.values())
            passing += tokens * moments * columns**2 + ranked * (2 if number == 0 else 1) * columns**2
            for name, (n, k) in shapes.items():
                walks = 2 if methods[name].uses_reference else 1  # the float model's beside
                passed = walks * tokens + _GRADIENT_PASSES * walked + 2 * SAMPLE_TOKENS + ranged
                grids = tried.get(name, ())
                passed += walked_for_head + (_RANKING_PASSES + _TRIAL_PASSES * len(grids)) * ranked
                passing += 2 * n * k * passed
                solving += _SOLVING[rules[name].method] * n * k**2 + methods[name].calibrated * k**3 / 3
                solving += len(grids) * (n * k**2 + k**3 / 3)
                weights += n * k
                searching += search(n * k, grids) + _COLUMN * k * len(grids)
    products = (passing / _PASSING + solving / _SOLVING_SHARE) / speed
    reading = _READINGS * _READING * rounding * weights  # by one core
    rounded = rounding * weights + searching
    return ExportEstimate(
        (products + rounded) / jobs + reading,
        products + rounded + reading,
        max(
            _peak_bytes(config, rules, tokens, ranged, jobs, max(ranked, walked)),
            _ranking_bytes(config, ranked, tried),
        ),
    )


def _gradient_tokens(rules: Mapping[str, Rule], tokens: int) -> int:
    """Of calibration, the tokens for which a method asks gradients."""
    asked = any(find_method(rule.method).uses_gradients for rule in rules.values())
    return min(tokens, GRADIENT_TOKENS) if asked else 0


def _peak_bytes(
    config: ModelConfig, rules: Mapping[str, Rule], tokens: int, ranged: int, jobs: int, walked: int
) -> int:
    """The largest of what a layer takes while it is quantized and while its ranges are found, of the proof's head,
    and of every layer's input beside the head, for gradients; benchmarks/layer_7b.py measures the first."""
    weights = sum(linear.size for linear in linears(config, 0).values())
    table = config.vocab_size * config.hidden_size
    widest = max(config.intermediate_size, config.query_size, config.hidden_size)
    # float32 values. Quantized: the layer, and its codes in a byte; hidden states and the widest input; the embedding's
    # codes; where a method looks at the input, its second moment, that damped, the factor, and strips being solved.
    layer = 5 * weights // 4 + tokens * (config.hidden_size + widest) + table // 4
    if any(find_method(rules[name].method).calibrated for name in linears(config)):
        layer += 3 * widest**2 + jobs * _SOLVED * ROW_STRIP * widest
    watched = weights + ranged * (2 * config.hidden_size + 4 * widest) if ranged else 0
    # A whole table and its codes, and what ONNX Runtime has let go but not given back.
    head = 3 * table // 2 + 2 * SAMPLE_TOKENS * config.vocab_size
    back = (config.num_layers + 1) * min(walked, TOGETHER) * config.hidden_size + table if walked else 0
    return 4 * max(layer, watched, head, back) + _WORKING


def _ranking_bytes(config: ModelConfig, ranked: int, tried: Mapping[str, Sequence[Grid]]) -> int:
    """What ranking takes: every layer's input, a layer's weights twice, their codes and scales on each grid that is
    tried, and the second moment of the widest input, that damped, and its factor; or the head and its codes."""
    if not tried:
        return 0
    inputs = (config.num_layers + 1) * ranked * config.hidden_size
    weights = sum(linear.size for linear in linears(config, 0).values())
    codes = max(
        sum(linear.size * len(tried.get(name, ())) for name, linear in linears(config, layer).items())
        for layer in range(config.num_layers)
    )
    widest = max(config.intermediate_size, config.query_size, config.hidden_size)
    layer = 4 * (inputs + 2 * weights + 3 * widest**2) + 9 * codes // 8
    table = config.vocab_size * config.hidden_size
    head = 4 * (inputs + table) + 9 * table * len(tried.get(EMBEDDING if config.tied_head else HEAD, ())) // 8
    return max(layer, head) + _WORKING


def _core_speed() -> tuple[float, float]:
    """Of one core: float32 operations of matrix products a second, and seconds to round a weight."""
    a = np.random.default_rng(0).standard_normal((_PROBE, _PROBE), np.float32)
    few = a[: _PROBE // _TRIES]

    def best(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(_TRIES):
            started = time.thread_time()
            work()
            seconds.append(time.thread_time() - started)
        return min(seconds)

    with cores(1):
        return 2 * _PROBE**3 / best(lambda: a @ a), best(lambda: quantize_nearest(few, Grid(4))) / few.size
