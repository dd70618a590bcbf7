"""The Snapdragon chain on a whole model: binaries, emulation, and Qualcomm's own Genie, token for token.

    python benchmarks/snapdragon_acceptance.py ../shared/data/tiny-baichuan2

Exports the checkpoint for a chip (weight-shared binaries, each checked against the plan), compiles the same graphs
apart, and lets Genie continue prompts greedily on this computer. Every token and every row of logits is then held
against headrace's own loop over the same binaries in HTP emulation, against the device graphs on ONNX Runtime's CPU
kernels, and against the host runtime. Exits 1 when a limit is broken. Needs headrace[qnn].

    python benchmarks/snapdragon_acceptance.py BUNDLE --prompt-length 16 --context 96 --tokens 8

A bundle instead of a checkpoint: its weights and encodings in graphs of other steps and contexts, for emulation alone.
What an emulated step costs grows with its tokens, so that a larger model is run in short ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import headrace
from headrace.bundle.folder import Bundle, open_bundle
from headrace.graph.device_folder import bundle_device_graphs
from headrace.measure.device_parity import emulated_loop
from headrace.runtime.runner import Runner, Span
from headrace.targets.device import DeviceRunner
from headrace.targets.device_loop import DeviceLoop
from headrace.targets.host.runner import HostRunner
from headrace.targets.qualcomm.context_binary import read_context_binaries
from headrace.targets.qualcomm.emulation import Emulated, emulate
from headrace.targets.qualcomm.genie_dialog import GenieRunner
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer

LOOP_KL = 1e-6  # the same binaries on the same codes
CPU_KL = 1e-3  # the same graphs, other rounding

CHINESE = "长江是中国最长的河流，发源于青藏高原，流经多个省份，最后注入东海。沿江有许多重要的城市，"
ENGLISH = "The Yangtze is the longest river in Asia. It rises in the mountains of the west and flows to the sea. "


@dataclass(frozen=True)
class Case:
    """A prompt; with `then`, a second turn after a few tokens of answer."""

    name: str
    ids: list[int]
    then: list[int] | None = None


def cases(tokenizer: Tokenizer, length: int) -> list[Case]:
    """Three Chinese and three English prompts: one of two turns, one longer than a step, one that grows out of the
    first context (a step and one token, so that it starts there)."""
    long_chinese = (tokenizer.encode(CHINESE) * 16)[: length + length // 3]
    crossing = (tokenizer.encode(ENGLISH) * 16)[: length + 1]
    return [
        Case("Chinese", tokenizer.encode("这个软件的主要功能是")),
        Case("Chinese, two turns", tokenizer.encode("安装之前，请先"), tokenizer.encode("。\n如果出现错误，")),
        Case("Chinese, longer than a step", long_chinese),
        Case("English", tokenizer.encode("This option can be used to")),
        Case("English, a sentence", tokenizer.encode(ENGLISH)),
        Case("English, across contexts", crossing),
    ]


def divergence(p: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(p ‖ q) of each row of logits."""
    a, b = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return np.asarray((np.exp(a) * (a - b)).sum(-1))


def rows_of(runner: Runner, ids: Sequence[int], first: int) -> NDArray[np.float32]:
    """Logits after ids[first:] of a runner that starts anew."""
    rows = []
    for start in range(0, len(ids), runner.prompt_length):
        step = tuple(ids[start : start + runner.prompt_length])
        rows.append(runner.run([Span(0, start, step, tuple(range(max(first - start, 0), len(step))))]))
    return np.concatenate(rows)


def run_case(
    case: Case, tokens: int, genie: GenieRunner, loop: DeviceLoop, cpu: Runner, host: Runner
) -> dict[str, Any]:
    """Genie's answer, and how far the others are from it."""
    genie.reset()
    prompt = case.ids
    if case.then is not None:
        first = [token.id for token in genie.query_tokens(prompt, 8)]
        prompt = [*prompt, *first, *case.then]
    started = time.monotonic()
    answer = list(genie.query_tokens(prompt, tokens, logits=True, rewind=case.then is not None))
    seconds = time.monotonic() - started
    ids = [token.id for token in answer]
    said = np.stack([token.logits for token in answer if token.logits is not None])
    sequence, first_row = [*prompt, *ids[:-1]], len(prompt) - 1
    loop.rewind(0)
    rows = [loop.feed(prompt)[-1]]
    rows += [loop.feed([token])[0] for token in ids[:-1]]
    own = np.stack(rows)
    result: dict[str, Any] = {
        "case": case.name,
        "prompt_tokens": len(prompt),
        "tokens": len(ids),
        "genie_seconds": round(seconds, 1),
        "equal_to_loop": int((own.argmax(-1) == ids).sum()),
        "kl_loop": float(divergence(own, said).max()),
        "text": ids,
    }
    for name, runner in (("cpu", cpu), ("host", host)):
        logits = rows_of(runner, sequence, first_row)
        result[f"kl_{name}"] = float(divergence(logits, said).mean())
        result[f"equal_{name}"] = float((logits.argmax(-1) == ids).mean())
    return result


def compare(
    bundle: Bundle,
    emulated: Emulated,
    graphs: Path,
    tokens: int,
    wanted: Sequence[int] | None,
    report: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """All cases, or those of the wanted numbers; `graphs`: the folder of the device graphs."""
    plan, tokenizer = emulated.plan, load_tokenizer(bundle.root)
    cpu = DeviceRunner.open(bundle, graphs)
    host = HostRunner(bundle)
    results = []
    with (
        emulated_loop(emulated) as loop,
        GenieRunner(
            emulated.config, emulated.folder, lengths=plan.lengths, contexts=plan.contexts, own_sampler=True
        ) as genie,
    ):
        chosen = cases(tokenizer, bundle.prompt_length)
        for case in chosen if wanted is None else [chosen[number] for number in wanted]:
            result = run_case(case, tokens, genie, loop, cpu, host)
            result["text"] = tokenizer.decode(result["text"])
            results.append(result)
            report(result)
    cpu.close()
    host.close()
    return results


def exported(options: argparse.Namespace, work: Path) -> Bundle:
    """The checkpoint's bundle with binaries for the chip, made unless it is there."""
    started = time.monotonic()
    if not (work / "bundle").exists():
        headrace.export(
            options.model,
            work / "bundle",
            recipe=options.recipe,
            block="channel",
            bits=options.bits,
            prompt_length=options.prompt_length,
            context=options.context,
            calibration=options.calibration,
            windows=16,
            targets=[options.target],
            resume=True,
        )
    bundle = open_bundle(work / "bundle")
    binaries = sorted((bundle.root / options.target).glob("*.bin"))
    infos = read_context_binaries(binaries)
    print(f"exported in {time.monotonic() - started:.0f} s; binaries, each checked against the plan:")
    for path, info in zip(binaries, infos):
        shared = info.graphs[0].shared_bytes
        print(
            f"  {path.name}: {len(info.graphs)} graphs, {info.size:,} bytes, {shared:,} of weights shared, {info.build}"
        )
    return bundle


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint, or a bundle with encodings")
    parser.add_argument("--work", type=Path, help="keep bundle and binaries here; what is there already is used")
    parser.add_argument("--target", default="snapdragon-8-elite")
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--bits", type=float, help="code bits averaged over the linears")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--context", default="144,512", help="two: the crossing prompt starts in the first")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the prompts to run, from 0; by default all")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    scratch = tempfile.TemporaryDirectory() if options.work is None else None
    work = Path(scratch.name) if scratch else options.work
    work.mkdir(parents=True, exist_ok=True)

    if (options.model / "headrace.json").exists():
        contexts = tuple(int(c) for c in options.context.split(","))
        bundle = open_bundle(options.model)._replace(prompt_lengths=(options.prompt_length,), contexts=contexts)
    else:
        bundle = exported(options, work)
    if not (work / "device").exists():
        bundle_device_graphs(bundle, work / "device")
    started = time.monotonic()
    emulated = emulate(bundle, work / "emulation", options.target)
    print(f"compiled for emulation in {time.monotonic() - started:.0f} s", flush=True)

    def report(r: dict[str, Any]) -> None:
        print(
            f"{r['case']}: {r['prompt_tokens']} + {r['tokens']} tokens in {r['genie_seconds']} s, equal to the loop "
            f"{r['equal_to_loop']}/{r['tokens']}, KL to the loop {r['kl_loop']:.1e} (at most), to ORT CPU "
            f"{r['kl_cpu']:.1e} ({r['equal_cpu']:.0%} equal), to the host runtime {r['kl_host']:.1e} "
            f"({r['equal_host']:.0%} equal)\n  {r['text']!r}",
            flush=True,
        )

    results = compare(bundle, emulated, work / "device", options.tokens, options.cases, report)
    broken = [
        r["case"]
        for r in results
        if r["equal_to_loop"] != r["tokens"] or r["kl_loop"] > LOOP_KL or r["kl_cpu"] > CPU_KL
    ]
    print(f"broken: {', '.join(broken)}" if broken else "every limit holds")
    if options.json:
        print(json.dumps({"cases": results, "broken": broken}, ensure_ascii=False))
    if scratch:
        scratch.cleanup()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
