"""Processes that side_by_side.py asks, and the machine they run on."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contestants.contestant import ids_of
from contestants.models import Models

HERE = Path(__file__).parent
COLD_TOKENS = 16
LLAMA_SETTINGS = (("flash=1", "cache=q8_0"), (), ("flash=1",))
OPENVINO_SETTINGS = (("group=0",), ("group=128",))
QUICK = {"llama": 2, "openvino": 1}  # settings that are tried when there is little time
TEXT = "In the beginning of spring, seven of ten engineers measured the river first and then built"
SLOTS = 8
PACKAGES = {"llama": "llama_cpp", "openvino": "openvino"}


class Contestant:
    """A child process that answers one question a line (contestant.py)."""

    def __init__(self, command: list[str]) -> None:
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()
        self.about = self.ask({"do": "about"})

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Its answer."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # of one that has ended, which `_answer` tells
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, Any]:
        """Let it go: what it was, and its peak memory."""
        about = self.ask({"do": "about"})
        self._child.communicate(json.dumps({"do": "end"}) + "\n")
        return about

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        self._child.communicate()
        raise SystemExit(f"error: {' '.join(map(str, self._child.args))} ended: see its message above")  # type: ignore[arg-type]


class Arena:
    """Contestants by model, each started when it is first asked for.

    Attributes:
        missing: peers whose package is not there, and which.
    """

    def __init__(self, models: Models, peer_python: str, threads: int, runner: str, *, quick: bool, huge: bool) -> None:
        self.models = models
        self.python = peer_python
        self.threads = threads
        self.runner = runner
        self.quick = quick
        self.huge = huge
        self.missing = {
            peer: f"{package} is not installed in {Path(peer_python).name}"
            for peer, package in PACKAGES.items()
            if subprocess.run([peer_python, "-c", f"import {package}"], capture_output=True).returncode
        }
        self.ended: list[dict[str, Any]] = []
        self._running: dict[tuple[str, ...], Contestant] = {}
        self._settings: dict[tuple[str, str], list[str]] = {}  # peer, model → the command that was fastest

    def headrace(self, model: str) -> Contestant:
        """Ours."""
        script, bundle = str(HERE / "run_headrace.py"), str(self.models.bundle(model))
        more = ["huge"] if self.huge else []
        return self._start([sys.executable, script, bundle, model, str(self.threads), self.runner, str(SLOTS), *more])

    def peers(
        self, model: str, names: tuple[str, ...], trial: dict[str, Any] | None, question: dict[str, Any]
    ) -> dict[str, Contestant]:
        """Those of the peers that are there, each with the setting that answers the trial fastest, tried once. Without
        a trial they keep the setting that they have for this model; who has none is tried on the question."""
        commands: dict[str, list[list[str]]] = {}
        if "llama" in names and "llama" not in self.missing:
            command = [self.python, str(HERE / "run_llama.py"), str(self.models.gguf[model]), str(self.threads)]
            commands["llama"] = [[*command, *settings] for settings in LLAMA_SETTINGS]
        if "openvino" in names and "openvino" not in self.missing:
            command = [self.python, str(HERE / "run_openvino.py"), self.models.openvino_geometry(), str(self.threads)]
            commands["openvino"] = [[*command, *settings] for settings in OPENVINO_SETTINGS]
        for name, tried in commands.items():
            if trial is not None or (name, model) not in self._settings:
                settings = tried[: QUICK[name]] if self.quick else tried
                self._settings[name, model] = self._fastest(settings, trial or question)
        return {name: self._start(self._settings[name, model]) for name in commands}

    def _fastest(self, commands: list[list[str]], question: dict[str, Any]) -> list[str]:
        """One process at a time: those of a large model do not fit into memory together."""
        best, least = commands[0], float("inf")
        for command in commands if len(commands) > 1 else ():
            self._end_all_but(command, commands)
            contestant = self._start(command)
            contestant.ask(question)
            seconds = contestant.ask(question)["seconds"]
            if seconds < least:
                best, least = command, seconds
        self._end_all_but(best, commands)
        return best

    def chat(self, model: str, tokens: int) -> list[str]:
        """headrace's whole command: an answer of so many tokens behind a prompt of 16."""
        return [*self._verb("chat", model, tokens), "--raw", "-p", self._text(model)]

    def generate(self, model: str, tokens: int, prompts: int) -> list[str]:
        """The same for several prompts at once."""
        source, answers = self.models.work / "prompts.jsonl", self.models.work / "answers.jsonl"
        source.write_text(f"{json.dumps({'prompt': self._text(model)})}\n" * prompts, encoding="utf-8")
        answers.unlink(missing_ok=True)
        files = ["--slots", str(prompts), "--input", str(source), "--output", str(answers)]
        return [*self._verb("generate", model, tokens), *files]

    def _verb(self, verb: str, model: str, tokens: int) -> list[str]:
        options = ["--greedy", "-n", str(tokens), "-t", str(self.threads), "--runner", self.runner]
        return [sys.executable, "-m", "headrace", verb, str(self.models.bundle(model)), *options]

    def first_token_of_llama(self, model: str) -> list[str]:
        """The same of llama.cpp."""
        script, path = str(HERE / "first_token_llama.py"), str(self.models.gguf[model])
        return [self.python, script, path, str(self.threads), str(COLD_TOKENS)]

    def run(self, command: list[str]) -> int:
        """A command, to its end: the most memory it took, bytes. Modules can be kept compiled, as if installed."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        quiet = subprocess.DEVNULL
        child = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"error: {' '.join(command)} ended with status {child.returncode}")
        return int(used.ru_maxrss) * 1024

    def close(self) -> list[dict[str, Any]]:
        """Let everybody go: what they were, and those before them. Who is asked again starts anew."""
        for key in list(self._running):
            self._end(list(key))
        return self.ended

    def _end_all_but(self, kept: list[str], commands: list[list[str]]) -> None:
        for command in commands:
            if command is not kept:
                self._end(command)

    def _end(self, command: list[str]) -> None:
        contestant = self._running.pop(tuple(command), None)
        if contestant is not None:
            self.ended.append(contestant.end())

    def _start(self, command: list[str]) -> Contestant:
        key = tuple(command)
        if key not in self._running:
            self._running[key] = Contestant(command)
        return self._running[key]

    def _text(self, model: str) -> str:
        """A text of 16 tokens."""
        from headrace.text.tokenizer_folder import load_tokenizer

        tokenizer = load_tokenizer(self.models.bundle(model))
        words = TEXT.split()
        for count in range(1, len(words) + 1):
            if len(tokenizer.encode(" ".join(words[:count]))) >= COLD_TOKENS:
                return " ".join(words[:count])
        return tokenizer.decode(ids_of(COLD_TOKENS, tokenizer.vocab_size))


@dataclass(frozen=True)
class Description:
    """Which machine it was."""

    processor: str
    cores: int
    features: tuple[str, ...]
    system: str


@dataclass
class Machine:
    """The machine's peaks, measured again and again."""

    work: Path
    threads: int
    seen: list[dict[str, Any]] = field(default_factory=list)

    def peaks(self) -> dict[str, Any]:
        """Measured now; {} where there is no C compiler."""
        program, source = self.work / "machine_peaks", HERE.parent / "machine_peaks.c"
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            compiler = shutil.which("cc")
            if compiler is None:
                return {}
            options = ["-O3", "-march=native", "-pthread"]
            subprocess.run([compiler, *options, str(source), "-o", str(program)], check=True)
        done = subprocess.run([str(program), str(self.threads)], check=True, capture_output=True, text=True)
        found = dict(json.loads(done.stdout))
        self.seen.append(found)
        return found

    def best(self) -> dict[str, Any]:
        """The most that was seen of each."""
        keys = [key for key in (self.seen[0] if self.seen else {}) if key.endswith(("_s", "_tops"))]
        return {key: max(found[key] for found in self.seen) for key in keys}

    def description(self) -> Description:
        """Processor, cores, and the vector extensions that matter here."""
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        table = {key.strip(): value.strip() for key, value in lines.items()}
        known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
        has = set(table.get("flags", table.get("Features", "")).split())
        name = table.get("model name", platform.processor() or platform.machine())
        return Description(name, text.count("processor\t"), tuple(f for f in known if f in has), platform.platform())
