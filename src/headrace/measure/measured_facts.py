"""Facts that were measured of a bundle, or are estimated of phones: speed, fidelity, right answers. See facts.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.bundle.folder import MEASUREMENTS, Bundle
from headrace.forecast.model import plan_model
from headrace.forecast.roofline import LEAST_SHARE
from headrace.measure.facts import PLAN, Facts, decimal, human, table_rows
from headrace.targets.qualcomm.soc import SOCS

__all__ = ["add_measured_facts"]

Records = Mapping[str, Mapping[str, Any]]
_RUNTIMES = {  # runner → its title, and the package whose version matters
    "host": ("ONNX Runtime", "onnxruntime"),
    "device": ("device graphs on ONNX Runtime", "onnxruntime"),
    "native": ("headrace-kernels", "headrace-kernels"),
}


def add_measured_facts(facts: Facts, bundle: Bundle, records: Records) -> None:
    """Add what the measurements kept with a bundle say, and what `plan` estimates of phones.

    Args:
        facts: of the bundle itself; the others are put into it.
        bundle: an opened bundle.
        records: its measurements by file name.
    """
    _speeds(facts, bundle, records)
    _fidelity(facts, records)
    _questions(facts, records)
    _bench(facts, records)


def _speeds(facts: Facts, bundle: Bundle, records: Records) -> None:
    """Measured rows first; estimates after them, which never look alike."""
    rows: list[tuple[str, ...]] = []
    values: list[Any] = []
    title = bundle.root.resolve().name.removesuffix(".bundle")
    for file, record in _of(records, "bench"):
        first, decode, machine = record["prompts"], record["decode"], record["machine"]
        rate = f"{decimal(decode[0]['tok_s'])} after {decode[0]['depth']} tokens" if decode else "–"
        ttft = "–"
        if first:
            low, high = first[0], first[-1]
            ttft = f"{low['seconds']:.3g} ({low['tokens']} tokens) – {high['seconds']:.3g} ({high['tokens']})"
        rows.append(
            (title, machine["system"], machine["processor"], _runtime(record), rate, ttft, f"measured, `{file}`")
        )
        values.append([file, [d["tok_s"] for d in decode], [p["seconds"] for p in first]])
    sources = [f"{MEASUREMENTS}/{file}" for file, _ in _of(records, "bench")]
    if facts["precision"].value["a16"] and (phones := _estimated(facts, bundle)):
        sources.append(PLAN)
        for phone, row in phones:
            rows.append((title, "a phone", *row))
            values.append(phone)
    if not rows:
        rows.append((title, "–", "–", "–", "not measured", "not measured", "–"))
    facts.put("speeds", values, ", ".join(sources) or "nothing measured", table_rows(rows))


def _estimated(facts: Facts, bundle: Bundle) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Phones that published rows tell of, and those the bundle was compiled for; none for a model far smaller than
    any published one, of which bytes do not say how fast it is."""
    report = plan_model(bundle.config, bundle.recipe, bundle.parts, (bundle.context,), bundle.prompt_length)
    if report["weight_bytes"] < LEAST_SHARE * report["least_published_bytes"]:
        return []
    wanted = {row["chip"] for row in report["calibration"]} | set(facts["targets"].value if "targets" in facts else ())
    off = [abs(row["error"]) for row in report["calibration"]]
    told = f"{len(off)} published rows; each of them, left out, is estimated {min(off):.0%} to {max(off):.0%} off"
    facts.put("calibration", report["calibration"], PLAN, told)
    found: list[tuple[dict[str, Any], tuple[str, ...]]] = []
    for phone in report["phones"]:
        if phone["device"] in wanted:
            rate, step, longest = phone["tok_s"], phone["step_seconds"], phone["ttft_seconds"]
            ttft = "–" if step is None else f"~{step['estimated']:g} – ~{longest['estimated']:g}"
            chip = next((soc.title for soc in SOCS if soc.name == phone["device"]), phone["device"])
            speed = f"~{rate['estimated']:g} ({rate['low']:g}–{rate['high']:g})"
            found.append((phone, (chip, "QNN", speed, ttft, "estimated, `plan`")))
    return found


def _fidelity(facts: Facts, records: Records) -> None:
    rows: list[tuple[str, ...]] = []
    values, files = [], []
    for file, record in _of(records, "text"):
        files.append(f"{MEASUREMENTS}/{file}")
        how = f"{record['simulate']}, simulated" if record["simulate"] else _runtime(record)
        for t in record["texts"]:
            values.append(t)
            more: tuple[str, ...] = ("–",) * 4
            if "kl" in t:
                more = (decimal(t["reference_perplexity"]), f"{t['kl']:.3g}", f"{t['kl_p99']:.3g}", f"{t['top1']:.3f}")
            tokens = t.get("tokens", t["windows"] * (t["length"] // 2))
            rows.append((t["text"], how, str(tokens), decimal(t["perplexity"]), *more))
    if rows:
        facts.put("fidelity", values, ", ".join(files), table_rows(rows))


def _questions(facts: Facts, records: Records) -> None:
    rows: list[tuple[str, ...]] = []
    values, files = [], []
    for file, c in _of(records, "choices"):
        files.append(f"{MEASUREMENTS}/{file}")
        reference, flips = c.get("reference"), c.get("flips")
        rows.append(
            (
                c["task"],
                str(c["shots"]),
                f"{c['items']} in {len(c['subjects'])} subjects",
                f"{c['accuracy']:.1%} ({c['low']:.1%}–{c['high']:.1%})",
                f"{reference['accuracy']:.1%}" if reference else "–",
                f"{flips['lost']}, {flips['gained']} ({flips['p']:.2g})" if flips else "–",
            )
        )
        values.append([c["task"], c["right"], c["items"], flips])
    if rows:
        facts.put("questions", values, ", ".join(files), table_rows(rows))


def _bench(facts: Facts, records: Records) -> None:
    """The first runner's numbers at length; the others have their rows among the speeds."""
    for file, record in _of(records, "bench")[:1]:
        source, machine, settings = f"{MEASUREMENTS}/{file}", record["machine"], record["settings"]
        facts.put(
            "bench",
            {"machine": machine, "versions": record["versions"], "settings": settings},
            source,
            f"{_runtime(record)}, {settings['threads']} threads of {machine['processor']} "
            f"({', '.join(machine['isa'])}), medians of {settings['repeats']}; {record['created'][:10]}.",
        )
        first: list[tuple[str, ...]] = [("Prompt", "First token", "Steps × one step", "Tokens a second"), ("---",) * 4]
        for p in record["prompts"]:
            seconds = (f"{p['seconds']:.3g} s", f"{p['formula_seconds']:.3g} s")
            first.append((str(p["tokens"]), *seconds, decimal(p["useful_tok_s"])))
        later: list[tuple[str, ...]] = [("In the cache", "Tokens a second", "Between tokens, p50 / p90 / p99")]
        later.append(("---",) * 3)
        for d in record["decode"]:
            gaps = " / ".join(f"{d['gap_ms'][p]:.3g}" for p in ("p50", "p90", "p99"))
            later.append((str(d["depth"]), decimal(d["tok_s"]), f"{gaps} ms"))
        memory, load = record["memory"], record["load"]
        shown = [table_rows(rows) for rows in (first, later) if len(rows) > 2]
        shown.append(
            f"Loading takes {load['seconds']:.3g} s, a new process {load['cold_start_seconds']:.3g} s to its first "
            f"token; the KV cache is {human(memory['kv_bytes'])}, the process's peak {human(memory['peak_rss_bytes'])}."
        )
        values = {"prompts": record["prompts"], "decode": record["decode"], "memory": memory, "load": load}
        facts.put("bench.table", values, source, "\n\n".join(shown))


def _of(records: Records, kind: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(file, record) for file, record in records.items() if record["format"] == f"headrace-{kind}"]


def _runtime(record: Mapping[str, Any]) -> str:
    title, package = _RUNTIMES.get(record["runner"], (record["runner"], "headrace"))
    return f"{title} {record['versions'].get(package, '')}".strip()
