"""llama.cpp from nothing to the first token, as a command.  usage: first_token_llama.py MODEL.gguf THREADS TOKENS"""

from __future__ import annotations

import sys

import llama_cpp
from contestant import ids_of


def main() -> None:
    """Load, read a prompt, tell the likeliest token."""
    path, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval(ids_of(tokens, model.n_vocab()))
    print(model.sample(temp=0))


if __name__ == "__main__":
    main()
