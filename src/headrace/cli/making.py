"""Verbs that lead to a bundle: pull, inspect, plan, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from headrace.cli.command import Argument, Option
from headrace.cli.console import human_bytes, note, print_json, progress_bars, show, table
from headrace.cli.export_options import takes_export_options
from headrace.cli.options import CheckpointPath, Json
from headrace.errors import UserError

__all__ = ["export", "inspect", "plan", "pull"]

LEAST_PHONE = 100_000_000  # bytes: a smaller memory is a number without its unit


def pull(
    name: Annotated[str, Argument(metavar="NAME", help="smollm2-135m, or ORG/REPO of a Hugging Face hub.")],
    out: Annotated[Path | None, Option("-o", "--out", help="Folder; the name's last part by default.")] = None,
    file: Annotated[
        str | None, Option("--file", help="Which of several GGUF models: its name, or a part such as Q4_K_M.")
    ] = None,
    revision: Annotated[str | None, Option("--revision", help="A branch, tag or commit.")] = None,
    json: Json = False,
) -> None:
    """Fetch a checkpoint: one format of its weights and what goes with them; an interrupted pull goes on."""
    from headrace.exporter.hub import pulled
    from headrace.exporter.pull import pull as fetch

    with progress_bars() as bars:
        path = fetch(name, out, file=file, revision=revision, progress=bars)
    record = pulled(path) if "/" in name else None
    if record:
        note(f"{record.repository} at {record.revision}; licence: {record.license or 'not stated'}")
    if json:
        print_json(
            {"path": str(path)} | ({"repository": record.repository, "revision": record.revision} if record else {})
        )
    else:
        show(path)


def inspect(
    path: Annotated[Path, Argument(metavar="PATH", help="A checkpoint, a bundle, a Genie folder or a .bin of one.")],
    tensors: Annotated[bool, Option("--tensors", help="Also list every tensor.")] = False,
    program: Annotated[
        bool, Option("--program", help="Instead: a bundle's instructions for the native engine.")
    ] = False,
    json: Json = False,
) -> None:
    """Show geometry, tensors, precisions and sizes."""
    if program:
        from headrace.bundle.folder import open_bundle
        from headrace.native.listing import program_lines
        from headrace.native.program import record_program

        recorded = record_program(open_bundle(path))
        if json:
            print_json(recorded.to_dict())
        else:
            show("\n".join(program_lines(recorded)))
        return
    from headrace.measure.inspection import inspect_path

    report = inspect_path(path)
    if json:
        print_json(report)
        return
    table([(key, str(value)) for key, value in report["summary"].items()])
    show("")
    if graphs := report.get("graphs"):
        head = ("binary", "graph", "inputs", "outputs", "weights", "own", "VTCM")
        sizes = ("weight_bytes", "own_bytes", "vtcm_bytes")
        table(
            [(*(str(g[k]) for k in ("binary", "name", "inputs", "outputs")), *(human_bytes(g[k]) for k in sizes))
             for g in graphs],
            head,
        )  # fmt: skip
    else:
        table([(n, str(c), human_bytes(b)) for n, c, b in report["precisions"]], ("precision", "tensors", "bytes"))
    if tensors:
        show("")
        table([(t["name"], t["precision"], "×".join(map(str, t["shape"]))) for t in report["tensors"]])


def _about(estimate: dict[str, float] | None, unit: str = "") -> str:
    """ "~9.5 (8.1–11) s": never like a measured number. Less than a second is told in milliseconds."""
    if estimate is None:
        return "–"
    factor, unit = (1000, " ms") if unit == " s" and estimate["estimated"] < 1 else (1, unit)
    least, likely, most = (f"{factor * estimate[name]:g}" for name in ("low", "estimated", "high"))
    return f"~{likely} ({least}–{most}){unit}"


def _long(seconds: float) -> str:
    """How long a job takes: "14 s", "13.2 min"."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


@takes_export_options
def plan(
    checkpoint: CheckpointPath,
    *,
    phone_memory: Annotated[str, Option("--phone-memory", help="Of the phone it is for.")] = "12GB",
    json: Json = False,
    **options: Any,
) -> None:
    """Say what an export with the same options and its bundle will need, before anything is made."""
    from headrace.exporter.estimate import plan_export
    from headrace.exporter.options import ExportOptions, read_size
    from headrace.exporter.settings import settle
    from headrace.forecast.roofline import LEAST_SHARE

    memory = read_size("--phone-memory", phone_memory)
    if memory < LEAST_PHONE:
        raise UserError(f"--phone-memory {phone_memory} is {memory} bytes; expected a phone's memory, such as 12GB")
    report = plan_export(settle(checkpoint, ExportOptions.of(options)), memory)
    if json:
        print_json(report)
        return
    rows = [(p["name"], str(p["layers"]), human_bytes(p["weight_bytes"])) for p in report["parts"]]
    table([*rows, ("all", "", human_bytes(report["weight_bytes"]))], ("part", "layers", "weights"))
    show("")
    rows = [(str(c["context"]), human_bytes(c["kv_bytes"]), human_bytes(c["run_bytes"])) for c in report["contexts"]]
    table(rows, ("context", "KV cache", "with weights"))
    show("")
    phones = [
        (
            p["device"],
            str(p["context"]),
            _about(p["tok_s"], " tok/s"),
            _about(p["step_seconds"], " s"),
            _about(p["ttft_seconds"], " s") + (f", {p['steps']} steps" if p["ttft_seconds"] else ""),
        )
        for p in report["phones"]
    ]
    table(phones, ("estimated, not measured", "context", "response rate", "first token, one step", "longest prompt"))
    off = [abs(row["error"]) for row in report["calibration"]]
    small = report["weight_bytes"] < LEAST_SHARE * report["least_published_bytes"]
    show(
        f"from {len(off)} published rows; each, left out, is estimated {min(off):.0%} to {max(off):.0%} off"
        + ("; this model is far smaller than any of them: other costs than bytes will show" if small else "")
    )
    for fit in report["fits"]:
        verdict = "fits" if fit["ok"] else f"does not fit; cheapest change: {fit['change']}"
        show(f"{fit['what']}: {human_bytes(fit['needed'])} of {human_bytes(fit['limit'])}, {verdict}")
    need = report["export"]
    show(
        f"\nexport here: about {_long(need['seconds'])}, {human_bytes(need['peak_bytes'])} of memory and "
        f"{human_bytes(report['disk_bytes'])} of disk, with {need['tokens']} calibration tokens"
    )
    if report["compile"] is None:
        return
    compiling, count = report["compile"], len(report["contexts"])
    each = f", {_long(compiling['seconds'] / count)} of it for each context" if count > 1 else ""
    show(
        f"compiling for {', '.join(compiling['targets'])}: about {_long(compiling['seconds'])}{each}, "
        f"and {human_bytes(compiling['peak_bytes'])} of memory"
    )


@takes_export_options
def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, Option("-o", "--out", metavar="BUNDLE", help="The bundle's folder.")],
    *,
    resume: Annotated[bool, Option("--resume", help="Go on where an interrupted export stopped.")] = False,
    restart: Annotated[
        bool, Option("--restart", help="Begin anew; with --resume only where what is asked differs.")
    ] = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Make a bundle of a checkpoint."""
    import time

    from headrace.bundle.folder import open_bundle
    from headrace.exporter.job import export as run
    from headrace.exporter.origin import licence_line
    from headrace.exporter.workspace import work_place

    started = time.monotonic()
    told = bool(options["calibration"])
    with progress_bars() as bars:

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal told
            if not told:  # only now is it certain that there is something to calibrate
                note("calibration: the English topics that come with Python; --calibration FILE takes your own text")
                told = True
            bars(stage, done, total)

        try:
            run(checkpoint, out, resume=resume, restart=restart, progress=progress, **options)
        except KeyboardInterrupt:
            if (kept := work_place(out)).exists():
                note(f"stopped; what is done stays in {kept}: go on with the same command and --resume")
            raise
    seconds = time.monotonic() - started
    bundle = open_bundle(out)
    made = bundle.weight_bytes
    note(licence_line(bundle.provenance["origin"]))
    if json:
        print_json({"bundle": str(out), "weight_bytes": made, "seconds": round(seconds, 1)})
    else:
        show(f"{out}: {human_bytes(made)} of weights in {len(bundle.parts)} parts, {seconds:.0f} s")
