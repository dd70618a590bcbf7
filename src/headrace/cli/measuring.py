"""Verbs that measure a bundle: verify, bench, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.console import human_bytes, print_json, progress_bars, table
from headrace.cli.options import BundlePath, Json, RunnerName, Threads
from headrace.errors import VerificationFailed
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
    text: Annotated[list[Path], typer.Option("--text", help="A text file; repeatable, each told apart.")],
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="ppl, kl, or both: ppl,kl. By default kl where it can be told.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="What it was made of; kl compares with it.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Most windows of a text.")] = 8,
    length: Annotated[
        int, typer.Option("--length", min=4, help="Tokens of a window; its second half is scored.")
    ] = 512,
    simulate: Annotated[
        str | None, typer.Option("--simulate", help="The bundle on a device's grids: a16, kv8 or both.")
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure perplexity, and divergence from the checkpoint, on text."""
    from headrace.measure.evaluation import evaluate_bundle

    with progress_bars() as progress:
        scores = evaluate_bundle(
            bundle,
            text,
            tasks=tasks,
            checkpoint=checkpoint,
            windows=windows,
            length=length,
            simulate=simulate,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json({"texts": [score.to_dict() for score in scores]})
        return
    rows = []
    for s in scores:
        f = s.fidelity
        kl = ["", "", "", ""] if f is None else [
            f"{f.reference_perplexity:.3f}", f"{f.kl:.3g}", f"{f.kl_p99:.3g}", f"{f.top1:.3f}"
        ]  # fmt: skip
        rows.append((s.text, f"{s.perplexity:.3f}", *kl))
    table(rows, ("text", "perplexity", "reference's", "KL", "KL p99", "top-1"))
