"""What a server costs beside its engine: tokens a second of one and of several streams, and the first token of a second
turn over a long history, whose answer a server that holds nothing of it must give too. Prints one JSON object.

    python benchmarks/serving_speed.py BUNDLE --streams 4

The client reads bytes and counts events: it runs on the same processors, and one that did more would be measured too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PROMPTS = [
    "Write a long story about a river.", "Explain how rain is made, at length.", "Tell the history of tea.",
    "Describe a harbour in the morning.", "Write a letter to a friend.", "Explain how a bridge stands.",
    "Write about winter.", "Describe a market.",
]  # fmt: skip
LINE = "The river carries water from the mountains to the sea, past towns and fields. "


async def ask(port: int, messages: list[dict[str, str]], tokens: int) -> tuple[float, list[float], dict[str, Any], str]:
    """A streamed greedy answer: when it was asked, when each event came, usage, text."""
    body = json.dumps({
        "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    started = time.perf_counter()
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
    times, lines = [], []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            lines.append(line)
    writer.close()
    events = [json.loads(line[6:]) for line in lines]
    text = "".join(c["delta"].get("content", "") for event in events for c in event["choices"])
    return started, times[1:-1], events[-1]["usage"], text


async def speeds(port: int, streams: int, tokens: int) -> float:
    """Tokens a second of all streams together, while all of them run."""
    made = await asyncio.gather(*(ask(port, [{"role": "user", "content": p}], tokens) for p in PROMPTS[:streams]))
    begin, end = max(times[0] for _, times, _, _ in made), min(times[-1] for _, times, _, _ in made)
    count = sum(sum(begin < t <= end for t in times) for _, times, _, _ in made)
    return count / (end - begin)


async def turns(port: int, history: int) -> dict[str, Any]:
    """First tokens of two turns, the first of which brings a history of so many tokens."""
    text = f"Story {time.time()}. " + LINE * (history // 16)
    talk = [{"role": "user", "content": text + "\nWhat does the river carry?"}]
    started, times, first, said = await ask(port, talk, 16)
    talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "And where does it end?"}]
    again, later, second, answer = await ask(port, talk, 16)
    return {
        "talk": talk,
        "answer": answer,
        "prompt_tokens": [first["prompt_tokens"], second["prompt_tokens"]],
        "cached_tokens": second["prompt_tokens_details"]["cached_tokens"],
        "first_token_s": [round(times[0] - started, 4), round(later[0] - again, 4)],
        "ratio": round((later[0] - again) / (times[0] - started), 4),
    }


async def measure(port: int, streams: int, tokens: int, rounds: int, history: int) -> dict[str, Any]:
    """Everything, alternating, medians."""
    await speeds(port, streams, 32)
    made = [(await speeds(port, 1, tokens), await speeds(port, streams, tokens)) for _ in range(rounds)]
    return {
        "one_stream_tok_s": round(statistics.median(one for one, _ in made), 1),
        f"{streams}_streams_tok_s": round(statistics.median(many for _, many in made), 1),
        "ratio": round(statistics.median(many / one for one, many in made), 2),
        "ratios": [round(many / one, 2) for one, many in made],
        "second_turn": await turns(port, history),
    }


def main() -> None:
    """Start a server, measure it, end it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--history", type=int, default=2000)
    parser.add_argument("serve", nargs="*", help="further options of headrace serve, behind --")
    given = parser.parse_args()
    command = [sys.executable, "-m", "headrace", "serve", given.bundle, "--port", "0", "--slots", str(given.streams)]
    with serving([*command, *given.serve]) as port:
        found = asyncio.run(measure(port, given.streams, given.tokens, given.rounds, given.history))
    turn = found["second_turn"]
    talk, answer = turn.pop("talk"), turn.pop("answer")
    with serving([*command, *given.serve]) as port:
        _, _, usage, anew = asyncio.run(ask(port, talk, 16))
    turn |= {"cached_tokens_anew": usage["prompt_tokens_details"]["cached_tokens"], "same_answer_anew": anew == answer}
    print(json.dumps(found, indent=1))


@contextmanager
def serving(command: list[str]) -> Iterator[int]:
    """A server, for as long as the block lasts: its port."""
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("listening on "))
        yield int(line.split()[2].rsplit(":", 1)[1])
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
