"""Many streams at one server for some minutes: every answer is whole or a clean 429, the text is what it is alone, and
memory stays flat. Prints one JSON object; exit 1 where something of that does not hold.

    python benchmarks/server_soak.py BUNDLE --streams 32 --seconds 300 [--record FILE]

Waiting is told of each third of the time, with what other programs took meanwhile of the processors that this one
may use, and of the seconds of each third in which they took little. FILE gets memory and latency over time, for
benchmarks/pictures.py.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

PROMPTS = [
    "Why is the sky blue?", "Name three rivers of China.", "What is two plus two?", "Tell me about water.",
    "中国的首都是哪里？", "Write a short poem.", "What is a headrace?", "List three fruits.",
]  # fmt: skip
GROWTH = 1.1  # of resident memory, from a quarter of the time on
TOKENS = 48
LITTLE = 0.1  # of a processor


async def ask(client: httpx.AsyncClient, address: str, prompt: str) -> tuple[int, str, float, list[float]]:
    """(status, text, the moment of asking, the moments of the pieces and of the end) of a streamed answer."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    started, moments, text, finished = time.monotonic(), list[float](), "", False
    async with client.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return response.status_code, "", started, []
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                finished = True
                continue
            for choice in json.loads(data)["choices"]:
                if piece := choice["delta"].get("content"):
                    moments.append(time.monotonic())
                    text += piece
    return (200 if finished and moments else -1), text, started, [*moments, time.monotonic()]


def busy_seconds(ours: Sequence[psutil.Process]) -> float:
    """Seconds for which others had the processors that this process may use, since the machine began."""
    allowed = os.sched_getaffinity(0)
    times = [one for number, one in enumerate(psutil.cpu_times(percpu=True)) if number in allowed]
    busy = sum(sum(one[:4]) - one.idle + one.irq + one.softirq + one.steal for one in times)
    return busy - sum(sum(one.cpu_times()[:2]) for one in ours)


def thirds(measured: Sequence[tuple[float, ...]], seconds: float) -> list[dict[str, float]]:
    """Median, 95th percentile and largest of (second, value) in each third of the time, and how many there were."""
    found = []
    for number in range(3):
        values = sorted(value for at, value in measured if number * seconds / 3 <= at < (number + 1) * seconds / 3)
        if values:
            middle, slow = values[len(values) // 2], values[int(0.95 * len(values))]
            row = {"median": middle, "p95": slow, "max": values[-1]}
            found.append({"count": len(values)} | {name: round(value, 4) for name, value in row.items()})
    return found


def waiting(course: dict[str, list[tuple[float, ...]]], seconds: float) -> dict[str, list[dict[str, float]]]:
    """Waiting in each third of the time, and what others had of the processors."""
    return {
        "first_piece_s": thirds([(at, first) for at, first, _ in course["answers_over_time"]], seconds),
        "between_pieces_s": thirds(course["gaps"], seconds),
        "answer_s": thirds([(at, took) for at, _, took in course["answers_over_time"]], seconds),
        "others_processors": thirds(course["others"], seconds),
    }


def undisturbed(course: dict[str, list[tuple[float, ...]]]) -> dict[str, list[tuple[float, ...]]]:
    """What ended in a second in which others took little, as in those before it in which an answer was on its way."""
    calm = {int(at) for at, share in course["others"] if share < LITTLE}
    calm = {at for at in calm if all(at - back in calm for back in range(4))}
    return {name: [row for row in rows if int(row[0]) in calm] for name, rows in course.items()}


async def soak(
    address: str, streams: int, seconds: float, server: psutil.Process
) -> tuple[dict[str, object], dict[str, list[tuple[float, ...]]]]:
    """Run the streams, and hold the answers against those given alone: what came of it, and the course of it."""
    limits = httpx.Limits(max_connections=streams + 4)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        alone = {prompt: (await ask(client, address, prompt))[1] for prompt in PROMPTS}
        begun = time.monotonic()
        until = begun + seconds
        answers: list[tuple[str, int, str]] = []
        memory: list[int] = []
        asked_again: list[float] = []
        course: dict[str, list[tuple[float, ...]]] = {"memory": [], "answers_over_time": [], "gaps": [], "others": []}

        async def stream(number: int) -> None:
            turn = number
            while time.monotonic() < until:
                prompt = PROMPTS[turn % len(PROMPTS)]
                turn += 1
                try:
                    status, text, asked, moments = await ask(client, address, prompt)
                except httpx.RemoteProtocolError as error:
                    # A connection that rested was closed as it was used again: a client asks again (RFC 9110, 9.2.2).
                    if "without sending a response" not in str(error):
                        raise
                    asked_again.append(time.monotonic() - begun)
                    continue
                answers.append((prompt, status, text))
                if status == 200:
                    *pieces, end = moments
                    course["answers_over_time"].append((end - begun, pieces[0] - asked, end - asked))
                    course["gaps"] += [(one - begun, one - before) for before, one in itertools.pairwise(pieces)]
                if status == 429:
                    await asyncio.sleep(1)

        async def watch() -> None:
            ours = [psutil.Process(), server]
            before, busy = time.monotonic(), busy_seconds(ours)
            while time.monotonic() < until:
                memory.append(server.memory_info().rss)
                course["memory"].append((time.monotonic() - begun, memory[-1]))
                await asyncio.sleep(1)
                now, still = time.monotonic(), busy_seconds(ours)
                course["others"].append((now - begun, (still - busy) / (now - before)))
                before, busy = now, still

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
        "other_than_alone": sum(text != alone[prompt] for prompt, _, text in whole),
        "thirds": waiting(course, seconds),
        "thirds_undisturbed": waiting(undisturbed(course), seconds),
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
