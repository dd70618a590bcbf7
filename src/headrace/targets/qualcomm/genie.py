"""The folder that Qualcomm's Genie runs: its configuration files, derived from the plan.

    weight_sharing_model_1_of_5.serialized.bin …     the binaries, made elsewhere
    genie_config.json · htp_backend_ext_config.json  what Genie reads
    tokenizer.json · sample_prompt.txt               brought by the caller
    metadata.json                                    what GenieX reads beside it (geniex.py)
    metadata.yaml · README.md                        for people

This file does not know how binaries or tokenizers are made, nor how Genie is run; genie_check.py holds a folder
against the plan.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.bundle.encodings import Encoding
from headrace.config import ModelConfig
from headrace.errors import TargetError
from headrace.plan import Part
from headrace.targets.device_loop import longest_prompt
from headrace.targets.qualcomm.soc import Soc

__all__ = [
    "BACKEND_FILE",
    "CONFIG_FILE",
    "NO_TOKEN",
    "GeniePlan",
    "Sampling",
    "backend_config",
    "binary_name",
    "genie_config",
    "positional_encoding",
    "write_genie_folder",
]

CONFIG_FILE = "genie_config.json"
BACKEND_FILE = "htp_backend_ext_config.json"
TOKENIZER_FILE = "tokenizer.json"
PROMPT_FILE = "sample_prompt.txt"
NO_TOKEN = -1  # Genie's "unset"; for bos-token the only way not to get one before every query


@dataclass(frozen=True)
class Sampling:
    """How Genie chooses tokens: the model's own defaults. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 42
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class GeniePlan:
    """All that a Genie folder is derived from.

    Attributes:
        config, parts: the geometry and its parts.
        lengths: tokens a step S of the graphs, such as (128, 1).
        contexts: their contexts; every S has every C.
        soc: the chip.
        eos: ids that end an answer; Genie feeds the first one between turns.
        pad: the id that fills a step's unused places.
        bos: the id that Genie shall put before every query, the second turn's too; None for none.
        sampling: how tokens are chosen.
        encodings: of every quantized port, by port name; empty when they are not known.

    Raises:
        TargetError: an id is not in the vocabulary, or there is no eos, length or context.
    """

    config: ModelConfig
    parts: tuple[Part, ...]
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    soc: Soc
    eos: tuple[int, ...]
    pad: int
    bos: int | None = None
    sampling: Sampling = Sampling()
    encodings: Mapping[str, Encoding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.eos or not self.lengths or not self.contexts:
            raise TargetError("Genie needs an eos id, a step length and a context; expected at least one of each")
        marks = [("bos", self.bos), ("pad", self.pad), *(("eos", token) for token in self.eos)]
        for name, token in marks:
            if token is not None and not 0 <= token < self.config.vocab_size:
                raise TargetError(f"{name} id {token} is not in the vocabulary of {self.config.vocab_size} tokens")

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(S, C) of every graph of a part."""
        return [(length, context) for context in self.contexts for length in self.lengths]

    @property
    def longest_prompt(self) -> int:
        """Tokens a first prompt may have."""
        return longest_prompt(0, self.lengths, self.contexts)


def binary_name(part: Part) -> str:
    """`weight_sharing_model_2_of_5.serialized.bin`."""
    return f"weight_sharing_model_{part.number}_of_{part.count}.serialized.bin"


def genie_config(plan: GeniePlan, binaries: Sequence[str], *, callback: str | None = None) -> dict[str, Any]:
    """The content of genie_config.json.

    Args:
        plan: what it is derived from.
        binaries: file names of the context binaries, in any order.
        callback: name of a registered sampler that chooses tokens in place of Genie's own.
    """
    c = plan.config
    sampler: dict[str, Any] = {"version": 1}
    if callback is not None:
        sampler |= {"type": "custom", "callback-name": callback}
    else:
        s = plan.sampling
        sampler |= {"seed": s.seed, "temp": s.temperature, "top-k": s.top_k, "top-p": s.top_p}
        if s.temperature == 0:
            sampler |= {"temp": 1.0, "top-k": 1}  # Genie reads over its key "greedy" (measured)
        if s.repetition_penalty != 1:
            sampler["token-penalty"] = {
                "version": 1,
                "penalize-last-n": max(plan.contexts),
                "repetition-penalty": s.repetition_penalty,
            }
    htp: dict[str, Any] = {
        "version": 1,
        "use-mmap": True,
        "spill-fill-bufsize": 0,
        "mmap-budget": 0,
        "poll": True,
        "cpu-mask": "0xe0",
        "kv-dim": c.head_dim,
        "allow-async-init": False,
    }
    model: dict[str, Any] = {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": list(binaries)}}
    if c.rope_scaling is None:
        htp |= {"pos-id-dim": c.head_dim // 2, "rope-theta": c.rope_theta}
    else:
        model["positional-encoding"] = positional_encoding(c)
    return {
        "dialog": {
            "version": 1,
            "type": "basic",
            "context": {
                "version": 1,
                "size": max(plan.contexts),
                "n-vocab": c.vocab_size,
                "bos-token": NO_TOKEN if plan.bos is None else plan.bos,
                "eos-token": list(plan.eos),
                "pad-token": plan.pad,
            },
            "sampler": sampler,
            "tokenizer": {"version": 1, "path": TOKENIZER_FILE},
            "engine": {
                "version": 1,
                "n-threads": 3,
                "backend": {"version": 1, "type": "QnnHtp", "QnnHtp": htp, "extensions": BACKEND_FILE},
                "model": model,
            },
        }
    }


def positional_encoding(c: ModelConfig) -> dict[str, Any]:
    """The block `positional-encoding` of a model: its rotary base, and what stretches it, if anything does."""
    plain = {"type": "rope", "rope-dim": c.head_dim // 2, "rope-theta": c.rope_theta}
    if (s := c.rope_scaling) is None:
        return plain
    scaling: dict[str, Any] = {"rope-type": s.kind, "factor": s.factor}
    if s.kind == "llama3":
        scaling |= {
            "low-freq-factor": s.low_freq_factor,
            "high-freq-factor": s.high_freq_factor,
            "original-max-position-embeddings": s.original_context,
        }
    return {**plain, "rope-scaling": scaling}


def backend_config(soc: Soc) -> dict[str, Any]:
    """The content of htp_backend_ext_config.json."""
    core = {"core_id": 0, "perf_profile": "burst", "rpc_control_latency": 100}
    return {
        "devices": [{"soc_model": soc.model, "dsp_arch": soc.dsp_arch, "cores": [core]}],
        "memory": {"mem_type": "shared_buffer"},
        "context": {"weight_sharing_enabled": True},
    }


def write_genie_folder(
    folder: Path,
    plan: GeniePlan,
    *,
    name: str,
    tokenizer: Path,
    sample_prompt: str,
    qairt_build: str,
    package: str,
) -> list[Path]:
    """Write everything but the binaries, which are there already.

    Args:
        folder: with the part's binaries, named by `binary_name`.
        plan: what it is derived from.
        name: the model's name, for people.
        tokenizer: a tokenizer.json, copied.
        sample_prompt: a prompt in the model's turn format.
        qairt_build: of the compiler, as the binaries state it ("v2.51.0.260929181845").
        package: what it came in ("onnxruntime-qnn 2.7.0").

    Returns:
        The files written.

    Raises:
        TargetError: a binary or the tokenizer is missing.
    """
    binaries = [binary_name(part) for part in plan.parts]
    for binary in binaries:
        if not (folder / binary).is_file():
            raise TargetError(f"{folder / binary} is missing; export with --target {plan.soc.name} again")
    if not tokenizer.is_file():
        raise TargetError(f"there is no tokenizer at {tokenizer}; Genie needs a tokenizer.json: export again")
    texts = {
        CONFIG_FILE: json.dumps(genie_config(plan, binaries), indent=2) + "\n",
        BACKEND_FILE: json.dumps(backend_config(plan.soc), indent=2) + "\n",
        PROMPT_FILE: sample_prompt,
        "metadata.yaml": _metadata(folder, plan, name, qairt_build, package),
        "README.md": _readme(plan, name, qairt_build),
    }
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    if not (folder / TOKENIZER_FILE).exists() or not (folder / TOKENIZER_FILE).samefile(tokenizer):
        shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    return [folder / file for file in (*texts, TOKENIZER_FILE)]


def release_of(qairt_build: str) -> str:
    """ "2.51.0" of "v2.51.0.260929181845"."""
    return ".".join(qairt_build.removeprefix("v").split(".")[:3])


def _metadata(folder: Path, plan: GeniePlan, name: str, qairt_build: str, package: str) -> str:
    q = json.dumps  # a JSON string is a YAML string
    lines = [
        f"model: {q(name)}",
        f"target: {plan.soc.name}",
        f"soc: {q(plan.soc.title)}",
        f"soc_model: {plan.soc.model}",
        f"dsp_arch: {plan.soc.dsp_arch}",
        "runtime: genie",
        f"qairt_build: {q(qairt_build)}",
        f"qairt_minimum: {q(release_of(qairt_build))}  # the libraries on the device must be at least this release",
        f"compiler: {q(package)}",
        f"step_lengths: {list(plan.lengths)}",
        f"contexts: {list(plan.contexts)}",
        f"longest_prompt: {plan.longest_prompt}",
        f"bos_token: {NO_TOKEN if plan.bos is None else plan.bos}",
        f"eos_tokens: {list(plan.eos)}",
        f"pad_token: {plan.pad}",
        "parts:",
    ]
    for part in plan.parts:
        binary = binary_name(part)
        lines += [
            f"  - file: {binary}",
            f"    bytes: {(folder / binary).stat().st_size}",
            f"    layers: [{part.start}, {part.stop}]  # first, one past the last",
            f"    embedding: {str(part.embeds).lower()}",
            f"    head: {str(part.heads).lower()}",
        ]
    return "\n".join(lines) + "\n"


def _readme(plan: GeniePlan, name: str, qairt_build: str) -> str:
    soc, release = plan.soc, release_of(qairt_build)
    head = f"""\
# {name} for {soc.title}

{len(plan.parts)} context binaries for Qualcomm's Genie. Each holds the graphs for steps of \
{" and ".join(map(str, plan.lengths))} tokens over contexts of {", ".join(map(str, plan.contexts))} tokens, over weights
that are stored once. A first prompt may have up to {plan.longest_prompt} tokens.

Built with QAIRT {qairt_build.removeprefix("v")}; needs at least QAIRT {release} on the device.

## Libraries

Genie and the runtime libraries are Qualcomm's and are not part of this folder. They are in the Qualcomm AI Runtime SDK
(QAIRT), a free download at https://qpm.qualcomm.com/#/main/tools/details/Qualcomm_AI_Runtime_SDK. Libraries older than
{release} refuse these binaries.
"""
    if not soc.android:
        return (
            head
            + f"""
## Run

In this folder, on the machine itself, with the SDK's `lib/aarch64-windows-msvc` and
`lib/hexagon-{soc.dsp_arch}/unsigned` beside `genie-t2t-run.exe` or on PATH:

    genie-t2t-run.exe -c {CONFIG_FILE} --prompt_file {PROMPT_FILE}
"""
        )
    return (
        head
        + f"""
## Run

With QAIRT_HOME the unpacked SDK, and a phone in developer mode:

    adb shell mkdir -p /data/local/tmp/headrace
    adb push . /data/local/tmp/headrace/
    adb push $QAIRT_HOME/bin/aarch64-android/genie-t2t-run /data/local/tmp/headrace/
    adb push $QAIRT_HOME/lib/aarch64-android/. /data/local/tmp/headrace/
    adb push $QAIRT_HOME/lib/hexagon-{soc.dsp_arch}/unsigned/. /data/local/tmp/headrace/
    adb shell
    cd /data/local/tmp/headrace
    chmod +x genie-t2t-run
    export LD_LIBRARY_PATH=$PWD ADSP_LIBRARY_PATH=$PWD
    ./genie-t2t-run -c {CONFIG_FILE} --prompt_file {PROMPT_FILE}
    ./genie-t2t-run -c {CONFIG_FILE} -p "…"

`--profile FILE` writes time to first token and tokens per second.
"""
    )
