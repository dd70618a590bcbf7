"""llama.cpp as a contestant.  usage: run_llama.py MODEL.gguf THREADS [OPTION=VALUE …]

Options: flash (0, 1), cache (f16, q8_0), batch and ubatch (tokens), context.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import llama_cpp
import numpy as np
from contestant import ids_of, serve

CACHES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}


class Llama:
    """llama-cpp-python's model, its sequence rewound by its own counter."""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        kind = CACHES[options.get("cache", "f16")]
        settings: dict[str, Any] = {
            "n_ctx": int(options.get("context", 4096)),
            "n_batch": int(options.get("batch", 512)),
            "n_ubatch": int(options.get("ubatch", options.get("batch", 512))),
            "flash_attn": options.get("flash", "0") == "1",
        }
        self.model = llama_cpp.Llama(
            path, n_threads=threads, n_threads_batch=threads, verbose=False, type_k=kind, type_v=kind, **settings
        )
        self.ids = ids_of(settings["n_ctx"], self.model.n_vocab())
        self.next = 0
        name = " ".join(["llama.cpp", *(f"{key}={value}" for key, value in options.items())])
        features = llama_cpp.llama_print_system_info().decode()
        self.about = {"name": name, "isa": features, "weight_bytes": os.path.getsize(path)}  # noqa: PTH202

    def prompt(self, tokens: int) -> None:
        self.model.reset()
        self._eval(self.ids[:tokens])

    def rewind(self, tokens: int) -> None:
        if self.model.n_tokens < tokens:
            self.prompt(tokens)
        self.model.n_tokens = tokens  # `eval` drops what the cache holds beyond it

    def token(self) -> None:
        self._eval([self.next])

    def _eval(self, ids: list[int]) -> None:
        self.model.eval(ids)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.model.ctx, -1), (self.model.n_vocab(),))
        self.next = int(logits.argmax())


if __name__ == "__main__":
    path, threads, *options = sys.argv[1:]
    serve(Llama(path, int(threads), dict(option.split("=") for option in options)))
