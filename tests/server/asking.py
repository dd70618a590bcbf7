"""Requests to a worker, and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from headrace.server.generation import Answer, GenerationRequest, collect
from headrace.server.worker import ModelWorker

__all__ = ["GREEDY", "answers", "ask"]

GREEDY = {"temperature": 0}


def ask(text: str, **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {"prompt": [{"role": "user", "content": text}], "max_tokens": 12, "sampling": GREEDY}
    return GenerationRequest(**(values | changes))


async def answers(worker: ModelWorker, requests: Sequence[GenerationRequest]) -> list[list[Answer]]:
    generations = [await worker.submit(request) for request in requests]
    return list(await asyncio.gather(*(collect(g, r.n) for g, r in zip(generations, requests, strict=True))))
