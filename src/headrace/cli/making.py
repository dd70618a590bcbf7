"""Verbs that lead to a bundle: pull, inspect, plan, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.console import human_bytes, note, print_json, progress_bars, table
from headrace.cli.options import Json, lengths
from headrace.cli.options import size as read_size

__all__ = ["export", "inspect", "plan", "pull"]


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m, or ORG/REPO of a Hugging Face hub.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder; the name's last part by default.")] = None,
    json: Json = False,
) -> None:
    """Fetch a checkpoint."""
    from headrace.exporter.pull import pull as fetch

    path = fetch(name, out)
    if json:
        print_json({"path": str(path)})
    else:
        typer.echo(path)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint or a bundle.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False,
    json: Json = False,
) -> None:
    """Show geometry, tensors, precisions and sizes."""
    from headrace.measure.inspection import inspect_path

    report = inspect_path(path)
    if json:
        print_json(report)
        return
    table([(key, str(value)) for key, value in report["summary"].items()])
    typer.echo("")
    table([(n, str(c), human_bytes(b)) for n, c, b in report["precisions"]], ("precision", "tensors", "bytes"))
    if tensors:
        typer.echo("")
        table([(t["name"], t["precision"], "×".join(map(str, t["shape"]))) for t in report["tensors"]])


def plan(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a .gguf file.")],
    recipe: Annotated[str, typer.Option("--recipe", help="As for export.")] = "w4a16",
    parts: Annotated[int, typer.Option("--parts", help="Graphs the model is split into.")] = 5,
    context: Annotated[str, typer.Option("--context", help="Context lengths: 512,4096.")] = "4096",
    rotate: Annotated[bool, typer.Option("--rotate", help="As export does for a device.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Calibration tokens.")] = 32 * 512,
    json: Json = False,
) -> None:
    """Say what an export and its bundle will need, before anything is made."""
    from headrace.bundle.recipe import load_recipe
    from headrace.checkpoint import open_checkpoint
    from headrace.exporter.estimate import plan_model

    chosen = load_recipe(recipe)
    report = plan_model(
        open_checkpoint(checkpoint).config,
        replace(chosen, rotate=chosen.rotate or rotate),
        parts=parts,
        contexts=lengths("--context", context) or (),
        tokens=tokens,
    )
    if json:
        print_json(report)
        return
    rows = [(p["name"], str(p["layers"]), human_bytes(p["weight_bytes"])) for p in report["parts"]]
    table([*rows, ("all", "", human_bytes(report["weight_bytes"]))], ("part", "layers", "weights"))
    typer.echo("")
    rows = [(str(c["context"]), human_bytes(c["kv_bytes"]), human_bytes(c["run_bytes"])) for c in report["contexts"]]
    table(rows, ("context", "KV cache", "with weights"))
    typer.echo("")
    rows = [(d["device"], str(d["context"]), f"{d['tok_s']:.1f} tok/s") for d in report["decode"]]
    table(rows, ("decoding, at most", "context", "by bandwidth"))
    need = report["export"]
    typer.echo(
        f"\nexport here: about {need['seconds'] / 60:.1f} min and {human_bytes(need['peak_bytes'])} of memory, "
        f"with {need['tokens']} calibration tokens"
    )
    compiling, count = report["compile"], len(report["contexts"])
    each = f", {compiling['seconds'] / count / 60:.1f} min of it for each context" if count > 1 else ""
    typer.echo(
        f"compiling for a chip: about {compiling['seconds'] / 60:.1f} min{each}, "
        f"and {human_bytes(compiling['peak_bytes'])} of memory"
    )


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a .gguf file.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="BUNDLE", help="The bundle's folder.")],
    recipe: Annotated[str, typer.Option("--recipe", help="w4a16, w4b32, another shipped recipe, or a file.")] = "w4a16",
    block: Annotated[
        str | None, typer.Option("--block", help="channel, 16, 32, 64, 128 or 256 for 4-bit weights.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="How 4-bit weights are found.")] = None,
    rotate: Annotated[
        bool | None,
        typer.Option("--rotate/--no-rotate", help="Quantize in a basis without huge channels; a device's default."),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Budget: code bits averaged over the linears; 8 for the most sensitive."),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="Budget: bytes of all weights, such as 105MB.")] = None,
    kv: Annotated[str | None, typer.Option("--kv", help="int8 or float32 cache.")] = None,
    parts: Annotated[int, typer.Option("--parts", help="Graphs the model is split into.")] = 5,
    prompt_length: Annotated[
        str, typer.Option("--prompt-length", help="Tokens a prompt step takes; for a device also several: 128,32.")
    ] = "128",
    context: Annotated[str | None, typer.Option("--context", help="Context length, or several: 512,4096.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option("--calibration", help="Text to calibrate on; repeatable.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Most windows of calibration text.")] = 32,
    window_length: Annotated[int, typer.Option("--window-length", min=2, help="Tokens of a window.")] = 512,
    target: Annotated[str | None, typer.Option("--target", help="Chips to compile for: snapdragon-8-elite,…")] = None,
    keep_onnx: Annotated[bool, typer.Option("--keep-onnx", help="Keep the device graphs in the bundle.")] = False,
    keep_grid: Annotated[
        bool, typer.Option("--keep-grid", help="Keep weights that already lie on their rule's grid.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Cores to use.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted export stopped.")] = False,
    json: Json = False,
) -> None:
    """Make a bundle of a checkpoint."""
    import time

    from headrace.bundle.folder import open_bundle
    from headrace.bundle.recipe import parse_block
    from headrace.exporter.job import export as run

    started = time.monotonic()
    told = bool(calibration)
    with progress_bars() as bars:

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal told
            if not told:  # only now is it certain that there is something to calibrate
                note("calibration: the English topics that come with Python; --calibration FILE takes your own text")
                told = True
            bars(stage, done, total)

        run(
            checkpoint,
            out,
            recipe=recipe,
            block="keep" if block is None else parse_block(block),
            method=method,
            rotate=rotate,
            bits=bits,
            size=read_size(size),
            kv=kv,
            parts=parts,
            prompt_length=lengths("--prompt-length", prompt_length) or (),
            context=lengths("--context", context),
            calibration=calibration or (),
            windows=windows,
            window_length=window_length,
            targets=target.split(",") if target else (),
            keep_onnx=keep_onnx,
            keep_grid=keep_grid,
            jobs=jobs,
            resume=resume,
            progress=progress,
        )
    seconds = time.monotonic() - started
    made = open_bundle(out).weight_bytes
    if json:
        print_json({"bundle": str(out), "weight_bytes": made, "seconds": round(seconds, 1)})
    else:
        typer.echo(f"{out}: {human_bytes(made)} of weights in {parts} parts, {seconds:.0f} s")
