"""Verbs that use a bundle: chat, push."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from headrace.cli.command import Argument, Option
from headrace.cli.console import note, print_answer, print_json, progress_bars, show, table
from headrace.cli.options import BundlePath, HugePages, Json, RunnerName, Threads, limit_threads, refuse_place
from headrace.errors import UserError

if TYPE_CHECKING:
    from headrace.language_model import LanguageModel
    from headrace.runtime.answer import Token
    from headrace.runtime.chat import Chat
    from headrace.runtime.grammar import Grammar

__all__ = ["chat", "push"]


def chat(
    bundle: BundlePath,
    prompt: Annotated[str | None, Option("-p", "--prompt", help="Answer this and leave.")] = None,
    raw: Annotated[bool, Option("--raw", help="Continue the text, without a turn format.")] = False,
    max_tokens: Annotated[int, Option("-n", "--max-tokens", min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float | None, Option("--temp", help="Sampling temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, Option("--top-k", help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, Option("--top-p", help="Only the likeliest tokens of this probability.")] = None,
    repeat_penalty: Annotated[float | None, Option("--repeat-penalty", help="Above 1: fewer repetitions.")] = None,
    min_p: Annotated[float | None, Option("--min-p", help="Only tokens of this share of the likeliest.")] = None,
    presence_penalty: Annotated[
        float | None, Option("--presence-penalty", help="Above 0: fewer tokens that the answer has.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, Option("--frequency-penalty", help="Above 0: fewer the more often the answer has them.")
    ] = None,
    seed: Annotated[int | None, Option("-s", "--seed", help="The same seed, the same answer.")] = None,
    greedy: Annotated[bool, Option("--greedy", help="Always the likeliest token.")] = False,
    system: Annotated[str | None, Option("--system", help="What the model is told first.")] = None,
    stop: Annotated[list[str] | None, Option("--stop", help="End the answer at this text; repeatable.")] = None,
    schema: Annotated[
        Path | None, Option("--json-schema", help="Every answer is JSON of the schema in this file.")
    ] = None,
    regex: Annotated[str | None, Option("--regex", help="Every answer matches this expression.")] = None,
    lark: Annotated[Path | None, Option("--lark", help="Every answer follows the grammar in this file.")] = None,
    session: Annotated[
        Path | None, Option("--session", help="Keep the conversation, with its cache, in this file.")
    ] = None,
    when_full: Annotated[
        str, Option("--when-full", help="stop, newest (old rounds go) or window (the middle goes).")
    ] = "newest",
    speculate: Annotated[
        str | None, Option("--speculate", help="Guess ahead: lookup (texts repeat themselves) or a draft BUNDLE.")
    ] = None,
    plain: Annotated[bool, Option("--plain", help="Show answers as they come, without Markdown.")] = False,
    runner: RunnerName = None,
    threads: Threads = None,
    huge_pages: HugePages = None,
) -> None:
    """Talk with a bundle."""
    if session is not None:
        refuse_place("--session", session)
    # A grammar looks at every piece, and a conversation has time to read the vocabulary in.
    beside = prompt is not None and schema is None and regex is None and lark is None
    how = {"runner": runner, "threads": limit_threads(threads), "huge_pages": huge_pages, "speculate": speculate}
    with _open_model(bundle, beside, **how) as model:
        options = model.sampling_options(
            temperature=0.0 if greedy else temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repeat_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        )
        for line in model.notes:
            note(line)
        saved = session if session is not None and session.exists() else None
        talk = model.chat(system, raw=raw, when_full=when_full, session=saved)
        if not raw and talk.turns.is_raw:
            note("this model has no turn format: it continues your text")

        grammar = _grammar(model, schema, regex, lark)

        def answer(text: str) -> Generator[Token]:
            yield from talk.say(text, max_tokens=max_tokens, stop=stop or (), options=options, grammar=grammar)
            if talk.dropped_tokens:
                note(f"(the context is full: {talk.dropped_tokens} tokens of the conversation were left out)")

        try:
            if prompt is not None:
                print_answer(answer(prompt))
            elif sys.stdin.isatty():
                _converse(talk, answer, plain)
            elif piped := sys.stdin.read().rstrip("\r\n"):  # as a shell takes them off: a model answers otherwise
                print_answer(answer(piped))
            else:
                raise UserError("stdin is empty; expected a prompt there, a terminal, or -p PROMPT")
        finally:
            if session is not None and (talk.messages or saved):  # what was cleared must not come back
                talk.save(session)


def _converse(talk: Chat, answer: Callable[[str], Generator[Token]], plain: bool) -> None:
    from rich.console import Console

    from headrace.cli.conversation import Conversation, converse, history_file

    note("Ctrl-C stops an answer, Ctrl-D leaves, /help tells more.")
    converse(Conversation(talk, answer, Console(), markdown=not plain), history_file())


def push(
    bundle: Annotated[
        Path | None, Argument(metavar="[BUNDLE]", help="A folder made by: headrace export; none for --list.")
    ] = None,
    target: Annotated[str, Option("--target", help="Which of the bundle's chips.")] = "snapdragon-8-elite",
    dry_run: Annotated[bool, Option("--dry-run", help="Print the commands and run none.")] = False,
    chips: Annotated[bool, Option("--list", help="Name the chips that export can compile for.")] = False,
    json: Json = False,
) -> None:
    """Copy the Genie folder to a phone over adb."""
    import shlex
    from dataclasses import asdict

    from headrace.bundle.folder import open_bundle
    from headrace.errors import TargetError
    from headrace.targets.qualcomm.adb import push_commands, push_folder, run_command
    from headrace.targets.qualcomm.soc import SOCS, find_soc

    if chips:
        if json:
            print_json({"chips": [asdict(soc) for soc in SOCS]})
        else:
            rows = [(soc.name, soc.title, str(soc.model), soc.dsp_arch) for soc in SOCS]
            table(rows, ("--target", "chip", "soc_model", "Hexagon"))
        return
    if bundle is None:
        raise UserError("push needs a bundle, or --list")
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
        show(shlex.join(command))


def _grammar(model: LanguageModel, schema: Path | None, regex: str | None, lark: Path | None) -> Grammar | None:
    from headrace.files import read_text

    chosen = [
        (kind, source if isinstance(source, str) else read_text(source))
        for kind, source in (("json_schema", schema), ("regex", regex), ("lark", lark))
        if source is not None
    ]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(kind for kind, _ in chosen)} were both given; expected one of them")
    return model.grammar(*chosen[0]) if chosen else None


def _open_model(bundle: Path, beside: bool, **how: Any) -> LanguageModel:
    """The bundle's model, loaded as `load` is told; `beside`: another process reads the vocabulary meanwhile."""
    if "numpy" not in sys.modules:  # nor any threads
        # Its linear algebra starts threads that look for work for a while, and so takes a processor from the engine's.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # It tidies up its own documentation while it is imported, a twentieth of a first answer's time: not here.
        sys.modules["numpy._core._add_newdocs"] = ModuleType("numpy._core._add_newdocs")
        if beside:
            from headrace.text.tokenizer_process import Reading

            how["read_tokenizer"] = Reading(bundle).done
    from headrace.language_model import load

    with progress_bars() as progress:
        return load(bundle, progress=progress, **how)
