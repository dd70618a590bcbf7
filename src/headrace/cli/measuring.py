"""Verbs that measure a bundle, and tell: verify, bench, evaluate, card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from headrace.cli.command import Argument, Option
from headrace.cli.console import human_bytes, note, print_json, progress_bars, show, table
from headrace.cli.options import (
    Adapters,
    BundlePath,
    HugePages,
    Json,
    RayAddress,
    RunnerName,
    Save,
    Threads,
    limit_threads,
)
from headrace.errors import UserError, VerificationFailed, reason
from headrace.exporter.options import is_whole, read_lengths

__all__ = ["bench", "card", "evaluate", "verify"]


def verify(
    bundle: BundlePath,
    checkpoint: Annotated[Path | None, Option("--checkpoint", help="Also compare with what it was made of.")] = None,
    lora: Adapters = None,
    files_only: Annotated[bool, Option("--files-only", help="Only hash the files.")] = False,
    through: Annotated[str, Option("--through", help="The last link: host, device, emulation or genie.")] = "host",
    layers: Annotated[bool, Option("--layers", help="Also each layer of the device graphs.")] = False,
    genie: Annotated[
        bool, Option("--genie", help="Only the configuration of a Genie folder, anybody's, against its model's.")
    ] = False,
    json: Json = False,
) -> None:
    """Check every link of the chain; exit 1 when one is broken."""
    from headrace.measure.genie_folder import verify_genie_folder
    from headrace.measure.parity import verify_bundle

    if genie:
        links = verify_genie_folder(bundle, checkpoint)
    else:
        with progress_bars() as progress:
            links = verify_bundle(
                bundle, checkpoint, adapters=lora or (), files_only=files_only, through=through, layers=layers,
                progress=progress,
            )  # fmt: skip
    if json:
        print_json({"ok": all(link.ok for link in links), "links": [link.to_dict() for link in links]})
    else:
        rows = [("ok" if link.ok else "FAILED", link.name, link.found, link.limit) for link in links]
        table(rows, ("", "link", "found", "limit"))
    broken = [link for link in links if not link.ok]
    if broken:
        raise VerificationFailed(f"{broken[0].name}: {broken[0].found}; expected {broken[0].limit}")


def bench(
    bundle: Annotated[
        Path | None, Argument(metavar="[BUNDLE]", help="A folder made by: headrace export; none for --compare.")
    ] = None,
    prompts: Annotated[
        str, Option("-p", "--prompts", help="Prompt lengths, separated by commas; 0 for none.")
    ] = "128,512,1024",
    tokens: Annotated[int, Option("-n", "--tokens", min=0, help="Tokens to decode; 0 for none.")] = 128,
    depth: Annotated[
        str, Option("-d", "--depth", help="Tokens in the cache before decoding starts, separated by commas.")
    ] = "128",
    repeats: Annotated[int, Option("-r", "--repeats", min=1, help="Repetitions; the median is told.")] = 5,
    runner: RunnerName = None,
    threads: Threads = None,
    huge_pages: HugePages = None,
    output: Annotated[
        str | None, Option("-o", "--output", help="json, or llama-bench's md or csv, instead of a table.")
    ] = None,
    speculate: Annotated[
        str | None, Option("--speculate", help="Also with guesses ahead: lookup or a draft BUNDLE.")
    ] = None,
    compare: Annotated[
        list[Path] | None, Option("--compare", count=2, help="Two kept measurements: what changed beyond noise.")
    ] = None,
    plots: Annotated[
        Path | None, Option("--plots", help="Folder for pictures, PNG and SVG (needs headrace[plots]).")
    ] = None,
    save: Save = False,
    json: Json = False,
) -> None:
    """Measure loading, time to first token, prompt and decode speed, memory."""
    from headrace.bundle.folder import open_bundle
    from headrace.measure.bench import bench_bundle
    from headrace.measure.bench_tables import bench_csv, bench_markdown
    from headrace.measure.record import records_folder, save_record

    if output not in (None, "json", "md", "csv"):
        raise UserError(f"-o {output!r} is unknown; expected json, md or csv")
    if compare is not None:
        _compare(*compare, as_json=json or output == "json")
        return
    if bundle is None:
        raise UserError("bench needs a bundle, or --compare A.json B.json")
    if json and output in ("md", "csv"):
        raise UserError(f"--json and --output {output} are two forms of one result; choose one")
    if plots is not None:
        from headrace.measure.plots import need_matplotlib

        need_matplotlib()  # told before the measurement, as what follows
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--plots {plots} cannot be made ({reason(error)}); choose another folder") from None
    if save:
        open_bundle(bundle)
        records_folder(bundle)
    threads = limit_threads(threads)
    with progress_bars() as progress:
        report = bench_bundle(
            bundle,
            prompts=() if prompts == "0" else read_lengths("--prompts", prompts),
            tokens=tokens,
            depths=[int(d) for d in depth.split(",")] if all(map(is_whole, depth.split(","))) else _no_depths(depth),
            repeats=repeats,
            runner=runner,
            threads=threads,
            huge_pages=huge_pages,
            speculate=speculate,
            progress=progress,
        )
    if save:
        save_record(bundle, f"bench-{report['runner']}", report)
    if plots is not None:
        from headrace.measure.plots import plot_bench

        for path in plot_bench(report, plots):
            note(f"{path}")
    if output in ("md", "csv"):
        show(bench_markdown(report) if output == "md" else bench_csv(report))
    elif json or output == "json":
        print_json(report)
    else:
        _show_bench(report)


def _no_depths(depth: str) -> list[int]:
    raise UserError(f"--depth {depth!r} is not possible; expected whole numbers, separated by commas: 0,1024,3968")


def _show_bench(report: dict[str, Any]) -> None:
    machine, settings = report["machine"], report["settings"]
    show(
        f"{report['bundle']['name']} on {report['runner']}, {settings['threads']} threads of {machine['processor']}; "
        f"medians of {settings['repeats']}"
    )
    rows = [
        (
            str(p["tokens"]),
            f"{p['seconds'] * 1e3:.0f} ms",
            f"{p['fastest'] * 1e3:.0f}–{p['slowest'] * 1e3:.0f}",
            f"{p['formula_seconds'] * 1e3:.0f} ms",
            f"{p['useful_tok_s']:.0f}",
            f"{p['padded_tok_s']:.0f}",
        )
        for p in report["prompts"]
    ]
    if rows:
        table(rows, ("prompt", "first token", "fastest–slowest", "steps × one step", "tok/s", "with padding"))
    decode = [
        (
            str(d["depth"]),
            f"{d['tok_s']:.1f}",
            f"{d['tokens'] / d['slowest']:.1f}–{d['tokens'] / d['fastest']:.1f}",
            " ".join(f"{d['gap_ms'][p]:.2f}" for p in ("p50", "p90", "p99")),
        )
        for d in report["decode"]
    ]
    if decode:
        table(decode, ("after", "tok/s", "slowest–fastest", "ms between tokens, p50 p90 p99"))
    memory, load = report["memory"], report["load"]
    if guessed := report.get("speculation"):
        show(
            f"guessing ahead by {guessed['how']}: {guessed['tok_s']:.1f} instead of {guessed['plain_tok_s']:.1f} "
            f"tok/s, {guessed['acceptance']:.0%} of {guessed['drafted_tokens']} guesses came, "
            + (
                "the same answers"
                if guessed["same"]
                else f"answers differ after {guessed['equal_tokens']} of {guessed['tokens']} tokens: this runner "
                "rounds one token alone otherwise than several together, and near ties fall either way"
            )
        )
    table(
        [
            ("load", f"{load['seconds'] * 1e3:.0f} ms"),
            ("a new process, files not cached, to its first token", f"{load['cold_start_seconds'] * 1e3:.0f} ms"),
            ("weights", human_bytes(memory["weight_bytes"])),
            ("KV cache", human_bytes(memory["kv_bytes"])),
            ("peak memory", human_bytes(memory["peak_rss_bytes"])),
        ]
    )


def _compare(before: Path, after: Path, *, as_json: bool) -> None:
    from headrace.measure.compare import compare_records
    from headrace.measure.record import read_record

    differences, changes = compare_records(read_record(before), read_record(after))
    if as_json:
        print_json({"differences": differences, "changes": [change.to_dict() for change in changes]})
        return
    for line in differences:
        show(f"not the same: {line}")
    rows = [
        (
            c.what,
            f"{c.before * 1e3:.4g} ms",
            f"{c.after * 1e3:.4g} ms",
            f"{c.ratio:.3f}",
            "" if c.p is None else f"{c.p:.2g}",
            ("slower" if c.ratio > 1 else "faster")
            if c.real
            else "too few repetitions"
            if c.p is None
            else "within noise",
        )
        for c in changes
    ]
    table(rows, ("", "before", "after", "ratio", "p", ""))


def evaluate(
    bundle: BundlePath,
    text: Annotated[list[Path] | None, Option("--text", help="A text file; repeatable, each told apart.")] = None,
    tasks: Annotated[
        str | None,
        Option("--tasks", help="Of texts ppl, kl, chat; of questions mmlu, ceval, cmmlu. Default: ppl, and kl."),
    ] = None,
    checkpoint: Annotated[
        Path | None, Option("--checkpoint", help="What it was made of; kl and flips compare with it.")
    ] = None,
    lora: Adapters = None,
    data: Annotated[
        Path | None, Option("--data", help="Questions in their published folder layout, or a folder of these.")
    ] = None,
    shots: Annotated[int, Option("--shots", min=0, help="Worked examples before a question.")] = 5,
    windows: Annotated[int, Option("--windows", min=1, help="Most windows of a text.")] = 8,
    length: Annotated[int, Option("--length", min=4, help="Tokens of a window; its second half is scored.")] = 512,
    simulate: Annotated[
        str | None, Option("--simulate", help="The bundle on a device's grids: a16, kv8 or both.")
    ] = None,
    runner: Annotated[str | None, Option("--runner", help="Who computes; host by default.")] = None,
    threads: Threads = None,
    ray: RayAddress = None,
    save: Save = False,
    json: Json = False,
) -> None:
    """Measure perplexity and divergence from the checkpoint on text, and right answers to questions."""
    from headrace.bundle.folder import open_bundle
    from headrace.measure.bundle_score import evaluate_on
    from headrace.measure.item_sets import SETS
    from headrace.measure.questions import ask_bundle
    from headrace.measure.record import make_record, records_folder, save_record
    from headrace.measure.text_score import TASKS, parse_tasks

    threads = threads if ray else limit_threads(threads)
    wanted = () if tasks is None else parse_tasks(tasks, (*TASKS, *SETS))
    on_text = [task for task in wanted if task in TASKS]
    on_questions = [task for task in wanted if task in SETS]
    if (on_text or not on_questions) and not text:
        raise UserError(f"{on_text[0] if on_text else 'perplexity'} needs a text; expected --text FILE")
    if data and not on_questions:
        raise UserError("--data holds questions, of which --tasks names none; expected mmlu, ceval or cmmlu there")
    if on_questions and not on_text and (text or simulate):
        raise UserError(f"{'--text' if text else '--simulate'} is for texts, of which --tasks names no task; add ppl")
    if simulate and runner:
        raise UserError("--simulate computes by itself; expected no --runner beside it")
    runner = runner or "host"
    if save:
        open_bundle(bundle)
        records_folder(bundle)  # what cannot be kept is told before it is measured
    report: dict[str, Any] = {}
    with progress_bars() as progress:
        if on_questions:
            report["choices"] = ask_bundle(
                bundle, on_questions, data, checkpoint=checkpoint, adapters=lora or (), shots=shots, runner=runner,
                threads=threads, ray=ray, progress=progress,
            )  # fmt: skip
        if on_text or not on_questions:
            scores = evaluate_on(
                ray,
                bundle,
                text or [],
                tasks=",".join(on_text) or None,
                checkpoint=checkpoint,
                adapters=lora or (),
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


def card(
    bundles: Annotated[list[Path], Argument(metavar="BUNDLE…", help="One bundle; with --all several.")],
    check: Annotated[bool, Option("--check", help="Hold the card against bundle, measurements, plan.")] = False,
    file: Annotated[Path | None, Option("--card", help="With --check: another card, such as a published one.")] = None,
    all_: Annotated[bool, Option("--all", help="A table of bundles side by side, on stdout.")] = False,
    title: Annotated[str | None, Option("--title", help="The model's name.")] = None,
    base_model: Annotated[str | None, Option("--base-model", help="ORG/REPO of the original.")] = None,
    license: Annotated[str | None, Option("--license", help="The original's, as the hub spells it.")] = None,
    license_name: Annotated[str | None, Option("--license-name", help="Of a license called other.")] = None,
    license_link: Annotated[str | None, Option("--license-link", help="Where its text is.")] = None,
    languages: Annotated[str | None, Option("--languages", help="Codes, such as zh,en.")] = None,
    pictures: Annotated[bool, Option("--plots/--no-plots", help="Draw kept measurements.")] = True,
    json: Json = False,
) -> None:
    """Write the model card of a bundle, README.md, or check it; exit 1 when it says what its bundle does not."""
    from headrace.measure.card import card_problems, compare_bundles, write_card

    if all_:
        if json:
            raise UserError("--all is a table; expected no --json beside it")
        show(compare_bundles(bundles))
        return
    if len(bundles) != 1:
        raise UserError(f"card takes one bundle, not {len(bundles)}; expected --all for a table of several")
    (bundle,) = bundles
    if check:
        problems = card_problems(bundle, file)
        if json:
            print_json({"ok": not problems, "problems": problems})
        for problem in () if json else problems:
            show(problem)
        if problems:
            raise VerificationFailed(f"{len(problems)} claims of {file or bundle / 'README.md'} do not hold")
        if not json:
            show("every number is as its source says")
        return
    given = {
        "title": title,
        "base_model": base_model,
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "languages": languages,
    }
    path = write_card(bundle, {name: value for name, value in given.items() if value}, pictures=pictures)
    if json:
        print_json({"card": str(path)})
    else:
        show(path)
