"""headrace beside llama.cpp and OpenVINO, alternating on one machine; the last line of stdout is one JSON object.

    python benchmarks/side_by_side.py [--quick] [--work DIR] [--peer-python PYTHON] [--threads 2] [--figures NAME,…]
                                      [--report FILE]

Models: Baichuan2-7B's shape with random weights (make_checkpoint.py; 8 layers and the head under --quick, else 32) and
SmolLM2-135M-Instruct. What is missing in DIR is made there once; 32 layers take 23 GB there, a quarter of an hour,
and 17 GB of memory beside the files (OpenVINO 12 of them). Nothing is installed: a peer that PYTHON lacks stands
under `missing`. Every contestant is a process of its own. In each round each is asked once, in turning order; medians
are told, and `ratios` are medians of each round's own ratio, above 1 where headrace is better; `missed` names those
below their floor. A peer with several settings runs all of them in a round that does not count, then its best. The
machine's peaks are measured between the figures (machine_peaks.c, where there is a C compiler).

--report FILE keeps what was measured, figure by figure: a second run measures what the file lacks, or what --figures
names, and joins it. `pictures.py report FILE` draws it.
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

from contestants.arena import COLD_TOKENS, SLOTS, Arena, Machine
from contestants.models import Models

from headrace.bundle.folder import open_bundle
from headrace.files import write_file

LONG = 3968
ROUNDS = 5
ANSWER = 64  # tokens of each answer whose memory is looked at
TRIAL = 512  # tokens at most that a peer's settings are tried on
# Seconds before each question, since threads of whoever answered last still look for work; and before the first that
# counts, for what is done while nobody asks: headrace moves its weights.
REST, SETTLING = 0.25, 1.5
ROOM = 0.3e9  # bytes that headrace's process may take beside weights and cache
# What a ratio should be at least: twice as soon means half of the peer's time.
FLOORS = {
    "prompt_128_vs_llama": 1.5,
    "prompt_128_vs_openvino": 1.5,
    "decode_128_vs_llama": 1.1,
    "decode_128_vs_openvino": 1.0,
    f"decode_{LONG}_vs_llama": 1.3,
    f"prompt_{LONG}_vs_llama": 1.5,
    "smol_decode_vs_llama": 1.2,
    "smol_w4a16_decode_vs_llama": 1.4,
    "smol_prompt_128_vs_llama": 1.5,
    "smol_prompt_1024_vs_llama": 1.5,
    "batch_4_vs_one": 3.0,
    "batch_8_vs_one": 5.0,
    "smol_batch_4_vs_one": 3.0,
    "smol_batch_8_vs_one": 5.0,
    "cold_start_vs_llama": 2.0,
    "smol_cold_start_vs_llama": 2.0,
}


@dataclass(frozen=True)
class Figure:
    """One thing that is measured.

    Attributes:
        name: of the figure; its ratios are called `NAME_vs_llama` and so on.
        model: "shape", "smol" or "smol_w4a16".
        question: what every contestant is asked.
        tokens: that an answer takes the time of.
        peers: who is asked beside headrace.
        rounds: how often.
        trial: what peers with several settings are asked to choose one, and everybody before it counts; None: peers
            keep the setting of this model's figure before, and what they hold.
    """

    name: str
    model: str
    question: dict[str, Any]
    tokens: int
    peers: tuple[str, ...]
    rounds: int
    trial: dict[str, Any] | None


def figures(quick: bool) -> list[Figure]:
    """All figures, the short ones first."""
    both, rounds = ("llama", "openvino"), ROUNDS if quick else ROUNDS + 2

    def decode(model: str, name: str, depth: int, tokens: int, peers: tuple[str, ...]) -> Figure:
        question = {"do": "decode", "depth": depth, "tokens": tokens}
        trial = question if depth < LONG else None
        return Figure(name, model, question, 1, peers, rounds, trial)

    def prompt(model: str, name: str, tokens: int, peers: tuple[str, ...], rounds: int = rounds) -> Figure:
        question = {"do": "prompt", "tokens": tokens}
        trial = {**question, "tokens": min(tokens, TRIAL)}
        return Figure(name, model, question, tokens, peers, rounds, trial)

    return [
        prompt("shape", "prompt_128", 128, both),
        decode("shape", "decode_128", 128, 16, both),
        prompt("smol", "smol_prompt_128", 128, ("llama",)),
        prompt("smol", "smol_prompt_1024", 1024, ("llama",)),
        decode("smol", "smol_decode", 128, 64, ("llama",)),
        decode("smol_w4a16", "smol_w4a16_decode", 128, 64, ("llama",)),
        prompt("shape", f"prompt_{LONG}", LONG, ("llama",), 1 if quick else 3),
        decode("shape", f"decode_{LONG}", LONG, 12, ("llama",)),
    ]


def run_figure(figure: Figure, arena: Arena, machine: Machine) -> dict[str, Any]:
    """Ask everybody in turn: medians, ratios, and how near the machine's limit headrace comes."""
    chosen = arena.peers(figure.model, figure.peers, figure.trial, figure.question)
    contestants = {"headrace": arena.headrace(figure.model), **chosen}
    for contestant in contestants.values():
        for _ in range(2):
            contestant.ask(figure.trial or figure.question)  # does not count
    time.sleep(SETTLING)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = [machine.peaks()]
    for number in range(figure.rounds):
        order = list(contestants)
        for name in order if number % 2 == 0 else reversed(order):
            time.sleep(REST)
            seconds[name].append(contestants[name].ask(figure.question)["seconds"])
    peaks.append(machine.peaks())
    own = seconds["headrace"]
    result: dict[str, Any] = {
        "model": figure.model,
        "question": figure.question,
        "tokens": figure.tokens,
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "all": seconds,
        "settings": {name: c.about["name"] for name, c in contestants.items()},
        "ratios": {
            f"{figure.name}_vs_{name}": statistics.median(b / a for a, b in zip(own, seconds[name])) for name in chosen
        },
    }
    known, size = [p for p in peaks if p], arena.models.size(figure.model)
    if known and figure.question["do"] == "decode":  # bound by bytes
        rate = size.token_bytes(figure.question["depth"]) / statistics.median(own) / 1e9
        result |= {"gb_s": rate, "of_bandwidth": rate / max(p["read_gb_s"] for p in known)}
        result["of_huge_bandwidth"] = rate / max(p["read_huge_gb_s"] for p in known)
    elif known:  # bound by products
        rate = size.prompt_operations(figure.question["tokens"]) / statistics.median(own) / 1e12
        result |= {"tops": rate, "of_int8_peak": rate / max(p["int8_tops"] for p in known)}
        if all("amx_tops" in p for p in known):
            result["of_amx_peak"] = rate / max(p["amx_tops"] for p in known)
    return result


def cold_start(arena: Arena, rounds: int) -> dict[str, Any]:
    """Whole commands from nothing to the first token behind a prompt of 16, files in the system's cache."""
    arena.close()  # which needs the memory that contestants hold
    seconds: dict[str, dict[str, list[float]]] = {}
    for model in ("shape", "smol"):
        commands = {"headrace": arena.chat(model, 1)}  # made before the clock runs: it reads the tokenizer
        if "llama" not in arena.missing:
            commands["llama"] = arena.first_token_of_llama(model)
        taken = seconds[model] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                arena.run(command)
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


def batches(arena: Arena, rounds: int) -> dict[str, Any]:
    """Tokens a second of 4 and 8 sequences together, times those of one: medians of rounds, round by round."""
    out: dict[str, Any] = {"ratios": {}}
    for model, tokens in (("smol", 32), ("shape", 8)):
        contestant = arena.headrace(model)
        rates: dict[int, list[float]] = {1: [], 4: [], 8: []}
        contestant.ask({"do": "batch", "depth": 128, "tokens": tokens, "slots": SLOTS})  # does not count
        time.sleep(SETTLING)
        for _ in range(rounds):
            for slots, found in rates.items():
                question = {"do": "batch", "depth": 128, "tokens": tokens, "slots": slots}
                found.append(slots / contestant.ask(question)["seconds"])
        out[model] = {slots: statistics.median(found) for slots, found in rates.items()}
        for slots in (4, 8):
            name = f"{'smol_' if model == 'smol' else ''}batch_{slots}_vs_one"
            out["ratios"][name] = statistics.median(many / one for many, one in zip(rates[slots], rates[1]))
    return out


def commands(arena: Arena) -> dict[str, Any]:
    """What whole commands take at most, beside the bundle's weights and the cache of their tokens."""
    took = {}
    for model in ("smol", "shape"):
        size = arena.models.size(model)
        for verb, command, answers in (
            ("chat", arena.chat(model, ANSWER), 1),
            ("generate", arena.generate(model, ANSWER, SLOTS), SLOTS),
        ):
            took[f"{model} {verb}"] = {
                "model": f"{model} {verb}",
                "peak_rss": arena.run(command),
                "weight_bytes": open_bundle(arena.models.bundle(model)).weight_bytes,
                "cache_bytes": answers * int(size.token_bytes(COLD_TOKENS + ANSWER) - size.token_bytes(0)),
            }
    return {"ratios": {}, "memory": memory(list(took.values()))}


def memory(ended: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each of headrace's processes that is over: what it took at most beside its weights and its filled cache."""
    own = [about for about in ended if "cache_bytes" in about]
    return {
        about["model"]: {
            **{key: about[key] for key in ("peak_rss", "weight_bytes", "cache_bytes")},
            "beside": about["peak_rss"] - about["weight_bytes"] - about["cache_bytes"],
        }
        for about in own
    }


def joined(report: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A report with what another run found: its figures replace those of the same name, peaks are the higher ones."""
    both = {key: {**report.get(key, {}), **more[key]} for key in ("figures", "ratios", "memory", "settings")}
    peaks = {k: max(v, report.get("peaks", {}).get(k, v)) for k, v in more["peaks"].items()} or report.get("peaks", {})
    missed = {name: [both["ratios"][name], floor] for name, floor in FLOORS.items() if name in both["ratios"]}
    return {
        **report,
        **more,
        **both,
        "peaks": peaks,
        "missed": {name: pair for name, pair in missed.items() if pair[0] < pair[1]},
        "too_much_memory": [model for model, took in both["memory"].items() if took["beside"] > ROOM],
        "seconds": report.get("seconds", 0) + more["seconds"],
    }


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
    parser.add_argument("--figures", help="only these, separated by commas; also batches, cold_start and commands")
    parser.add_argument("--report", type=Path, help="keep figures here, and go on with what it lacks")
    args = parser.parse_args()
    models = Models(args.work, layers=8 if args.quick else 32, peer_python=args.peer_python, tokenizer=args.tokenizer)
    arena = Arena(models, args.peer_python, args.threads, args.runner, quick=args.quick, huge=args.huge_pages)
    machine = Machine(args.work, args.threads)
    few = 3 if args.quick else ROUNDS
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        figure.name: lambda f=figure: run_figure(f, arena, machine) for figure in figures(args.quick)
    }
    jobs |= {"batches": lambda: batches(arena, few), "cold_start": lambda: cold_start(arena, few)}
    jobs |= {"commands": lambda: commands(arena)}
    report: dict[str, Any] = {}
    if args.report is not None and args.report.exists():
        report = json.loads(args.report.read_text(encoding="utf-8"))
    wanted = (
        args.figures.split(",") if args.figures else [name for name in jobs if name not in report.get("figures", {})]
    )
    if unknown := [name for name in wanted if name not in jobs]:
        parser.error(f"there is no figure {unknown[0]}; expected some of {', '.join(jobs)}")
    about = {
        "machine": asdict(machine.description()),
        "missing": arena.missing,
        "threads": args.threads,
        "layers": models.layers,
    }
    for name in wanted:
        started = time.monotonic()
        found = jobs[name]()
        print(f"{name}: {_line(found)}", file=sys.stderr, flush=True)
        last = name == wanted[-1]
        ended = arena.close() if last else []
        more = {
            **about,
            "ratios": found.pop("ratios"),
            "figures": {name: found},
            "peaks": machine.best(),
            "memory": {**found.pop("memory", {}), **memory(ended)},
            "settings": {a["name"]: a for a in ended},
            "seconds": round(time.monotonic() - started, 1),
        }
        report = joined(report, more)
        if args.report is not None:
            write_file(args.report, json.dumps(report).encode())
    print(json.dumps(report))


def _line(found: dict[str, Any]) -> str:
    shown = {k: v for k, v in found.items() if k not in ("all", "settings")}
    return json.dumps(shown, default=str)


if __name__ == "__main__":
    main()
