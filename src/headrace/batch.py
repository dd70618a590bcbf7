"""Answers to a file of prompts: many at once, written in the order of the prompts, resumable.

    {"prompt": "…"} or {"messages": […]} a line  ─►  {"index": 0, "text": "…", "finish": "stop", "usage": {…}} a line

Lines are added as their turn comes and synced; a run that was killed goes on behind the last whole line. Knows no
terminal and no server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from headrace.cluster import map_over
from headrace.errors import HeadraceError, UserError, reason
from headrace.files import try_lock
from headrace.language_model import LanguageModel, load
from headrace.progress import Progress, silent
from headrace.runtime.answer import Answer, Limits
from headrace.runtime.request import Request
from headrace.runtime.sampling import SamplingOptions
from headrace.text.turns import Message, message_text

__all__ = ["answer_file", "answer_file_on", "answers_kept", "read_prompts"]

Prompts: TypeAlias = Sequence[str | list[dict[str, Any]]]
Row: TypeAlias = dict[str, Any]

_WHOLE = 1 << 62  # room for any prompt: what does not fit is an error of its line
_SHARD = 64  # prompts that one node answers together: enough for its slots, few enough that a lost node costs little
_SYNCED = 16  # lines between two syncs; a crash of the machine loses no more


@dataclass
class _Line:
    """A prompt on its way."""

    index: int
    request: Request | None
    text: str = ""
    error: str | None = None
    usage: dict[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """What is written of it."""
        if self.error is not None or self.request is None:
            return {"index": self.index, "error": self.error}
        answer = self.request.answer
        # What the cache held or a guess saved depends on what ran before: it is no part of the answer.
        usage = {"prompt_tokens": answer.usage.prompt_tokens, "tokens": answer.usage.tokens}
        return {"index": self.index, "text": self.text, "finish": answer.finish, "usage": usage}


def answer_file(
    model: LanguageModel,
    prompts: Path,
    out: Path,
    *,
    max_tokens: int,
    options: SamplingOptions,
    stop: Sequence[str] = (),
    progress: Progress = silent,
) -> int:
    """Answer every line of a file; what `out` already holds is kept.

    A prompt that cannot be answered (too long, a role that does not exist) gets a line with its `error`; the others go
    on. With a seed, the answer of a line depends on the seed and its place alone, not on what runs beside it.

    Args:
        model: its engine's slots are how many run at once.
        prompts: JSON lines.
        out: grows by a line a prompt.
        max_tokens: most tokens of an answer.
        options: how tokens are chosen.
        stop: strings that end an answer.
        progress: told how far it is.

    Returns:
        Lines that could not be answered, of those written now.

    Raises:
        UserError: a file cannot be read, a line of the prompts is none, or `out` is the answer to something else.
    """

    def rows(lines: Prompts, first: int) -> Iterator[Row]:
        return _answers(model, lines, first, max_tokens, options, stop)

    return _write(prompts, out, rows, progress)


def answer_file_on(
    address: str,
    bundle: Path,
    prompts: Path,
    out: Path,
    *,
    max_tokens: int,
    sampling: Mapping[str, Any],
    stop: Sequence[str] = (),
    slots: int,
    threads: int | None = None,
    progress: Progress = silent,
    **opening: Any,
) -> int:
    """`answer_file` on a Ray cluster whose nodes see the bundle: the same file, line for line.

    Args:
        address: of the cluster.
        bundle: the folder.
        prompts, out, max_tokens, stop, progress: as for `answer_file`.
        sampling: fields of SamplingOptions that differ from the model's own.
        slots: answers that run at once in each process.
        threads: of each process, which takes as many of its node's processors; 1 by default.
        opening: what else `headrace.load` takes: runner, huge_pages.

    Raises:
        UserError: as for `answer_file`.
        TargetError: there is no cluster, or it lost a piece of the work too often.
    """
    cpus = threads or 1
    work = partial(
        _answering, bundle, opening | {"threads": cpus, "slots": slots}, max_tokens, dict(sampling), tuple(stop)
    )

    def rows(lines: Prompts, first: int) -> Iterator[Row]:
        shards = [(at, lines[at : at + _SHARD]) for at in range(first, len(lines), _SHARD)]
        for answered in map_over(address, work, shards, cpus=cpus):
            yield from answered

    return _write(prompts, out, rows, progress)


@contextmanager
def _answering(
    bundle: Path,
    opening: Mapping[str, Any],
    max_tokens: int,
    sampling: Mapping[str, Any],
    stop: Sequence[str],
) -> Iterator[Callable[[tuple[int, Prompts]], list[Row]]]:
    """Work for a cluster: (place of the first, prompts) → their rows."""
    with load(bundle, **opening) as model:
        options = model.sampling_options(**sampling)

        def answer(shard: tuple[int, Prompts]) -> list[Row]:
            place, lines = shard
            return list(_answers(model, lines, 0, max_tokens, options, stop, place))

        yield answer


def _write(prompts: Path, out: Path, rows: Callable[[Prompts, int], Iterator[Row]], progress: Progress) -> int:
    """Add to a file what it lacks: of `rows`, given all prompts and how many have their row. How many rows in it are
    errors."""
    lines = read_prompts(prompts)
    with out.open("ab") as file:
        if not try_lock(file):
            raise UserError(f"another run writes {out}; wait until it has ended, or choose another --output")
        kept, whole = _whole_lines(out, len(lines))
        file.truncate(whole)  # half a line at the end, of a run that was killed
        failed = sum("error" in row for row in kept)
        for row in rows(lines, len(kept)):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            failed += "error" in row
            if row["index"] % _SYNCED == 0:
                file.flush()
                os.fsync(file.fileno())
            progress("answering", row["index"] + 1, len(lines))
        file.flush()
        os.fsync(file.fileno())
    return failed


def read_prompts(path: Path) -> Prompts:
    """The prompts of a file of JSON lines: texts, or conversations.

    Raises:
        UserError: the file cannot be read, or a line is something else; it is named.
    """
    try:
        rows = path.read_text(encoding="utf-8").split("\n")  # texts may hold what else Unicode calls the end of a line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); expected a file of JSON lines") from None
    if not rows[-1]:
        rows.pop()
    prompts: list[str | list[dict[str, Any]]] = []
    for number, row in enumerate(rows, 1):
        try:
            raw = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}, is not JSON: {error}") from None
        prompt = raw.get("prompt", raw.get("messages")) if isinstance(raw, dict) else None
        if isinstance(prompt, str):
            prompts.append(prompt)
            continue
        if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt):
            try:
                prompts.append([{**m, "content": message_text(m["content"])} for m in prompt])
            except UserError as error:
                raise UserError(f"{path}, line {number}: content {error}") from None
            continue
        raise UserError(f'{path}, line {number}, is {row[:60]!r}; expected {{"prompt": TEXT}} or {{"messages": […]}}')
    return prompts


def answers_kept(out: Path, total: int) -> int:
    """How many of so many answers a file already holds. They stay, whatever is asked now.

    Raises:
        UserError: it holds something else.
    """
    return len(_whole_lines(out, total)[0])


def _whole_lines(out: Path, total: int) -> tuple[list[Row], int]:
    """The rows that a file already holds, and in how many bytes: half of the next one may follow."""
    if not out.exists():
        return [], 0
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    try:
        rows = [json.loads(row) for row in data[:whole].splitlines()]
        ours = [row["index"] for row in rows] == list(range(len(rows)))
    except (ValueError, KeyError, TypeError):
        rows, ours = [], False
    half, begins = data[whole:], b'{"index": %d, ' % len(rows)
    ours &= half[: len(begins)] == begins[: len(half)]
    if not ours or len(rows) + bool(half) > total:
        raise UserError(f"{out} holds something else than the answers to these prompts; choose another --output")
    return rows, whole


def _answers(
    model: LanguageModel,
    prompts: Prompts,
    first: int,
    max_tokens: int,
    options: SamplingOptions,
    stop: Sequence[str],
    place: int = 0,
) -> Iterator[Row]:
    """Rows of the prompts from `first` on, in order; twice as many as there are slots are under way, so that none
    stands idle. `place` is that of the first prompt in the file."""
    engine = model.engine
    waiting: list[_Line] = []
    running: dict[Request, _Line] = {}
    following = first
    while following < len(prompts) or waiting:
        while following < len(prompts) and len(waiting) < 2 * engine.runner.slots:
            line = _begin(model, place + following, prompts[following], max_tokens, options, stop)
            waiting.append(line)
            if line.request is not None:
                running[line.request] = line
            following += 1
        while waiting and (waiting[0].request is None or waiting[0].request not in running):
            yield waiting.pop(0).row()
        if not running:
            continue
        for request, token in engine.step():
            running[request].text += token.text
        for request in [r for r in running if r.done]:
            line = running.pop(request)
            if request.error is not None:
                line.error = str(request.error)


def _begin(
    model: LanguageModel,
    index: int,
    prompt: str | list[dict[str, Any]],
    max_tokens: int,
    options: SamplingOptions,
    stop: Sequence[str],
) -> _Line:
    try:
        if isinstance(prompt, str):
            ids, stop_ids, continues = model.encode_raw(prompt), frozenset(model.tokenizer.eos_ids), True
        else:
            talk = [Message(str(m.get("role")), m["content"]) for m in prompt]
            turns = model.turns
            ids, stop_ids, continues = turns.render(talk, _WHOLE), frozenset(turns.stop_ids), turns.goes_on(talk)
        own = options if options.seed is None else replace(options, seed=options.seed + index)
        answer = Answer(model.tokenizer, Limits(max_tokens, stop_ids, stop), continues=continues)
        return _Line(index, model.engine.submit(ids, own, answer))
    except HeadraceError as error:
        return _Line(index, None, error=str(error))
