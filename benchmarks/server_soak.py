"""Many streams at one server for some minutes: every answer is whole or a clean 429, the text is what it is alone, and
memory stays flat. Prints one JSON object; exit 1 where something of that does not hold.

    python benchmarks/server_soak.py BUNDLE --streams 32 --seconds 300 [--record FILE]

FILE gets memory and latency over time, for benchmarks/pictures.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

PROMPTS = [
    "Why is the sky blue?", "Name three rivers of China.", "What is two plus two?", "Tell me about water.",
    "中国的首都是哪里？", "Write a short poem.", "What is a headrace?", "List three fruits.",
]  # fmt: skip
GROWTH = 1.1  # of resident memory, from a quarter of the time on
TOKENS = 48


async def ask(client: httpx.AsyncClient, address: str, prompt: str) -> tuple[int, str, float, float]:
    """(status, text, seconds to the first piece, seconds in all) of a streamed answer."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    started, first, text, finished = time.monotonic(), 0.0, "", False
    async with client.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return response.status_code, "", 0.0, 0.0
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                finished = True
                continue
            for choice in json.loads(data)["choices"]:
                if piece := choice["delta"].get("content"):
                    first = first or time.monotonic() - started
                    text += piece
    return (200 if finished else -1), text, first, time.monotonic() - started


async def soak(
    address: str, streams: int, seconds: float, server: psutil.Process
) -> tuple[dict[str, object], dict[str, list[tuple[float, ...]]]]:
    """Run the streams, and hold the answers against those given alone: what came of it, and the course of it."""
    limits = httpx.Limits(max_connections=streams + 4)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        alone = {prompt: (await ask(client, address, prompt))[1] for prompt in PROMPTS}
        begun = time.monotonic()
        until = begun + seconds
        answers: list[tuple[str, int, str, float, float]] = []
        memory: list[int] = []
        asked_again: list[float] = []
        course: dict[str, list[tuple[float, ...]]] = {"memory": [], "answers_over_time": []}

        async def stream(number: int) -> None:
            turn = number
            while time.monotonic() < until:
                prompt = PROMPTS[turn % len(PROMPTS)]
                turn += 1
                try:
                    status, text, first, took = await ask(client, address, prompt)
                except httpx.RemoteProtocolError as error:
                    # A connection that rested was closed as it was used again: a client asks again (RFC 9110, 9.2.2).
                    if "without sending a response" not in str(error):
                        raise
                    asked_again.append(time.monotonic() - begun)
                    continue
                answers.append((prompt, status, text, first, took))
                if status == 200:
                    course["answers_over_time"].append((time.monotonic() - begun, first, took))
                if status == 429:
                    await asyncio.sleep(1)

        async def watch() -> None:
            while time.monotonic() < until:
                memory.append(server.memory_info().rss)
                course["memory"].append((time.monotonic() - begun, memory[-1]))
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *(stream(number) for number in range(streams)))
    whole = [a for a in answers if a[1] == 200]
    settled = memory[len(memory) // 4 :]
    report: dict[str, object] = {
        "streams": streams,
        "seconds": seconds,
        "answers": len(whole),
        "refused_429": sum(a[1] == 429 for a in answers),
        "asked_again": len(asked_again),
        "broken": sum(a[1] not in (200, 429) for a in answers),
        "other_than_alone": sum(text != alone[prompt] for prompt, _, text, _, _ in whole),
        "first_piece_s": {
            "median": round(statistics.median(a[3] for a in whole), 3),
            "max": round(max(a[3] for a in whole), 3),
        },
        "answers_per_s": round(len(whole) / seconds, 2),
        "rss_mb": {"first": settled[0] // 10**6, "last": settled[-1] // 10**6},
        "memory_flat": settled[-1] <= GROWTH * settled[0],
    }
    return report, course


def main() -> int:
    """Start a server, soak it, end it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--slots", default="8")
    parser.add_argument("--threads", default=None, help="of the engine; all processors when not given")
    parser.add_argument("--runner", default=None)
    parser.add_argument("--record", type=Path, default=None)
    given = parser.parse_args()
    command = [sys.executable, "-m", "headrace", "serve", given.bundle, "--port", "0", "--slots", given.slots]
    command += ["--threads", given.threads] if given.threads else []
    command += ["--runner", given.runner] if given.runner else []
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if line.startswith("listening on "):
                break
        report, course = asyncio.run(soak(line.split()[2], given.streams, given.seconds, psutil.Process(server.pid)))
    finally:
        server.terminate()
        server.wait(60)
    if given.record is not None:
        given.record.write_text(json.dumps(report | course), encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 0 if report["memory_flat"] and not report["broken"] and not report["other_than_alone"] else 1


if __name__ == "__main__":
    sys.exit(main())
