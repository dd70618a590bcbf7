"""What guessing ahead (prompt lookup) gains or costs on one bundle, beside the same engine without it.

    python benchmarks/speculation.py BUNDLE              the model's own answers: a passage copied, code, free text
    python benchmarks/speculation.py BUNDLE --scripted   the model computes, but says what a script says

Random weights say nothing that repeats, so for them answers are scripted: every step is computed and timed as it is,
then the script takes the place of the likeliest tokens. Rounds alternate; each figure is the median of the
ratios of neighbours. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from headrace.language_model import LanguageModel, load
from headrace.runtime.answer import Answer, Limits, Usage
from headrace.runtime.context import slide
from headrace.runtime.runner import Logits, Runner, Span
from headrace.runtime.sampling import SamplingOptions

PASSAGE = """The lock at Wendel lowers boats by four metres. It was built in 1884 from grey granite, and its gates are
oak. The keeper opens the upper sluice first and waits until the chamber is full. Then the boat enters, the gates
close behind it, and the lower sluice lets the water out into the tail race. In summer forty boats pass in a day, in
winter none do, because the canal freezes from December until the end of February. The basin above the lock holds nine
hundred cubic metres."""
STORY = """Nobody had expected the old miller to leave. She packed two shirts, a tin of tea and her father's compass,
locked the door behind her and walked east along the dyke. By noon the wind had turned; sand hissed over the path and
gulls hung above the breakwater like torn paper. A carter offered bread for news from town. What could she tell him?
Prices rose, boys went to sea, someone had painted the chapel blue. He laughed, cracked his whip and was gone."""
CODE = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return"
OWN = {
    "copy": (f"{PASSAGE}\n\nThe same text again:\n\nThe lock at Wendel", 110),
    "code": (f"{CODE} width * height * depth\n\n\n{CODE}", 60),
    "story": ("Once upon a time there was a miller who lived beside a river, and", 120),
    "essay": ("The most important thing that a young engineer should learn about water is", 120),
}
SOURCE = inspect.getsource(slide)
SCRIPTED = {
    "copy": (f"{PASSAGE}\n\nThe same text again:\n\n", PASSAGE),
    "edit": (
        f"{SOURCE}\n\nThe same with other names:\n\n",
        SOURCE.replace("steps", "count").replace("dropped", "gone"),
    ),
    "story": ("Write the beginning of a story.\n", STORY),
}


class Says:
    """A runner that computes what it is asked, and whose answers are scripted."""

    def __init__(self, runner: Runner, script: Mapping[int, int]) -> None:
        self._runner = runner
        self._script = script  # place → token

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def run(self, spans: Sequence[Span]) -> Logits:
        """The real logits, with the script's next token above them all."""
        logits = self._runner.run(spans)
        places = [span.start + at + 1 for span in spans for at in span.wanted]
        for row, place in zip(logits, places, strict=True):
            if place in self._script:
                row[self._script[place]] = np.float32(1e9)
        return logits


def once(model: LanguageModel, prompt: Sequence[int], tokens: int) -> tuple[list[int], float, Usage]:
    """A greedy answer, the seconds behind its first token, and what it took."""
    answer = Answer(model.tokenizer, Limits(tokens))
    made, started = [], 0.0
    for token in model.stream(prompt, SamplingOptions(), answer):
        made.append(token.id)
        started = started or time.perf_counter()
    return made, time.perf_counter() - started, answer.usage


def cases(model: LanguageModel, scripted: bool, script: dict[int, int]) -> Iterator[tuple[str, list[int], int]]:
    """Name, prompt and tokens of each; the script is set where there is one."""
    if not scripted:
        for name, (text, tokens) in OWN.items():
            yield name, model.encode_raw(text), tokens
        return
    for name, (asked, said) in SCRIPTED.items():
        prompt, tokens = model.encode_raw(asked), model.tokenizer.encode(said)
        script.clear()
        script.update({len(prompt) + at: token for at, token in enumerate(tokens)})
        yield name, prompt, len(tokens)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--scripted", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runner", default=None)
    given = parser.parse_args()
    report: dict[str, object] = {}
    script: dict[int, int] = {}
    with (
        load(given.bundle, runner=given.runner, slots=1) as plain,
        load(given.bundle, runner=given.runner, slots=1, speculate="lookup") as guessing,
    ):
        for model in (plain, guessing):
            model.engine.runner = Says(model.engine.runner, script)
        for name, prompt, tokens in cases(plain, given.scripted, script):
            once(plain, prompt, tokens), once(guessing, prompt, tokens)
            rounds = [(once(plain, prompt, tokens), once(guessing, prompt, tokens)) for _ in range(given.rounds)]
            usage = rounds[-1][1][2]
            report[name] = {
                "tokens": len(rounds[-1][0][0]),
                "plain_tok_s": round(statistics.median((len(a[0]) - 1) / a[1] for a, _ in rounds), 1),
                "ratio": round(statistics.median(a[1] / b[1] for a, b in rounds), 3),
                "ratios": [round(a[1] / b[1], 3) for a, b in rounds],
                "drafted": usage.drafted_tokens,
                "accepted": usage.accepted_tokens,
                "same": all(a[0] == b[0] for a, b in rounds),
            }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
