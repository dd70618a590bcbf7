"""The command line: one program, verbs in the order data flows. Imports what a verb needs when it runs.

Exit status: 0 done, 1 a check that was asked for failed, 2 an error told in one line, 130 Ctrl-C.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from headrace import __version__
from headrace.console import human_bytes, note, print_json, progress_bars, table
from headrace.errors import HeadraceError, UserError, VerificationFailed

if TYPE_CHECKING:
    from headrace.genie_model import GenieModel
    from headrace.language_model import LanguageModel

__all__ = ["app", "main"]

app = typer.Typer(
    name="headrace",
    help="From an open checkpoint to a phone, and the very same model on any computer.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by: headrace export")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Threads; physical cores by default.")]


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        return int(app(arguments or ["--help"], prog_name="headrace", standalone_mode=False) or 0)
    except VerificationFailed as error:
        note(f"failed: {error}")
        return 1
    except HeadraceError as error:
        note(f"error: {error}")
        return 2
    except TyperException as error:
        hint = getattr(getattr(error, "ctx", None), "command_path", "headrace")
        note(f"error: {_one_line(error)}; see: {hint} --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        note("")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        return 0
    except (OSError, MemoryError) as error:
        note(f"error: {str(error) or type(error).__name__}")
        return 2


def _one_line(error: TyperException) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(str(text).split()).rstrip(".")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m, or ORG/REPO of a Hugging Face hub.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder; the name's last part by default.")] = None,
    json: Json = False,
) -> None:
    """Fetch a checkpoint."""
    from headrace.pull import pull as fetch

    path = fetch(name, out)
    if json:
        print_json({"path": str(path)})
    else:
        typer.echo(path)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint or a bundle.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False,
    json: Json = False,
) -> None:
    """Show geometry, tensors, precisions and sizes."""
    from headrace.inspection import inspect_path

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


@app.command()
def plan(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a .gguf file.")],
    recipe: Annotated[str, typer.Option("--recipe", help="As for export.")] = "w4a16",
    parts: Annotated[int, typer.Option("--parts", help="Graphs the model is split into.")] = 5,
    context: Annotated[str, typer.Option("--context", help="Context lengths: 512,4096.")] = "4096",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Calibration tokens.")] = 32 * 512,
    json: Json = False,
) -> None:
    """Say what an export and its bundle will need, before anything is made."""
    from headrace.checkpoint import open_checkpoint
    from headrace.measure.planner import plan_model
    from headrace.quantize.recipe import load_recipe

    report = plan_model(
        open_checkpoint(checkpoint).config,
        load_recipe(recipe),
        parts=parts,
        contexts=_lengths("--context", context) or (),
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


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a .gguf file.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="BUNDLE", help="The bundle's folder.")],
    recipe: Annotated[str, typer.Option("--recipe", help="w4a16, w4b32, another shipped recipe, or a file.")] = "w4a16",
    block: Annotated[
        str | None, typer.Option("--block", help="channel, 16, 32, 64, 128 or 256 for 4-bit weights.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="How 4-bit weights are found.")] = None,
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Budget: code bits averaged over the linears; 8 for the most sensitive."),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="Budget: bytes of all weights, such as 105MB.")] = None,
    kv: Annotated[str | None, typer.Option("--kv", help="int8 or float32 cache.")] = None,
    parts: Annotated[int, typer.Option("--parts", help="Graphs the model is split into.")] = 5,
    prompt_length: Annotated[int, typer.Option("--prompt-length", help="Tokens a prompt step takes.")] = 128,
    context: Annotated[str | None, typer.Option("--context", help="Context length, or several: 512,4096.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option("--calibration", help="Text to calibrate on; repeatable.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Most windows of calibration text.")] = 32,
    window_length: Annotated[int, typer.Option("--window-length", min=2, help="Tokens of a window.")] = 512,
    target: Annotated[str | None, typer.Option("--target", help="Chips to compile for: snapdragon-8-elite,…")] = None,
    keep_onnx: Annotated[bool, typer.Option("--keep-onnx", help="Keep the device graphs in the bundle.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted export stopped.")] = False,
    json: Json = False,
) -> None:
    """Make a bundle of a checkpoint."""
    import time

    from headrace.bundle import open_bundle
    from headrace.exporter import export as run
    from headrace.quantize.recipe import parse_block

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
            bits=bits,
            size=_size(size),
            kv=kv,
            parts=parts,
            prompt_length=prompt_length,
            context=_lengths("--context", context),
            calibration=calibration or (),
            windows=windows,
            window_length=window_length,
            targets=target.split(",") if target else (),
            keep_onnx=keep_onnx,
            resume=resume,
            progress=progress,
        )
    seconds = time.monotonic() - started
    made = open_bundle(out).weight_bytes
    if json:
        print_json({"bundle": str(out), "weight_bytes": made, "seconds": round(seconds, 1)})
    else:
        typer.echo(f"{out}: {human_bytes(made)} of weights in {parts} parts, {seconds:.0f} s")


@app.command()
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


@app.command()
def chat(
    bundle: BundlePath,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and leave.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without a turn format.")] = False,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float | None, typer.Option("--temp", help="Sampling temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Only the likeliest tokens of this probability.")
    ] = None,
    repeat_penalty: Annotated[
        float | None, typer.Option("--repeat-penalty", help="Above 1: fewer repetitions.")
    ] = None,
    seed: Annotated[int | None, typer.Option("-s", "--seed", help="The same seed, the same answer.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End the answer at this text; repeatable.")] = None,
    runner: Annotated[str, typer.Option("--runner", help="host, device or genie.")] = "host",
    threads: Threads = None,
) -> None:
    """Talk with a bundle."""
    from headrace.repl import converse, print_answer

    with _open_model(bundle, runner, threads) as model:
        options = model.sampling_options(
            temperature=0.0 if greedy else temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repeat_penalty,
            seed=seed,
        )
        session = model.chat(system, raw=raw)
        if session.turns.is_raw and not raw:
            note("this model has no turn format: it continues your text")

        def answer(text: str) -> Any:
            return session.say(text, max_tokens=max_tokens, stop=stop or (), options=options)

        if prompt is not None:
            print_answer(answer(prompt))
        elif sys.stdin.isatty():
            converse(answer)
        else:
            print_answer(answer(sys.stdin.read()))


@app.command()
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
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure loading, time to first token, prompt and decode speed, memory."""
    from headrace.measure.bench import bench_bundle

    with progress_bars() as progress:
        report = bench_bundle(
            bundle,
            prompts=_lengths("--prompts", prompts) or (),
            tokens=tokens,
            depth=depth,
            repeats=repeats,
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


@app.command()
def evaluate(
    bundle: BundlePath,
    text: Annotated[list[Path], typer.Option("--text", help="A text file; repeatable, each told apart.")],
    tasks: Annotated[str, typer.Option("--tasks", help="ppl, kl, or both: ppl,kl.")] = "ppl",
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="What it was made of; kl needs it.")] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Most windows of a text.")] = 8,
    length: Annotated[
        int, typer.Option("--length", min=4, help="Tokens of a window; its second half is scored.")
    ] = 512,
    simulate: Annotated[
        str | None, typer.Option("--simulate", help="Instead of the bundle: a16, kv8 or both, on the checkpoint.")
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
            f"{f.reference_perplexity:.3f}", f"{f.kl:.4f}", f"{f.kl_p99:.3f}", f"{f.top1:.3f}"
        ]  # fmt: skip
        rows.append((s.text, f"{s.perplexity:.3f}", *kl))
    table(rows, ("text", "perplexity", "checkpoint's", "KL", "KL p99", "top-1"))


@app.command()
def push(
    bundle: BundlePath,
    target: Annotated[str, typer.Option("--target", help="Which of the bundle's chips.")] = "snapdragon-8-elite",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none.")] = False,
) -> None:
    """Copy the Genie folder to a phone over adb."""
    import shlex

    from headrace.bundle import open_bundle
    from headrace.errors import TargetError
    from headrace.targets.adb import push_commands, push_folder, run_command
    from headrace.targets.soc import find_soc

    find_soc(target)
    folder = open_bundle(bundle).root / target
    if not folder.is_dir():
        raise TargetError(f"{folder} does not exist; expected a Genie folder: export with --target {target}")
    name = bundle.resolve().name
    commands = push_commands(folder, name)
    if not dry_run:
        push_folder(commands)
        note(f"on the phone; with QAIRT's libraries beside it (see {folder}/README.md) this answers the sample prompt:")
    for command in [*(commands if dry_run else []), run_command(name)]:
        typer.echo(shlex.join(command))


def _open_model(bundle: Path, runner: str, threads: int | None) -> LanguageModel | GenieModel:
    if runner == "genie":
        from headrace.genie_model import load_genie

        with progress_bars() as progress:
            return load_genie(bundle, progress)
    from headrace.language_model import load

    return load(bundle, runner=runner, threads=threads)


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|B|kB|MB|GB)", text.strip())
    if match is None:
        raise UserError(f"--size {text!r} is not possible; expected a number of bytes, such as 105MB or 5.06GB")
    return int(float(match[1]) * {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[match[2]])


def _lengths(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    items = text.split(",")
    if not all(item.strip().isdecimal() and int(item) > 0 for item in items):
        raise UserError(f"{option} {text!r} is not possible; expected whole numbers above 0, separated by commas")
    return tuple(map(int, items))
