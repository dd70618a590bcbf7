"""Pictures from measurements: KL against bytes beside peers, speed beside peers, a server over time.

    python benchmarks/pictures.py kl docs/images/kl.json [--bundle BUNDLE …] [--peers PEERS.jsonl …] -o docs/images/kl
    python benchmarks/pictures.py speed docs/images/speed.json -o docs/images/speed
    python benchmarks/pictures.py report REPORT.json [--keep docs/images/speed.json] -o docs/images/speed
    python benchmarks/pictures.py soak COURSE.json -o docs/images/soak

kl.json     {"title", "note", "text": its name, "series": [{"name", "ours", "points": [{"label", "bytes", "kl"}]}]}
            A bundle adds its own point: its weights' bytes, and the KL that `evaluate --save` kept for the text. Lines
            of llama_cpp_quality.py's output are peers' points, with and without an importance matrix apart. --keep
            writes the kl.json of what is drawn.
speed.json  {"title", "note", "groups": [{"what", "bars": [{"engine", "median", "low", "high"}]}]}
COURSE.json what `server_soak.py --record` kept.
REPORT.json what `side_by_side.py --report` kept; --keep writes the speed.json of it.

Writes PNG and SVG. Needs matplotlib (headrace[plots]).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from headrace.bundle.folder import open_bundle
from headrace.measure.plots import Point, Series, plot_course, plot_kl, plot_speeds
from headrace.measure.record import kept_records


def main() -> int:
    """Draw one picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("kl", "speed", "report", "soak"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--bundle", type=Path, nargs="*", default=[], help="bundles with kept measurements")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="output of llama_cpp_quality.py")
    parser.add_argument("--keep", type=Path, help="kl, report: write what is drawn as a kl.json or speed.json")
    parser.add_argument("-o", "--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    data = json.loads(options.data.read_text(encoding="utf-8"))
    if options.kind == "soak":
        title = f"{data['streams']} streams for {data['seconds'] / 60:.0f} minutes: {data['answers']} answers"
        note = f"{data['broken']} broken, {data['other_than_alone']} other than alone; benchmarks/server_soak.py"
        for path in plot_course(
            data["memory"], data["answers_over_time"], options.out, title, note, data.get("others", ())
        ):
            print(f"{path}: {path.stat().st_size} bytes")
        return 0
    if options.kind == "report":
        data = speeds(data)
    if options.kind == "kl":
        data["series"] += [one for path in options.peers for one in peers(path, data["text"])]
        if options.bundle:
            points = [bundle_point(b, data["text"]) for b in options.bundle]
            data["series"].append({"name": "headrace, measured now", "ours": True, "points": points})
    if options.keep is not None:
        options.keep.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if options.kind != "kl":
        groups = [
            (g["what"], [(b["engine"], b["median"], b["low"], b["high"]) for b in g["bars"]]) for g in data["groups"]
        ]
        made = plot_speeds(groups, options.out, data["title"], data["note"])
    else:
        series = [Series(s["name"], [Point(**p) for p in s["points"]], s.get("ours", False)) for s in data["series"]]
        made = plot_kl(series, options.out, data["title"], data["note"])
    for path in made:
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


def speeds(report: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of every figure of a report in which somebody stands beside headrace."""
    shape = f"7B shape, {report['layers']} layers,\n"
    names = {"shape": shape, "smol": "SmolLM2-135M,\n", "smol_w4a16": "SmolLM2-135M w4a16,\n"}
    groups = []
    for figure in report["figures"].values():
        if len(figure.get("all", {})) < 2 or "tokens" not in figure:
            continue
        asked = figure["question"]
        what = f"prompt of {asked['tokens']}" if asked["do"] == "prompt" else f"decoding behind {asked['depth']}"
        bars = []
        for name, seconds in figure["all"].items():
            rates = sorted(figure["tokens"] / s for s in seconds)
            label = {"llama": "llama.cpp Q4_0", "openvino": "OpenVINO per channel"}.get(name, name)
            bars.append(
                {
                    "engine": label,
                    **dict(zip(("low", "median", "high"), (rates[0], statistics.median(rates), rates[-1]))),
                }
            )
        groups.append({"what": names[figure["model"]] + what, "bars": bars})
    machine = report["machine"]
    return {
        "title": f"Tokens a second beside peers, {report['threads']} threads of {machine['processor']}",
        "note": "medians and ranges of alternating rounds; benchmarks/side_by_side.py",
        "groups": groups,
    }


def bundle_point(root: Path, text: str) -> dict[str, Any]:
    """A bundle's bytes and what `evaluate --save` measured."""
    for record in kept_records(root).values():
        for one in record.get("texts", ()):
            if one["text"] == text and "kl" in one and not record["simulate"]:
                bundle = open_bundle(root)
                return {"label": bundle.recipe.name, "bytes": bundle.weight_bytes, "kl": one["kl"]}
    raise SystemExit(
        f"{root} has no kept KL of {text}; run: headrace evaluate {root} --text {text} --checkpoint … --save"
    )


def peers(path: Path, text: str) -> list[dict[str, Any]]:
    """llama.cpp's own quantizations: a series without an importance matrix and one with it, those that there are."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["text"] == text:
            name = "llama.cpp, importance matrix" if row["matrix"] else "llama.cpp"
            found.setdefault(name, []).append({"label": row["type"], "bytes": row["bytes"], "kl": row["kl"]})
    return [{"name": name, "points": points} for name, points in found.items()]


if __name__ == "__main__":
    sys.exit(main())
