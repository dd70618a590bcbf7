"""A server under attack: what strangers send, how slowly they send it, and whether somebody else is still answered.

    python benchmarks/server_attack.py BUNDLE [--connections 1000] [--bodies 2000]

Starts `headrace serve` with a key, attacks it in every way below, and asks a question after each: the answer must be
the one from before. At the end the server is told to stop, and its log must hold neither key nor prompt. Prints one
JSON object; exit 1 where something of that does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

KEY = "sesame-4711-canary"
PROMPT = "canary-prompt-0815"
ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 4},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4},
    "/api/chat": {"messages": [{"role": "user", "content": PROMPT}], "stream": False, "options": {"num_predict": 4}},
    "/api/generate": {"prompt": PROMPT, "stream": False, "options": {"num_predict": 4}},
    "/tokenize": {"content": PROMPT},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/apply-template": {"messages": [{"role": "user", "content": PROMPT}]},
}
CALLS = [{"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}]
RICH = {
    "/v1/chat/completions": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "logit_bias": {"5": 1}, "stop": ["x"], "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 1,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "tool_call_id": "a", "content": "5"},
        ],
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": PROMPT},
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "a"},
            {"type": "function_call_output", "call_id": "a", "output": "5"},
        ],
        "text": {"format": {"type": "json_object"}}, "tools": [{"type": "function", "name": "f", "parameters": {}}],
    },
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "5"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "stop_sequences": ["x"],
    },
    "/api/chat": {
        "messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "", "tool_calls": CALLS}],
        "format": {"type": "object"},
    },
}  # fmt: skip
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, 1e308, -(10**30), 10**400, "", "x", "\x00", "\ud800", "é" * 300, "{", [], {},
    [[]], [None], [0], [{}], {"": {}}, {"type": "text"}, {"type": []}, {"x": "\udfff"}, "😀" * 20, float("nan"),
    [["a"]], float("inf"), "-1", "1e9",
]  # fmt: skip
DEPTHS = (10, 100, 500, 900, 950, 980, 1000, 5000, 100_000)
SOON = 10.0  # seconds within which somebody else is answered during an attack
ENDED = (0, -signal.SIGTERM)  # uvicorn ends by the signal that told it to, once it has finished
PATIENT = 600.0  # seconds that an attack itself waits: a machine may be stopped for a while
FREED = 60.0  # seconds within which slots are free behind it
SLOW = 10.0  # the server's own patience with a request's head
ALLOWED = 3.0  # beyond it, on a busy machine


class Served:
    """The server that is attacked."""

    def __init__(self, bundle: str, log: Path) -> None:
        command = [sys.executable, "-m", "headrace", "serve", bundle, "--port", "0", "--slots", "4"]
        self.log = log
        self._file = log.open("wb")
        environment = os.environ | {"HEADRACE_API_KEY": KEY}
        self.process = subprocess.Popen(command, stdout=self._file, stderr=self._file, env=environment)
        while "listening on http://" not in (told := log.read_text(errors="replace")):
            if self.process.poll() is not None:
                raise RuntimeError(told)
            time.sleep(0.05)
        self.address = told.partition("listening on ")[2].split()[0]
        self.port = int(self.address.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.address, headers={"x-api-key": KEY}, timeout=PATIENT)
        self.memory = psutil.Process(self.process.pid).memory_info

    def answer(self) -> tuple[str, float]:
        """A greedy answer, and the seconds it took."""
        begun = time.monotonic()
        body = {"messages": [{"role": "user", "content": "A river"}], "max_tokens": 8, "temperature": 0}
        with httpx.Client(base_url=self.address, headers={"x-api-key": KEY}, timeout=PATIENT) as client:
            told = client.post("/v1/chat/completions", json=body)
        return (
            told.json()["choices"][0]["message"]["content"] if told.status_code == 200 else f"{told.status_code}"
        ), time.monotonic() - begun

    def idle(self) -> bool:
        """Whether all slots are free within `FREED` seconds."""
        until = time.monotonic() + FREED
        while time.monotonic() < until:
            text = self.client.get("/metrics").text
            if all(
                f'{name}{{model="' not in line or line.endswith(" 0.0") for line in text.splitlines() for name in _BUSY
            ):
                return True
            time.sleep(0.2)
        return False

    def open(self, sent: bytes = b"", buffer: int | None = None) -> socket.socket:
        """A connection to which something has been sent."""
        made = socket.socket()
        if buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.settimeout(5)
        made.connect(("127.0.0.1", self.port))
        made.sendall(sent)
        return made

    def open_connections(self) -> int:
        """Connections that the server still has."""
        found = psutil.Process(self.process.pid).net_connections(kind="tcp")
        return sum(one.status != psutil.CONN_LISTEN for one in found)

    def stop(self) -> tuple[int, str]:
        """Ask it to end: its status, and what it wrote."""
        self.client.close()
        self.process.terminate()
        status = self.process.wait(60)
        self._file.close()
        return status, self.log.read_text(errors="replace")


_BUSY = ("headrace_active_answers", "headrace_queued_requests")


def _head(path: str, length: int | str, *more: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"x-api-key: {KEY}",
        f"Content-Length: {length}",
        *more,
        "",
        "",
    ]
    return "\r\n".join(lines).encode()


def _reset(connection: socket.socket) -> None:
    """Close without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _alive(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _changed(value: Any, random_: random.Random) -> Any:
    """A body with one of its parts replaced, left out or added."""
    if isinstance(value, dict) and value and random_.random() < 0.85:
        key = random_.choice(list(value))
        kind = random_.random()
        if kind < 0.1:
            return {name: inside for name, inside in value.items() if name != key}
        if kind < 0.15:
            return value | {"surprise": random_.choice(JUNK)}
        return value | {key: _changed(value[key], random_)}
    if isinstance(value, list) and value and random_.random() < 0.85:
        at = random_.randrange(len(value))
        return [*value[:at], _changed(value[at], random_), *value[at + 1 :]]
    return random_.choice(JUNK)


def bodies(served: Served, count: int) -> dict[str, Any]:
    """Valid bodies of every dialect with a part made wrong."""
    random_ = random.Random(0)
    statuses: Counter[int] = Counter()
    wrong = []
    for _ in range(count):
        path = random_.choice(list(ROUTES))
        base: dict[str, Any] = ROUTES[path]
        if path in RICH and random_.random() < 0.7:
            rich: dict[str, Any] = RICH[path]
            base = base | dict(random_.sample(sorted(rich.items(), key=str), random_.randint(1, len(rich))))
        sent = json.dumps(_changed(base, random_)).encode()
        status = served.client.post(path, content=sent).status_code
        statuses[status] += 1
        if status >= 500:
            wrong.append([path, sent.decode()[:200]])
    return {
        "sent": count,
        "statuses": {str(s): n for s, n in sorted(statuses.items())},
        "wrong": wrong[:5],
        "ok": not wrong,
    }


def deep(served: Served, _: int) -> dict[str, Any]:
    """Nesting, as a body, as a message, as arguments in a string, as a schema."""
    statuses: Counter[int] = Counter()
    for depth in DEPTHS:
        nested = "[" * depth + "]" * depth
        inside = '{"a":' * depth + "1" + "}" * depth
        for path, sent in (
            ("/v1/chat/completions", nested),
            ("/v1/chat/completions", f'{{"messages": {nested}}}'),
            ("/v1/chat/completions", f'{{"messages": [{{"role": "user", "content": {nested}}}]}}'),
            (
                "/v1/chat/completions",
                f'{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, "response_format": '
                f'{{"type": "json_schema", "json_schema": {{"schema": {inside}}}}}}}',
            ),
            (
                "/v1/chat/completions",
                f'{{"messages": [{{"role": "assistant", "content": "", "tool_calls": [{{"function": {{"name": "f", '
                f'"arguments": {inside}}}}}]}}], "max_tokens": 1}}',
            ),
            (
                "/v1/responses",
                json.dumps({"input": [{"type": "function_call", "name": "f", "arguments": nested}]}),
            ),
            ("/api/chat", f'{{"messages": [{{"role": "user", "content": "a"}}], "stream": false, "format": {inside}}}'),
            ("/tokenize", f'{{"content": {nested}}}'),
        ):
            statuses[served.client.post(path, content=sent).status_code] += 1
    return _by_status(statuses)


def unreadable(served: Served, _: int) -> dict[str, Any]:
    """Bytes that are no UTF-8, half surrogates, and things that are no JSON."""
    statuses: Counter[int] = Counter()
    for path in ROUTES:
        for sent in (
            b"\xff\xfe{}", b"\xc3\x28", b'{"content": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}", b"\x00", b"", b"NaN", b"nul",
            b'{"content": "\\ud800", "prompt": "\\ud800", "input": "\\udfff", "model": "\\udc00"}',
            b'{"model": "\\ud83d"}',
            b'{"content": "a\\u0000b"}', b'"' + b"9" * 5000 + b'"', b"9" * 5000, b'{"tokens": [' + b"9" * 4000 + b"]}",
            b'{"' + b"k" * 100_000 + b'": 1}',
        ):  # fmt: skip
            statuses[served.client.post(path, content=sent).status_code] += 1
    return _by_status(statuses)


def huge(served: Served, _: int) -> dict[str, Any]:
    """Bodies beyond the limit, told and untold, whole prompts of the limit's size, and many that do not end."""
    statuses: Counter[int] = Counter()
    before = served.memory().rss

    def endless() -> Any:
        for _ in range(200):
            yield b" " * (1 << 20)

    for path in ("/v1/chat/completions", "/tokenize"):
        try:
            statuses[served.client.post(path, content=endless()).status_code] += 1
        except httpx.HTTPError:
            statuses[413] += 1  # it was told, and the rest was not taken
    slowest = 0.0
    for content in ("a" * 8_000_000, "a b " * 2_000_000, "河" * 2_600_000, "\n" * 8_000_000):
        for path, body in (("/tokenize", {"content": content}), ("/v1/completions", {"prompt": content})):
            begun = time.monotonic()
            waiting = served.client.post(path, content=json.dumps(body, ensure_ascii=False).encode())
            slowest = max(slowest, time.monotonic() - begun)
            statuses[waiting.status_code] += 1
    halves = [served.open(_head("/v1/completions", 8_000_000)) for _ in range(60)]
    for half in halves:
        try:
            half.sendall(b" " * 7_900_000)
        except OSError:
            continue
    held = served.memory().rss - before
    told = _by_status(statuses)
    _, took = served.answer()
    for half in halves:
        half.close()
    return told | {
        "slowest_s": round(slowest, 2), "held_mb": held // 10**6, "answer_s": round(took, 2),
        "ok": told["ok"] and held < 600_000_000,
    }  # fmt: skip


def vanishing(served: Served, _: int) -> dict[str, Any]:
    """Clients that go at every stage of a request, with and without a goodbye."""
    body = json.dumps({"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 100, "stream": True}).encode()
    whole = _head("/v1/chat/completions", len(body)) + body
    cuts = [whole[:n] for n in range(1, len(whole), 9)]
    for number, cut in enumerate([*cuts, *[whole] * 100]):
        connection = served.open(cut)
        if number % 3 == 0:
            time.sleep(0.01)
        (_reset if number % 2 else socket.socket.close)(connection)
    return {"sent": len(cuts) + 100, "ok": served.idle()}


def slow_heads(served: Served, count: int) -> dict[str, Any]:
    """As many connections as one likes, each sending a byte of a head now and then."""
    connections = [served.open(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n") for _ in range(count)]
    begun = time.monotonic()
    took = []
    while time.monotonic() - begun < SLOW + ALLOWED:
        for connection in connections:
            try:
                connection.sendall(b"x")
            except OSError:
                continue
        took.append(served.answer()[1])
        time.sleep(0.5)
    left = sum(map(_alive, connections))
    for connection in connections:
        connection.close()
    return {
        "connections": count,
        "left": left,
        "answer_s_max": round(max(took), 2),
        "ok": not left and max(took) < SOON,
    }


def slow_bodies(served: Served, count: int) -> dict[str, Any]:
    """Bodies that never end: somebody else is answered meanwhile."""
    connections = [served.open(_head("/v1/chat/completions", 1000) + b"{") for _ in range(count)]
    took = served.answer()[1]
    for connection in connections:
        connection.close()
    return {"connections": count, "answer_s": round(took, 2), "ok": took < SOON}


def not_reading(served: Served, _: int) -> dict[str, Any]:
    """Clients that ask for long answers with probabilities and do not take them."""
    body = json.dumps(
        ROUTES["/v1/chat/completions"] | {"max_tokens": 150, "stream": True, "logprobs": True, "top_logprobs": 20}
    ).encode()
    sent = _head("/v1/chat/completions", len(body)) + body
    connections = [served.open(sent, buffer=1024) for _ in range(40)]
    idle = served.idle()
    for connection in connections:
        connection.close()
    return {"connections": 40, "ok": idle}


def key_times(served: Served, _: int) -> dict[str, Any]:
    """Whether the time of a refusal tells how much of a key was right: medians, in microseconds."""
    guesses = {"first": "x" + KEY[1:], "last": KEY[:-1] + "x", "short": KEY[:4]}
    times: dict[str, list[float]] = {name: [] for name in guesses}
    statuses: Counter[int] = Counter()
    for _ in range(1500):
        for name, guess in guesses.items():
            begun = time.perf_counter()
            statuses[served.client.get("/props", headers={"x-api-key": guess}).status_code] += 1
            times[name].append(time.perf_counter() - begun)
    medians = {name: round(1e6 * statistics.median(taken)) for name, taken in times.items()}
    spread = statistics.quantiles(times["first"], n=4)
    return {"median_us": medians, "quartiles_us": [round(1e6 * q) for q in spread], "ok": set(statuses) == {401}}


def _by_status(statuses: Counter[int]) -> dict[str, Any]:
    ok = all(status < 500 for status in statuses)
    return {"sent": sum(statuses.values()), "statuses": {str(s): n for s, n in sorted(statuses.items())}, "ok": ok}


ATTACKS: tuple[Callable[[Served, int], dict[str, Any]], ...] = (
    bodies, deep, unreadable, huge, vanishing, slow_heads, slow_bodies, not_reading, key_times,
)  # fmt: skip


def main() -> int:
    """Attack a server, one way after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--bodies", type=int, default=2000)
    parser.add_argument("--only", choices=[attack.__name__ for attack in ATTACKS], action="append")
    given = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        served = Served(given.bundle, Path(folder) / "log")
        try:
            alone, _ = served.answer()
            first = served.memory().rss
            for attack in ATTACKS:
                if given.only and attack.__name__ not in given.only:
                    continue
                begun = time.monotonic()
                count = given.bodies if attack is bodies else given.connections
                try:
                    found = attack(served, count)
                    served.idle()
                    after, _ = served.answer()
                    found["answer_as_before"] = after == alone
                except (httpx.HTTPError, OSError) as error:
                    found = {"ok": False, "error": f"{type(error).__name__}: {error}", "answer_as_before": False}
                found |= {"seconds": round(time.monotonic() - begun, 1), "rss_mb": served.memory().rss // 10**6}
                report[attack.__name__] = found
                print(attack.__name__, json.dumps(found), file=sys.stderr, flush=True)
        finally:
            status, log = served.stop()
    told = [secret for secret in (KEY, PROMPT) if secret in log]
    report["log"] = {
        "bytes": len(log),
        "tracebacks": log.count("Traceback") + log.count("raised at:"),
        "secrets": told,
        "ok": not told,
    }
    report["end"] = {"status": status, "rss_mb_first": first // 10**6, "ok": status in ENDED}
    print(json.dumps(report, indent=1))
    if not report["log"]["ok"] or report["log"]["tracebacks"]:
        print(log[-4000:], file=sys.stderr)
    return 0 if all(one["ok"] and one.get("answer_as_before", True) for one in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
