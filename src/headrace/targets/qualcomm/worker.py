"""The child that holds ONNX Runtime's QNN sessions: compiles graphs, loads compiled ones, runs both in emulation.

Run as `python -m headrace.targets.qualcomm.worker`; talks over `child.Pipe`. Only this file imports onnxruntime_qnn. It
does not know what the graphs are for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import onnxruntime_qnn

from headrace.targets.qualcomm.child import Pipe, peak_bytes, worker_pipe

__all__: list[str] = []

WARNING = 2  # ONNX Runtime's severity; errors and the reasons of rejected nodes are at this level or above


class Sessions:
    """Sessions by graph name."""

    def __init__(self) -> None:
        self.open: dict[str, Any] = {}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compile a graph; with a `context` path, into a context binary beside it."""
        options = self._options(request["name"])
        if request["context"] is not None:
            options.add_session_config_entry("ep.context_enable", "1")
            options.add_session_config_entry("ep.context_file_path", request["context"])
            options.add_session_config_entry("ep.context_embed_mode", "0")
        if request["share"]:
            options.add_session_config_entry("ep.share_ep_contexts", "1")
            if request["last"]:
                options.add_session_config_entry("ep.stop_share_ep_contexts", "1")
        answer = self._create(request, options)
        if request["context"] is not None and not request["share"]:
            _adopt(Path(request["context"]))
            del self.open[request["name"]]  # its binary is written: free the compiler's memory
        return answer

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Open a compiled graph by its EPContext file."""
        return self._create(request, self._options(request["name"]))

    def _options(self, name: str) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = WARNING
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # The name a library is registered under becomes the provider's name, and the compiled graph's prefix: the only
        # way to give a graph a name that Genie can parse.
        ort.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
        return options

    def _create(self, request: dict[str, Any], options: Any) -> dict[str, Any]:
        name = request["name"]
        device = next((d for d in ort.get_ep_devices() if d.ep_name == name), None)
        if device is None:
            raise RuntimeError("ONNX Runtime offers no device for the QNN provider")
        started = time.monotonic()
        options.add_provider_for_devices(
            [device], {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **request["options"]}
        )
        self.open[name] = ort.InferenceSession(request["onnx"], options)
        return {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}


def _serve(pipe: Pipe) -> None:
    sessions = Sessions()
    actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "prepare": sessions.prepare,
        "load": sessions.load,
    }
    while True:
        try:
            request, feeds = pipe.receive()
        except EOFError:
            return
        try:
            if request["action"] == "run":
                session = sessions.open[request["name"]]
                names = [output.name for output in session.get_outputs()]
                pipe.send({}, dict(zip(names, session.run(names, feeds), strict=True)))
            else:
                pipe.send(actions[request["action"]](request))
        except Exception as error:  # whatever the runtime raises is told to the parent, which words it
            pipe.send({"error": f"{Path(request.get('onnx', request['name'])).name}: {_one_line(error)}"})


def _adopt(path: Path) -> None:
    """Let any QNN provider open the EPContext file: it is written for the name of the provider that made it, under
    which it does not load again."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "source":
                attribute.s = b"QNN"
    onnx.save(model, path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    _serve(worker_pipe())
