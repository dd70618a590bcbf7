"""Verbs that measure a bundle: verify, bench, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.console import human_bytes, print_json, progress_bars, table
from headrace.cli.options import BundlePath, Json, RunnerName, Save, Threads
from headrace.errors import UserError, VerificationFailed
from headrace.exporter.options import read_lengths

__all__ = ["bench", "evaluate", "verify"]


def verify(
    bundle: BundlePath,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Also compare with what it was made of.")
    ] = None,
    files_only: Annotated[bool, typer.Option("--files-only", help="Only hash the files.")] = False,
    through: Annotated[
        str, typer.Option("--through", help="The last link: host, device, emulation or genie.")
    ] = "host",
    layers: Annotated[bool, typer.Option("--layers", help="Also each layer of the device graphs.")] = False,
    json: Json = False,
) -> None:
    """Check every link of the chain; exit 1 when one is broken."""
    from headrace.measure.parity import verify_bundle

    with progress_bars() as progress:
        links = verify_bundle(
            bundle, checkpoint, files_only=files_only, through=through, layers=layers, progress=progress
        )
    if json:
        print_json({"ok": all(link.ok for link in links), "links": [link.to_dict() for link in links]})
    else:
        rows = [("ok" if link.ok else "FAILED", link.name, link.found, link.limit) for link in links]
        table(rows, ("", "link", "found", "limit"))
    broken = [link for link in links if not link.ok]
    if broken:
        raise VerificationFailed(f"{broken[0].name}: {broken[0].found}; expected {broken[0].limit}")


def bench(
    bundle: BundlePath,
    prompts: Annotated[
        str, typer.Option("-p", "--prompts", help="Prompt lengths, separated by commas.")
    ] = "128,512,1024",
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens to decode.")] = 128,
    depth: Annotated[
        int, typer.Option("-d", "--depth", min=0, help="Tokens in the cache before decoding starts.")
    ] = 128,
    repeats: Annotated[int, typer.Option("-r", "--repeats", min=1, help="Repetitions; the median is told.")] = 5,
    runner: RunnerName = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure loading, time to first token, prompt and decode speed, memory."""
    from headrace.measure.bench import bench_bundle

    with progress_bars() as progress:
        report = bench_bundle(
            bundle,
            prompts=read_lengths("--prompts", prompts),
            tokens=tokens,
            depth=depth,
            repeats=repeats,
            runner=runner,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json(report)
        return
    rows = [(f"prompt {p['tokens']}", f"{p['ttft_ms']:.0f} ms", f"{p['tok_s']:.1f} tok/s") for p in report["prompts"]]
    rows.append((f"decode {tokens} after {depth}", "", f"{report['decode_tok_s']:.1f} tok/s"))
    rows.append(("load", f"{report['load_ms']:.0f} ms", ""))
    rows.append(("KV cache", human_bytes(report["kv_bytes"]), ""))
    rows.append(("peak memory", human_bytes(report["peak_rss_bytes"]), ""))
    table(rows)


def evaluate(
    bundle: BundlePath,
    text: Annotated[list[Path] | None, typer.Option("--text", help="A text file; repeatable, each told apart.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Of texts ppl, kl, chat; of questions mmlu, ceval, cmmlu. Default: ppl, and kl."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="What it was made of; kl and flips compare with it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Questions in their published folder layout, or a folder of these.")
    ] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Worked examples before a question.")] = 5,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Most windows of a text.")] = 8,
    length: Annotated[
        int, typer.Option("--length", min=4, help="Tokens of a window; its second half is scored.")
    ] = 512,
    simulate: Annotated[
        str | None, typer.Option("--simulate", help="The bundle on a device's grids: a16, kv8 or both.")
    ] = None,
    runner: Annotated[str, typer.Option("--runner", help="Who computes.")] = "host",
    threads: Threads = None,
    save: Save = False,
    json: Json = False,
) -> None:
    """Measure perplexity and divergence from the checkpoint on text, and right answers to questions."""
    from headrace.bundle.folder import open_bundle
    from headrace.measure.evaluate import TASKS, parse_tasks
    from headrace.measure.evaluation import evaluate_bundle
    from headrace.measure.item_sets import SETS
    from headrace.measure.questions import ask_bundle
    from headrace.measure.record import make_record, save_record

    wanted = () if tasks is None else parse_tasks(tasks, (*TASKS, *SETS))
    on_text = [task for task in wanted if task in TASKS]
    on_questions = [task for task in wanted if task in SETS]
    if (on_text or not on_questions) and not text:
        raise UserError(f"{on_text[0] if on_text else 'perplexity'} needs a text; expected --text FILE")
    report: dict[str, Any] = {}
    with progress_bars() as progress:
        if on_questions:
            report["choices"] = ask_bundle(
                bundle, on_questions, data, checkpoint=checkpoint, shots=shots, runner=runner, threads=threads,
                progress=progress,
            )  # fmt: skip
        if on_text or not on_questions:
            scores = evaluate_bundle(
                bundle,
                text or [],
                tasks=",".join(on_text) or None,
                checkpoint=checkpoint,
                windows=windows,
                length=length,
                simulate=simulate,
                runner=runner,
                threads=threads,
                progress=progress,
            )
            report["texts"] = [score.to_dict() for score in scores]
    if save:
        opened = open_bundle(bundle)
        for one in report.get("choices", ()):
            save_record(bundle, one["task"], make_record("choices", opened, runner, one))
        if texts := report.get("texts"):
            body = {"simulate": simulate, "texts": texts}
            name = f"text-{simulate.replace(',', '-')}" if simulate else "text"
            save_record(bundle, name, make_record("text", opened, runner, body))
    if json:
        print_json(report)
        return
    if "texts" in report:
        rows = [(t["text"], f"{t['perplexity']:.3f}", *_fidelity(t)) for t in report["texts"]]
        table(rows, ("text", "perplexity", "reference's", "KL", "KL p99", "top-1"))
    for one in report.get("choices", ()):
        rows = [_answers(row["subject"], row) for row in one["subjects"]]
        rows += [_answers("all items", one), (*_answers("mean of subjects", {**one, **one["macro"]})[:4], "", "")]
        table(rows, (f"{one['task']}, {one['shots']} shots", "right", "accuracy", "95 %", "reference", "flips"))


def _fidelity(text: dict[str, Any]) -> tuple[str, ...]:
    if "kl" not in text:
        return ("", "", "", "")
    return f"{text['reference_perplexity']:.3f}", f"{text['kl']:.3g}", f"{text['kl_p99']:.3g}", f"{text['top1']:.3f}"


def _answers(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    told = (name, f"{row['right']} of {row['items']}", f"{row['accuracy']:.1%}", f"{row['low']:.1%}–{row['high']:.1%}")
    if "flips" not in row:
        return (*told, "", "")
    flips = row["flips"]
    return (
        *told,
        f"{row['reference']['accuracy']:.1%}",
        f"{flips['lost']} lost, {flips['gained']} gained, p {flips['p']:.2g}",
    )
