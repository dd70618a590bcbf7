"""From a bundle's weights and encodings to what a Snapdragon runs: device graphs, context binaries, Genie's folder.

    weights, encodings ─► device graphs (S × C) ─► one shared binary a part ─► checked against the plan ─► Genie folder
                                               └─► a binary a graph ─► Genie and the emulator on this computer

Orchestrates, part by part and resumable; graphs, compiler and checks are written elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.bundle.derived import derive, derived_folder
from headrace.bundle.encodings import port_encodings, read_encodings
from headrace.bundle.folder import Bundle
from headrace.bundle.recipe import Rule
from headrace.errors import RecipeError, TargetError
from headrace.files import read_json, write_file
from headrace.graph.emit_device import DeviceGraph, write_device_graphs
from headrace.model.weights import quantized_weights
from headrace.progress import Progress, silent
from headrace.runtime.sampling import SamplingOptions
from headrace.targets.qualcomm.binary_check import check_binary
from headrace.targets.qualcomm.compiler import GraphFile, compile_apart, compile_shared
from headrace.targets.qualcomm.context_binary import read_context_binary
from headrace.targets.qualcomm.genie import (
    BACKEND_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    GeniePlan,
    Sampling,
    backend_config,
    binary_name,
    genie_config,
    write_genie_folder,
)
from headrace.targets.qualcomm.genie_check import check_genie_folder
from headrace.targets.qualcomm.soc import Soc, find_soc
from headrace.text.tokenizer_convert import sentencepiece_to_tokenizer_json
from headrace.text.tokenizer_folder import load_tokenizer
from headrace.text.turns import IdTurns, Message, turn_format

__all__ = [
    "Emulated",
    "compile_target",
    "device_graphs",
    "emulate",
    "genie_plan",
    "genie_sampling",
    "kept_device_graphs",
    "refuse_blocks",
    "refuse_contexts",
    "sample_prompt",
    "tokenizer_json",
]

_ASK = "用一句话介绍长江。 Then say it in English."


@dataclass(frozen=True)
class Emulated:
    """A folder that Genie runs on this computer, and what it was derived from."""

    folder: Path
    config: Mapping[str, Any]
    plan: GeniePlan


def refuse_blocks(rules: Mapping[str, Rule]) -> None:
    """Raise RecipeError for a recipe whose linears are in blocks: the compiler would run them as float16."""
    for name, rule in rules.items():
        if rule.block is not None:
            raise RecipeError(
                f"rule {rule.match!r} gives {name} blocks of {rule.block}, which its compiler refuses; "
                "expected one scale a channel: --block channel"
            )


def refuse_contexts(lengths: Sequence[int], contexts: Sequence[int]) -> None:
    """Raise TargetError for a context of twice a step: there a layer's past and its new keys have the same shape, and
    Genie takes one for the other without a word: every token after the first step is wrong (measured, Genie 1.21)."""
    for length in lengths:
        if 2 * length in contexts:
            raise TargetError(
                f"context {2 * length} is twice a step of {length} tokens, where Genie mixes up past and new keys; "
                f"expected another: --context {2 * length + 8}, or another --prompt-length"
            )


def genie_plan(bundle: Bundle, soc: Soc) -> GeniePlan:
    """What a bundle's Genie folder is derived from: geometry, steps, ids, sampling, encodings.

    Raises:
        TargetError: the model names no end token, or a context is twice a step.
        BundleError: there are no encodings.
    """
    refuse_contexts(bundle.step_lengths, bundle.contexts)
    tokenizer = load_tokenizer(bundle.root)
    settings = bundle.read_json("generation_config.json")
    turns = turn_format(tokenizer, settings, tokenizer.chat_template)
    eos = tuple(dict.fromkeys([*tokenizer.eos_ids, *sorted(turns.stop_ids)]))
    if not eos:
        raise TargetError(
            f"{bundle.root} names no end token; Genie needs one: set eos_token_id in generation_config.json"
        )
    pad = settings.get("pad_token_id")
    return GeniePlan(
        config=bundle.config,
        parts=bundle.parts,
        lengths=bundle.step_lengths,
        contexts=bundle.contexts,
        soc=soc,
        eos=eos,
        pad=pad if isinstance(pad, int) else eos[0],
        bos=tokenizer.bos_id if tokenizer.add_bos else None,
        sampling=genie_sampling(SamplingOptions.from_generation_config(settings)),
        encodings=port_encodings(bundle.parts, read_encodings(bundle.root / "encodings.json")),
    )


def compile_target(bundle: Bundle, target: str, work: Path, progress: Progress = silent) -> Path:
    """Compile every part for a chip into `bundle.root/target` and write the Genie folder there.

    Binaries that an interrupted run finished are kept: each is checked against the plan either way.

    Args:
        bundle: weights, encodings, tokenizer; it need not be published yet.
        target: the chip's name.
        work: where device graphs are written; they are not part of the folder.
        progress: told how far it is.

    Raises:
        TargetError: the chip is unknown, the compiler failed, or what it made is not what was planned.
    """
    plan = genie_plan(bundle, find_soc(target))
    folder = bundle.root / target
    folder.mkdir(exist_ok=True)
    graphs = device_graphs(bundle, work)
    made: dict[str, dict[str, Any]] = {}
    log = work / f"{target}.json"
    if log.exists():
        made = read_json(log)
    for number, part in enumerate(plan.parts):
        progress(f"compiling for {target}", number, len(plan.parts))
        binary = folder / binary_name(part)
        if binary.name not in made or not binary.is_file():
            own = [GraphFile(graph.name, graph.path) for graph in graphs if graph.part == part]
            compiled = compile_shared(own, plan.soc, binary)
            made[binary.name] = {"seconds": round(compiled.seconds, 1), "peak_bytes": compiled.peak_bytes}
        info = read_context_binary(binary)
        check_binary(binary, info, plan.soc, plan.config, part, plan.steps, plan.encodings)
        made[binary.name] |= {"bytes": binary.stat().st_size, "qairt": info.build}
        write_file(log, json.dumps(made, indent=1).encode())
    progress(f"compiling for {target}", len(plan.parts), len(plan.parts))
    _write_folder(bundle, folder, plan, info.build)
    check_genie_folder(folder, plan)
    return folder


def emulate(bundle: Bundle, folder: Path, target: str = "snapdragon-8-elite", progress: Progress = silent) -> Emulated:
    """The same graphs compiled apart, for Genie and the emulator on this computer; made once a bundle.

    Args:
        bundle: a published bundle.
        folder: where binaries and configuration are kept; another bundle's are replaced.
        target: the chip that is emulated.
        progress: told how far it is.

    Raises:
        TargetError: the compiler failed, or what it made is not what was planned.
    """
    plan = genie_plan(bundle, find_soc(target))

    def make(made: Path) -> None:
        graphs = device_graphs(bundle, made / "device")
        for number, part in enumerate(plan.parts):
            progress("compiling for emulation", number, len(plan.parts))
            compile_apart([GraphFile(g.name, g.path) for g in graphs if g.part == part], plan.soc, made)
        progress("compiling for emulation", len(plan.parts), len(plan.parts))
        binaries = [path.name for path in sorted(made.glob("*.bin"))]
        config = genie_config(plan, binaries)
        write_file(made / CONFIG_FILE, json.dumps(config, indent=2).encode())
        write_file(made / BACKEND_FILE, json.dumps(backend_config(plan.soc), indent=2).encode())
        write_file(made / TOKENIZER_FILE, tokenizer_json(bundle).encode())
        check_genie_folder(made, plan, emulation=True)
        shutil.rmtree(made / "device")

    derive(bundle, target, folder, make, progress)
    return Emulated(folder, read_json(folder / CONFIG_FILE), plan)


def kept_device_graphs(bundle: Bundle) -> Path:
    """The folder of a bundle's device graphs: its own, when they were kept, or one beside it, made once.

    Raises:
        RecipeError: linears are quantized in blocks.
    """
    own = bundle.root / "device"
    if own.is_dir():
        return own
    folder = derived_folder(bundle, "device")
    return derive(bundle, "device", folder, lambda made: device_graphs(bundle, made))


def device_graphs(bundle: Bundle, folder: Path) -> list[DeviceGraph]:
    """All device graphs of a bundle, written into `folder`.

    Raises:
        RecipeError: linears are quantized in blocks.
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


def tokenizer_json(bundle: Bundle) -> str:
    """The bundle's vocabulary as the tokenizer.json that Genie needs; turn ids become special tokens.

    Raises:
        TokenizerError: a SentencePiece model that cannot be converted exactly.
    """
    whole = bundle.root / "tokenizer.json"
    if whole.exists():
        return whole.read_text(encoding="utf-8")
    settings = bundle.read_json("generation_config.json")
    turn_ids = [settings.get("user_token_id"), settings.get("assistant_token_id")]
    special: dict[int, str | None] = {token: None for token in turn_ids if isinstance(token, int)}
    return sentencepiece_to_tokenizer_json(bundle.root / "tokenizer.model", special)


def sample_prompt(bundle: Bundle) -> str:
    """A prompt in the model's turn format, spelled as text that Genie's tokenizer reads back to the same ids."""
    tokenizer = load_tokenizer(bundle.root)
    settings = bundle.read_json("generation_config.json")
    turns = turn_format(tokenizer, settings, tokenizer.chat_template)
    special = set(tokenizer.special_ids)
    if isinstance(turns, IdTurns):
        special |= {settings["user_token_id"], settings["assistant_token_id"]}
    ids = turns.render([Message("user", _ASK)], bundle.context)
    if tokenizer.add_bos and ids and ids[0] == tokenizer.bos_id:
        ids = ids[1:]  # Genie puts it there itself
    text = ""
    run: list[int] = []
    for token in ids:
        if token in special:
            text += tokenizer.decode(run, continues=True) + tokenizer.id_to_piece(token)
            run = []
        else:
            run.append(token)
    return text + tokenizer.decode(run, continues=True)


def genie_sampling(options: SamplingOptions) -> Sampling:
    """Sampling as Genie takes it. Greedy is its likeliest token of one: it reads over the key `greedy` and would sample
    over the whole vocabulary (measured, Genie 1.21). Without a seed every dialog samples alike."""
    seed = {} if options.seed is None else {"seed": options.seed}
    if options.greedy:
        return Sampling(temperature=1.0, top_k=1, repetition_penalty=options.repetition_penalty, **seed)
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        **seed,
    )


def _write_folder(bundle: Bundle, folder: Path, plan: GeniePlan, qairt_build: str) -> None:
    tokenizer = folder / TOKENIZER_FILE
    write_file(tokenizer, tokenizer_json(bundle).encode())
    write_genie_folder(
        folder,
        plan,
        name=str(bundle.provenance.get("checkpoint", bundle.root.name)),
        tokenizer=tokenizer,
        sample_prompt=sample_prompt(bundle),
        qairt_build=qairt_build,
        package=f"onnxruntime-qnn {importlib.metadata.version('onnxruntime-qnn')}",
    )
