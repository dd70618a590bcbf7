"""headrace beside llama.cpp and OpenVINO, alternating on one machine; the last line of stdout is one JSON object.

    python benchmarks/side_by_side.py [--quick] [--work DIR] [--peer-python PYTHON] [--threads 2] [--figures NAME,…]

Models: Baichuan2-7B's shape with random weights (make_checkpoint.py; 8 layers and the head under --quick, else 32) and
SmolLM2-135M-Instruct. What is missing in DIR is made there once. Nothing is installed: a peer that PYTHON lacks stands
under `missing`. Every contestant is a process of its own. In each round each is asked once, in turning order; medians
are told, and `ratios` are medians of each round's own ratio, above 1 where headrace is better. A peer with several
settings runs all of them in a round that does not count, then its best. The machine's peaks are measured between the
figures (machine_peaks.c, where there is a C compiler).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from contestants.arena import Arena, Machine
from contestants.models import Models

LONG = 3968
ROUNDS = 5


@dataclass(frozen=True)
class Figure:
    """One thing that is measured.

    Attributes:
        name: of the figure; its ratios are called `NAME_vs_llama` and so on.
        model: "shape" or "smol".
        question: what every contestant is asked.
        peers: who is asked beside headrace.
        trial: what peers with several settings are asked to choose one; the question itself when None.
        rounds: how often.
        bytes_read: of weights and cache that an answer must read at least; 0: not bound by bytes.
        operations: int8 operations that an answer must do; 0: not bound by them.
    """

    name: str
    model: str
    question: dict[str, Any]
    peers: tuple[str, ...]
    rounds: int = ROUNDS
    trial: dict[str, Any] | None = None
    bytes_read: float = 0
    operations: float = 0


def figures(models: Models, quick: bool) -> list[Figure]:
    """All figures, the short ones first."""
    shape, smol = models.shape, models.smol

    def decode(model: str, name: str, depth: int, tokens: int, peers: tuple[str, ...], rounds: int) -> Figure:
        question = {"do": "decode", "depth": depth, "tokens": tokens}
        size = {"shape": shape, "smol": smol}[model].token_bytes(depth)
        return Figure(name, model, question, peers, rounds, {**question, "depth": min(depth, most)}, bytes_read=size)

    def prompt(model: str, name: str, tokens: int, peers: tuple[str, ...], rounds: int) -> Figure:
        question = {"do": "prompt", "tokens": tokens}
        work = {"shape": shape, "smol": smol}[model].prompt_operations(tokens)
        return Figure(name, model, question, peers, rounds, {**question, "tokens": min(tokens, most)}, operations=work)

    most = 1024 if quick else LONG  # tokens of a trial

    both, rounds = ("llama", "openvino"), ROUNDS if quick else ROUNDS + 2
    return [
        prompt("shape", "prompt_128", 128, both, rounds),
        decode("shape", "decode_128", 128, 16, both, rounds),
        prompt("smol", "smol_prompt_128", 128, ("llama",), rounds),
        prompt("smol", "smol_prompt_1024", 1024, ("llama",), rounds),
        decode("smol", "smol_decode", 128, 64, ("llama",), rounds),
        prompt("shape", f"prompt_{LONG}", LONG, ("llama",), 1 if quick else 3),
        decode("shape", f"decode_{LONG}", LONG, 12, ("llama",), rounds),
    ]


def run_figure(figure: Figure, arena: Arena, machine: Machine) -> dict[str, Any]:
    """Ask everybody in turn: medians, ratios, and how near the machine's limit headrace comes."""
    chosen = arena.peers(figure.model, figure.peers, figure.trial or figure.question)
    contestants = {"headrace": arena.headrace(figure.model), **chosen}
    for contestant in contestants.values():
        contestant.ask(figure.trial or figure.question)  # does not count
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = [machine.peaks()]
    for number in range(figure.rounds):
        order = list(contestants)
        for name in order if number % 2 == 0 else reversed(order):
            seconds[name].append(contestants[name].ask(figure.question)["seconds"])
    peaks.append(machine.peaks())
    own = seconds["headrace"]
    result: dict[str, Any] = {
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "all": seconds,
        "settings": {name: c.about["name"] for name, c in contestants.items()},
        "ratios": {
            f"{figure.name}_vs_{name}": statistics.median(b / a for a, b in zip(own, seconds[name])) for name in chosen
        },
    }
    known = [p for p in peaks if p]
    if figure.bytes_read and known:
        rate = figure.bytes_read / statistics.median(own) / 1e9
        result |= {"gb_s": rate, "of_bandwidth": rate / max(p["read_gb_s"] for p in known)}
        result["of_huge_bandwidth"] = rate / max(p["read_huge_gb_s"] for p in known)
    if figure.operations and known:
        rate = figure.operations / statistics.median(own) / 1e12
        result |= {"tops": rate, "of_int8_peak": rate / max(p["int8_tops"] for p in known)}
        if all("amx_tops" in p for p in known):
            result["of_amx_peak"] = rate / max(p["amx_tops"] for p in known)
    return result


def cold_start(arena: Arena, rounds: int) -> dict[str, Any]:
    """Whole commands from nothing to the first token behind a prompt of 16, files in the system's cache."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for model in ("shape", "smol"):
        commands: dict[str, Callable[[], list[str]]] = {"headrace": lambda m=model: arena.first_token(m)}
        if "llama" not in arena.missing:
            commands["llama"] = lambda m=model: arena.first_token_of_llama(m)
        taken = seconds[model] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                arena.run(command())
                if number:  # the first one warms the file cache
                    taken[name].append(time.perf_counter() - started)
    return {
        "seconds": {m: {n: statistics.median(s) for n, s in t.items()} for m, t in seconds.items()},
        "all": seconds,
        "ratios": {
            ("" if m == "shape" else "smol_") + "cold_start_vs_llama": statistics.median(
                b / a for a, b in zip(t["headrace"], t["llama"])
            )
            for m, t in seconds.items()
            if "llama" in t
        },
    }


def batches(arena: Arena) -> dict[str, Any]:
    """Tokens a second of 4 and 8 sequences together, times those of one."""
    out: dict[str, Any] = {"ratios": {}}
    for model, tokens in (("smol", 32), ("shape", 8)):
        contestant = arena.headrace(model)
        rate = {
            slots: slots / contestant.ask({"do": "batch", "depth": 128, "tokens": tokens, "slots": slots})["seconds"]
            for slots in (1, 4, 8)
        }
        out[model] = rate
        for slots in (4, 8):
            out["ratios"][f"{'smol_' if model == 'smol' else ''}batch_{slots}_vs_one"] = rate[slots] / rate[1]
    return out


def main() -> None:
    """Read the options, make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 layers instead of 32, fewer rounds: about 5 minutes")
    parser.add_argument("--work", type=Path, default=Path(".cache/side-by-side"), help="where models are made and kept")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama_cpp and openvino")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model for the shape's vocabulary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runner", default="native", help="headrace's own: native or host")
    parser.add_argument("--huge-pages", action="store_true", help="headrace's weights copied into huge pages")
    parser.add_argument("--figures", help="only these, separated by commas; also cold_start and batches")
    args = parser.parse_args()
    started = time.monotonic()
    models = Models(args.work, layers=8 if args.quick else 32, peer_python=args.peer_python, tokenizer=args.tokenizer)
    arena = Arena(models, args.peer_python, args.threads, args.runner, quick=args.quick, huge=args.huge_pages)
    machine = Machine(args.work, args.threads)
    wanted = args.figures.split(",") if args.figures else None
    report: dict[str, Any] = {"ratios": {}, "figures": {}, "missing": arena.missing}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        figure.name: lambda f=figure: run_figure(f, arena, machine) for figure in figures(models, args.quick)
    }
    jobs |= {"batches": lambda: batches(arena), "cold_start": lambda: cold_start(arena, 3 if args.quick else ROUNDS)}
    for name, job in jobs.items():
        if wanted is None or name in wanted:
            found = job()
            report["ratios"] |= found.pop("ratios")
            report["figures"][name] = found
            print(f"{name}: {_line(found)}", file=sys.stderr, flush=True)
    report |= {"about": arena.close(), "peaks": machine.best(), "machine": asdict(machine.description())}
    report |= {"threads": args.threads, "layers": models.shape.layers, "seconds": round(time.monotonic() - started)}
    print(json.dumps(report))


def _line(found: dict[str, Any]) -> str:
    shown = {k: v for k, v in found.items() if k not in ("all", "settings")}
    return json.dumps(shown, default=str)


if __name__ == "__main__":
    main()
