"""The child that holds a Genie dialog: Qualcomm's libGenie through ctypes.

Run as `python -m headrace.targets.qualcomm.genie_worker` with the libraries' folder on LD_LIBRARY_PATH; talks over
`qnn_child.Pipe`. A second thread reads requests, so that a running answer can be aborted. It knows nothing about
what the dialog's configuration says.
"""

from __future__ import annotations

import ctypes as c
import json
import os
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np

from headrace.targets.qualcomm.child import Arrays, Pipe, worker_pipe

__all__: list[str] = []

WARNINGS = 2  # GENIE_LOG_LEVEL_WARN
COMPLETE, REWIND = 0, 5  # GenieDialog_SentenceCode_t
ABORT = 1  # GenieDialog_Action_t
CALLBACK = b"headrace"

_TextCallback = c.CFUNCTYPE(None, c.c_char_p, c.c_int, c.c_void_p)
_TokenCallback = c.CFUNCTYPE(None, c.POINTER(c.c_uint32), c.c_uint32, c.c_int, c.c_void_p)
_SamplerCallback = c.CFUNCTYPE(None, c.c_uint32, c.c_void_p, c.c_uint32, c.POINTER(c.c_int32), c.c_void_p)
_AllocCallback = c.CFUNCTYPE(None, c.c_size_t, c.POINTER(c.c_char_p))


class GenieFailure(Exception):
    """A call of the C API gave an error."""


class Dialog:
    """One dialog, and the sampler that headrace puts into it when asked."""

    def __init__(self, pipe: Pipe, library: str, config: dict[str, Any], folder: str) -> None:
        self.pipe = pipe
        self.lock = threading.Lock()  # of the pipe: callbacks come from Genie's threads
        self.genie = c.CDLL(library)
        self.forced: list[int] = []
        self.rows: list[Any] = []
        self.want_logits = False
        os.chdir(folder)  # the paths in a configuration are relative to it, as genie-t2t-run takes them
        self.text_callback = _TextCallback(self._on_text)
        self.token_callback = _TokenCallback(self._on_tokens)
        self.sampler_callback = _SamplerCallback(self._sample)
        log, made, self.handle = c.c_void_p(), c.c_void_p(), c.c_void_p()
        self._call("GenieLog_create", None, None, WARNINGS, c.byref(log))
        self._call("GenieSampler_registerUserDataCallback", CALLBACK, self.sampler_callback, None)
        self._call("GenieDialogConfig_createFromJson", json.dumps(config).encode(), c.byref(made))
        self._call("GenieDialogConfig_bindLogger", made, log)
        self._call("GenieDialog_create", made, c.byref(self.handle))
        self._call("GenieDialogConfig_free", made)

    def _call(self, name: str, *values: Any) -> int:
        status = int(getattr(self.genie, name)(*values))
        if status < 0:
            raise GenieFailure(f"{name} gave status {status}")
        return status

    def _send(self, message: dict[str, Any], arrays: Arrays | None = None) -> None:
        with self.lock:
            self.pipe.send(message, arrays)

    # Called by Genie.

    def _on_text(self, text: bytes | None, _code: int, _user: Any) -> None:
        if text:  # bytes, since a piece may end within a character
            self._send({"event": "text"}, {"text": np.frombuffer(text, np.uint8)})

    def _on_tokens(self, tokens: Any, count: int, _code: int, _user: Any) -> None:
        if count:
            rows, self.rows = self.rows, []
            arrays = {"logits": np.stack(rows)} if rows else {}
            self._send({"event": "tokens", "tokens": [int(t) for t in tokens[:count]]}, arrays)

    def _sample(self, size: int, logits: Any, count: int, tokens: Any, _user: Any) -> None:
        """Greedy, unless tokens are forced."""
        row = np.frombuffer(c.string_at(logits, size), np.float32)
        if self.want_logits:
            self.rows.append(row)
        chosen = self.forced.pop(0) if self.forced else int(row.argmax())
        for i in range(count):
            tokens[i] = chosen

    # Called by requests.

    def query(self, request: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
        """Answer a prompt; pieces go out as they come."""
        self.want_logits = request["logits"]
        self.forced = list(request["forced"])
        self.rows = []
        self._call("GenieDialog_setMaxNumTokens", self.handle, c.c_uint32(request["max_tokens"]))
        code = REWIND if request["rewind"] else COMPLETE
        if "ids" in arrays:
            ids = np.ascontiguousarray(arrays["ids"], np.uint32)
            pointer = ids.ctypes.data_as(c.c_void_p)
            values: tuple[Any, ...] = (pointer, c.c_uint32(len(ids)), code, self.token_callback, None)
            return {"event": "end", "status": self._call("GenieDialog_tokenQuery", self.handle, *values)}
        values = (arrays["text"].tobytes(), code, self.text_callback, None)
        return {"event": "end", "status": self._call("GenieDialog_query", self.handle, *values)}

    def act(self, request: dict[str, Any], _arrays: Arrays) -> dict[str, Any]:
        """reset, save, restore, stop sequences."""
        action = request["action"]
        if action == "reset":
            self._call("GenieDialog_reset", self.handle)
        elif action in ("save", "restore"):
            self._call(f"GenieDialog_{action}", self.handle, request["path"].encode())
        elif action == "stop_sequences":
            self._call(
                "GenieDialog_setStopSequence", self.handle, json.dumps({"stop-sequence": request["stop"]}).encode()
            )
        elif action == "encode":
            return self._encode(request["text"])
        else:
            raise GenieFailure(f"unknown action {action!r}")
        return {}

    def _encode(self, text: str) -> dict[str, Any]:
        """Ids as Genie's own tokenizer gives them."""
        tokenizer, ids, count = c.c_void_p(), c.POINTER(c.c_int32)(), c.c_uint32()
        kept: list[Any] = []

        def allocate(size: int, out: Any) -> None:
            kept.append(c.create_string_buffer(size))
            out[0] = c.cast(kept[-1], c.c_char_p)

        self._call("GenieDialog_getTokenizer", self.handle, c.byref(tokenizer))
        callback = _AllocCallback(allocate)
        self._call("GenieTokenizer_encode", tokenizer, text.encode(), callback, c.byref(ids), c.byref(count))
        return {"ids": [int(i) for i in ids[: count.value]]}

    def abort(self) -> None:
        """Stop the answer that is running, from another thread."""
        self.genie.GenieDialog_signal(self.handle, ABORT)

    def free(self) -> None:
        """Give everything back: Genie crashes at exit while a dialog lives."""
        self._call("GenieDialog_free", self.handle)


def _serve(pipe: Pipe) -> None:
    request, _ = pipe.receive()
    try:
        dialog = Dialog(pipe, request["library"], request["config"], request["folder"])
    except (GenieFailure, OSError) as error:
        pipe.send({"error": str(error)})
        return
    pipe.send({})
    waiting: queue.Queue[tuple[dict[str, Any], Any] | None] = queue.Queue()

    def read() -> None:
        while True:
            try:
                message, arrays = pipe.receive()
            except EOFError:
                dialog.abort()
                waiting.put(None)
                return
            if message["action"] == "abort":
                dialog.abort()
            else:
                waiting.put((message, arrays))

    threading.Thread(target=read, daemon=True).start()
    while (item := waiting.get()) is not None:
        message, arrays = item
        try:
            answer = (dialog.query if message["action"] == "query" else dialog.act)(message, arrays)
        except (GenieFailure, OSError) as error:
            answer = {"error": str(error)}
        try:
            dialog._send(answer)
        except BrokenPipeError:
            break
    dialog.free()


if __name__ == "__main__":
    Path("/proc/self/oom_score_adj").write_text("500")  # the child goes before headrace does
    _serve(worker_pipe())
