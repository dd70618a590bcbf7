"""Talks to Qualcomm's own Genie on this computer, over binaries in HTP emulation.

The dialog lives in a child process (genie_worker.py). This file does not know how configurations or binaries are
made; check a folder with genie_check.py first.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.errors import TargetError
from headrace.targets.device_loop import prompt_steps
from headrace.targets.qualcomm.child import Child
from headrace.targets.qualcomm.genie_worker import CALLBACK
from headrace.targets.qualcomm.toolchain import find_toolchain

__all__ = ["End", "GenieRunner", "GenieToken"]

OPEN_SECONDS = 600.0
STEP_SECONDS = 3600.0  # one token, or a whole prompt before the first: 32 steps of a 7B model are long in emulation
ACTION_SECONDS = 600.0
EVERY_TOKEN = (1 << 31) - 1

Frame: TypeAlias = tuple[dict[str, Any], dict[str, NDArray[Any]]]


class End(Enum):
    """Why an answer ended: Genie's status."""

    DONE = 0  # eos, a stop sequence, or as many tokens as were asked for
    ABORTED = 1
    CONTEXT_FULL = 4


@dataclass(frozen=True)
class GenieToken:
    """A generated token, and the logits it was chosen from: float32 (V,), or None when not asked for."""

    id: int
    logits: NDArray[np.float32] | None


class GenieRunner:
    """One Genie dialog. When its process is gone (it died, or an interrupt cut its talk in two), the next use starts
    another, with an empty dialog.

    Args:
        config: content of genie_config.json.
        folder: what the paths in it are relative to.
        lengths, contexts: every S and C of the binaries' graphs.
        own_sampler: let headrace choose tokens in Genie's sampler callback (greedy, or forced), which is what gives
            logits; otherwise Genie samples by the configuration.

    Raises:
        TargetError: Genie refused the configuration or a binary, or died; or the toolchain is not installed.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        *,
        lengths: Sequence[int],
        contexts: Sequence[int],
        own_sampler: bool = False,
    ) -> None:
        self.lengths, self.contexts = tuple(lengths), tuple(contexts)
        self.own_sampler = own_sampler
        self.end = End.DONE
        dialog = copy.deepcopy(config["dialog"])
        # On a phone threads that wait may spin; here they would take the cores that the emulator computes on.
        dialog["engine"]["n-threads"] = 1
        dialog["engine"]["backend"]["QnnHtp"]["poll"] = False
        if own_sampler:
            dialog["sampler"] = {"version": 1, "type": "custom", "callback-name": CALLBACK.decode()}
        self._request = {
            "library": str(find_toolchain().library("Genie")),
            "config": {"dialog": dialog},
            "folder": str(folder),
        }
        context = dialog["context"]
        self._bos = [int(context["bos-token"])] if int(context["bos-token"]) >= 0 else []
        eos = context["eos-token"]
        self._eos = [int(token) for token in eos] if isinstance(eos, list) else [int(eos)]
        self._past = 0  # an upper bound of the tokens in the cache, so that no query runs into the context
        self._kept: list[int] | None = []  # the tokens in the cache; None when they are not known
        self._unfed: list[int] = []  # what the last token may be that Genie chose, but did not take in
        self._stops: list[str] = []
        self._running = False
        self._child = self._open()

    def _open(self) -> Child:
        child = Child("headrace.targets.qualcomm.genie_worker", "Genie")
        try:
            child.call(self._request, seconds=OPEN_SECONDS)
            if self._stops:
                child.call({"action": "stop_sequences", "stop": self._stops}, seconds=ACTION_SECONDS)
        except TargetError:
            child.close()
            raise
        return child

    def _revive(self) -> None:
        if not self._child.alive:
            self._child.close()
            self._child = self._open()
            self._past, self._kept, self._running = 0, [], False
        if self._running:
            raise TargetError("this Genie dialog is still answering; let the answer end, or abort it")

    def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._revive()
        return self._child.call(request, seconds=ACTION_SECONDS)[0]

    def __enter__(self) -> GenieRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def query_tokens(
        self,
        ids: Sequence[int],
        max_tokens: int | None = None,
        *,
        logits: bool = False,
        forced: Sequence[int] = (),
        rewind: bool = False,
    ) -> Generator[GenieToken]:
        """Continue the dialog with these ids; `end` says afterwards why it ended. An eos is not given out.

        Args:
            ids: the prompt; Genie puts the bos before it if the configuration has one.
            max_tokens: most tokens to generate; None: until eos or the end of the context.
            logits: give the logits of every token.
            forced: the tokens to choose, before greedy ones.
            rewind: `ids` are the whole conversation; what is in the cache already is kept, the rest forgotten. Without
                it Genie puts an eos before a second turn (and a bos, if it has one).

        Raises:
            ContextFull: the prompt does not fit.
            TargetError: Genie failed; or logits or forced tokens were asked for without `own_sampler`.
        """
        if (logits or forced) and not self.own_sampler:
            raise TargetError("Genie gives logits only to headrace's sampler; expected GenieRunner(own_sampler=True)")
        self._revive()
        if rewind and not (rewind := self._can_rewind([*self._bos, *ids])):
            self.reset()
        known = not self._past or rewind
        self._admit(len(ids), rewind)
        given = [*self._bos, *ids] if rewind else list(ids)  # a rewound query gets no bos from Genie
        kept, said = [*self._bos, *ids], 0
        self._kept = None  # until the answer has ended
        arrays = {"ids": np.asarray(given, np.uint32)}
        with closing(self._query(arrays, max_tokens, logits=logits, forced=forced, rewind=rewind)) as frames:
            for message, received in frames:
                rows = received.get("logits")
                for i, token in enumerate(message["tokens"]):
                    said += 1
                    kept.append(token)
                    yield GenieToken(token, None if rows is None else rows[i])
        if known and self.end is End.DONE:
            cut = said == max_tokens
            self._kept, self._unfed = (kept[:-1], kept[-1:]) if cut else (kept, self._eos)

    def _can_rewind(self, ids: Sequence[int]) -> bool:
        """Whether Genie rewinds to these ids rightly (measured): it takes the token that it chose last for taken in,
        and neither goes back to the start nor answers without a new token."""
        if self._kept is None:
            return False
        pairs = zip(self._kept, ids)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._kept), len(ids)))
        if not 0 < common < len(ids):
            return False
        return common < len(self._kept) or ids[common] not in self._unfed

    def query(self, text: str, max_tokens: int | None = None) -> Generator[str]:
        """Continue the dialog with a text; gives pieces of the answer, whole characters only.

        Raises:
            ContextFull: the prompt does not fit.
            TargetError: Genie failed.
        """
        self._admit(len(self.encode(text)), rewind=False)
        self._kept = None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        arrays = {"text": np.frombuffer(text.encode(), np.uint8)}
        with closing(self._query(arrays, max_tokens, logits=False, forced=(), rewind=False)) as frames:
            for _, received in frames:
                if piece := decoder.decode(received["text"].tobytes()):
                    yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def _admit(self, count: int, rewind: bool) -> None:
        """Refuse what Genie would run into the end of the context with: with several contexts it crashes later."""
        before = 0 if rewind else self._past
        # A second turn is preceded by the last token and an eos; every turn by the bos if there is one.
        extra = len(self._bos) + (2 if before else 0)
        if count == 0:
            raise TargetError("the prompt is empty; expected at least one token")
        prompt_steps(count + extra, before, self.lengths, self.contexts)
        self._past = before + count + extra

    def _query(
        self,
        arrays: Mapping[str, NDArray[Any]],
        max_tokens: int | None,
        *,
        logits: bool,
        forced: Sequence[int],
        rewind: bool,
    ) -> Generator[Frame]:
        request = {
            "action": "query",
            "max_tokens": EVERY_TOKEN if max_tokens is None else max_tokens,
            "logits": logits,
            "forced": list(forced),
            "rewind": rewind,
        }
        child = self._child
        try:
            with child.exchange():
                child.send(request, arrays)
                self._running = True
            while self._running:
                child.wait(STEP_SECONDS)  # an interrupt here loses nothing: the answer is aborted below
                with child.exchange():
                    frame = self._frame()
                if self._running:
                    yield frame
        finally:
            if self._running and child.alive:  # the caller stopped listening
                with child.exchange():
                    self.abort()
                    while self._running:
                        self._frame()
            self._running = False

    def _frame(self) -> Frame:
        """The next frame of the running answer, counted."""
        try:
            message, received = self._child.receive(seconds=STEP_SECONDS)
        except TargetError:
            self._running = False  # Genie refused, or died: nothing more comes
            raise
        if message["event"] == "end":
            self._running = False
            self._ended(message["status"])
        else:
            self._past += len(message.get("tokens", ["a piece of text"]))
        return message, received

    def _ended(self, status: int) -> None:
        try:
            self.end = End(status)
        except ValueError:
            raise TargetError(f"Genie ended with status {status}; expected 0 (done)") from None
        if self.end is End.CONTEXT_FULL:
            self._child.close()  # Genie does not recover when it has several contexts: its next query would crash

    def encode(self, text: str) -> list[int]:
        """Ids as Genie's own tokenizer gives them."""
        return [int(token) for token in self._call({"action": "encode", "text": text})["ids"]]

    def reset(self) -> None:
        """Forget the conversation."""
        self._call({"action": "reset"})
        self._past, self._kept = 0, []

    def stop_at(self, sequences: Sequence[str]) -> None:
        """End text answers at any of these; token answers do not look at them."""
        self._call({"action": "stop_sequences", "stop": list(sequences)})
        self._stops = list(sequences)

    def save(self, folder: Path) -> None:
        """Write the conversation to a folder (Genie makes several files)."""
        folder.mkdir(parents=True, exist_ok=True)
        self._call({"action": "save", "path": str(folder.resolve())})
        (folder / "past").write_text(str(self._past), encoding="ascii")

    def restore(self, folder: Path) -> None:
        """Go on with a saved conversation.

        Raises:
            TargetError: there is none in `folder`.
        """
        try:
            past = int((folder / "past").read_text(encoding="ascii"))
        except (OSError, ValueError):
            raise TargetError(f"{folder} holds no saved Genie dialog; expected a folder that `save` wrote") from None
        self._call({"action": "restore", "path": str(folder.resolve())})
        self._past, self._kept = past, None

    def abort(self) -> None:
        """End the running answer soon; callable from another thread."""
        if self._running:
            self._child.send({"action": "abort"})

    def close(self) -> None:
        """Free the dialog and end its process."""
        if self._child.alive:
            self.abort()
        self._child.close()
