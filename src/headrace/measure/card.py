"""card: README.md of a bundle, as a model card that Hugging Face reads, and its check against what it speaks of.

    facts (facts.py) ──► card.md.jinja ──► README.md, which ends with the facts themselves as JSON in a comment

Checking gathers the facts again and writes the card again: every line that carries a number, and every line of a list
or table, must be there as it was, and nothing beside it; prose without numbers may be edited freely. A card that
headrace did not write is held against the geometry by what it claims (claims.py).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from headrace.bundle.folder import CARD, CARD_MARK, MEASUREMENTS, PICTURES, open_bundle
from headrace.errors import BundleError, UserError, one_line, shown
from headrace.files import read_text, write_file
from headrace.measure.claims import claim_problems
from headrace.measure.facts import Facts, bundle_facts, decimal
from headrace.measure.measured_facts import add_measured_facts
from headrace.measure.record import kept_records

__all__ = ["CARD", "GIVEN", "card_problems", "compare_bundles", "gather_facts", "make_card", "write_card"]

VERSION = 1  # of the block of facts
GIVEN = ("title", "base_model", "license", "license_name", "license_link", "languages")
_END = "\n-->"
CARD_LIMIT = 128 << 10  # bytes; one has some 12 KB
_LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "cc0-1.0", "cc-by-4.0",
    "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "gemma", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "unknown", "other",
}  # fmt: skip
_PICTURES = tuple(zip(("Time to first token", "Decoding over depth"), PICTURES, strict=True))


def write_card(root: Path, given: Mapping[str, str], *, pictures: bool = True) -> Path:
    """Write a bundle's card, and the pictures of its bench record where matplotlib is installed.

    Args:
        root: the bundle.
        given: values by names of `GIVEN`; those of the card that is there stay where none is given.
        pictures: draw them.

    Raises:
        BundleError: the bundle cannot be opened.
        UserError: a measurement kept with it is of another bundle; README.md is not a card of headrace.
    """
    path = root / CARD
    before = _block(read_text(path, limit=CARD_LIMIT)) if path.is_file() else {"facts": {}}
    if before is None:
        raise UserError(f"{path} was not written by headrace; move it away first")
    kept = _given(before)
    if pictures:
        _draw(root)
    write_file(path, make_card(root, {**kept, **given}).encode())
    return path


def make_card(root: Path, given: Mapping[str, str]) -> str:
    """A bundle's card as text.

    Raises:
        BundleError: the bundle cannot be opened.
        UserError: a measurement kept with it is of another bundle; something given is unknown.
    """
    if unknown := set(given) - set(GIVEN):
        raise UserError(f"a card takes no {sorted(unknown)[0]!r}; expected {', '.join(GIVEN)}")
    facts = gather_facts(root, given)
    name = root.resolve().name
    title = given.get("title") or name.removesuffix(".bundle")
    text = _template().render(
        f=facts,
        name=name,
        title=title,
        front_matter=_front_matter(facts).rstrip(),
        compiled=facts.has("targets"),
        licence=_licence(facts),
        base_model_link=f"https://huggingface.co/{facts['base_model']}" if facts.has("base_model") else "",
        pictures=[
            (alt, f"{MEASUREMENTS}/{stem}.svg")
            for alt, stem in _PICTURES
            if (root / MEASUREMENTS / f"{stem}.svg").is_file()
        ],
    )
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip()
    lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(v, ensure_ascii=False)}" for n, v in facts.to_dict().items())
    # Two hyphens would end an HTML comment.
    block = f'{{"version": {VERSION}, "facts": {{\n{lines}\n}}}}'.replace("--", "-\\u002d")
    return f"{text}\n{CARD_MARK}{block}{_END}\n"


@cache
def _template() -> Template:
    text = resources.files("headrace.measure").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(text)


def gather_facts(root: Path, given: Mapping[str, str]) -> Facts:
    """Everything a card of this bundle may say.

    Raises:
        BundleError: the bundle cannot be opened.
        UserError: a measurement kept with it is of another bundle.
    """
    bundle = open_bundle(root)
    facts = bundle_facts(bundle, given)
    records = kept_records(root)
    try:
        add_measured_facts(facts, bundle, records)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"a measurement in {root / MEASUREMENTS} lacks or misstates {error}; measure again or remove it"
        ) from None
    return facts


def card_problems(root: Path, card: Path | None = None) -> list[str]:
    """What a card says that its bundle, its measurements or the plan do not: a line for each, none when all agree.

    Args:
        root: the bundle.
        card: the card; the bundle's own README.md when None. One that headrace did not write is checked by its claims.

    Raises:
        BundleError: there is no bundle or no card.
    """
    path = card or root / CARD
    if not path.is_file():
        raise BundleError(f"{path} is missing; expected a card: headrace card {root}")
    text = read_text(path, limit=CARD_LIMIT)
    bundle = open_bundle(root)
    if "<!-- headrace-card" not in text:
        problems = claim_problems(text, bundle.config, bundle.parts, bundle.prompt_length, bundle.context)
    else:
        try:
            problems = differences(text, make_card(root, _given(_block(text) or {"facts": {}})))
        except UserError as error:
            problems = [str(error)]
    return [one_line(problem) for problem in problems]


def differences(text: str, fresh: str) -> list[str]:
    """What a card says differently from one that was just written of the same bundle: facts, then lines.

    Args:
        text: the card.
        fresh: what `make_card` gives now.
    """
    said, known = _block(text), _block(fresh)
    if said is None or known is None:
        return ["the facts at the card's end cannot be read; write it again: headrace card"]
    problems = []
    if said["version"] != known["version"]:
        problems.append(f"the facts have version {shown(said['version'])}; expected {known['version']}")
    for name in sorted(set(said["facts"]) | set(known["facts"])):
        a, b = said["facts"].get(name), known["facts"].get(name)
        if a != b:
            source = b["source"] if b else "no source"
            problems.append(f"fact {name}: the card has {_short(a)}; {source} has {_short(b)}")
    if not problems and _parts(text)[1] != _parts(fresh)[1]:
        problems.append("the facts at the card's end are not written as headrace writes them")
    return problems + _line_problems(_claims(text), _claims(fresh))


def _line_problems(found: Sequence[tuple[int, str]], expected: Sequence[tuple[int, str]]) -> list[str]:
    a, b = [line for _, line in found], [line for _, line in expected]
    problems = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        for offset in range(max(i2 - i1, j2 - j1)):
            said = found[i1 + offset] if i1 + offset < i2 else None
            right = b[j1 + offset] if j1 + offset < j2 else None
            if said is None:
                problems.append(f"a line is missing: {right}")
            elif right is None:
                problems.append(f"line {said[0]} has no source: {said[1]}")
            else:
                problems.append(f"line {said[0]} says: {said[1]}; expected: {right}")
    return problems


def _claims(text: str) -> list[tuple[int, str]]:
    """Lines that state something: with a digit, or of a list, a table or the front matter; with their numbers."""
    lines = _parts(text)[0].split("\n")
    matter = lines.index("---", 1) if lines[:1] == ["---"] and "---" in lines[1:] else 0
    return [
        (number, line.rstrip())
        for number, line in enumerate(lines, 1)
        if number <= matter or re.search(r"\d", line) or line.lstrip().startswith(("- ", "|"))
    ]


def _parts(text: str) -> tuple[str, str | None]:
    """A card's text, and the facts at its end; None where they are not there."""
    body, mark, rest = text.partition(CARD_MARK)
    block = rest.removesuffix("\n")
    return (body, block.removesuffix(_END)) if mark and block.endswith(_END) else (text, None)


def _block(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(_parts(text)[1] or "")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("facts"), dict) and "version" in value else None


def _given(block: Mapping[str, Any]) -> dict[str, str]:
    """What was given on the command line when a card was written."""
    facts = {name: fact for name, fact in block["facts"].items() if name in GIVEN and isinstance(fact, dict)}
    return {name: str(fact.get("value")) for name, fact in facts.items() if fact.get("source") == "given"}


def _short(fact: Any) -> str:
    if fact is None:
        return "nothing"
    text = json.dumps(fact.get("value") if isinstance(fact, dict) else fact, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _front_matter(facts: Facts) -> str:
    """YAML, written by the hub's own code."""
    from huggingface_hub import ModelCardData

    tags = ["llm", "generative_ai", "quantized", "on-device", "android", "onnx", facts["architecture"].value]
    if facts.has("targets"):
        tags += ["qnn", "genie", *facts["targets"].value]
    told = {name: facts[name].value for name in ("license_name", "license_link", "base_model") if facts.has(name)}
    licence = facts["license"].value.lower() if facts.has("license") else "other"
    if licence not in _LICENCES:  # the hub takes these; any other is "other" with a name
        told.setdefault("license_name", licence)
        licence = "other"
    if facts.has("base_model"):
        told["base_model_relation"] = "quantized"
    data = ModelCardData(
        language=facts["languages"].value.split(",") if facts["languages"].value else None,
        license=licence,
        library_name="headrace",
        pipeline_tag="text-generation",
        tags=tags,
        **told,
    )
    text: str = data.to_yaml(line_break="\n")
    return text


def _licence(facts: Facts) -> str:
    known = [facts[name].value for name in ("license_name", "license") if facts.has(name)]
    name = known[0] if known else "not stated; see the original model"
    return f"[{name}]({facts['license_link']})" if facts.has("license_link") else name


def _draw(root: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return
    from headrace.measure.plots import plot_bench

    for record in kept_records(root).values():
        if record["format"] == "headrace-bench":
            plot_bench(record, root / MEASUREMENTS)
            return


def compare_bundles(roots: Sequence[Path]) -> str:
    """A Markdown table of bundles side by side, from their facts; what was not measured is a dash.

    Raises:
        BundleError: one cannot be opened.
        UserError: a measurement kept with one is of another bundle.
    """
    columns = (
        "Bundle",
        "Parameters",
        "Precision",
        "Weights",
        "Context",
        "KV cache",
        "KL",
        "Top-1",
        "First token, s",
        "tok/s",
    )
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for root in roots:
        facts = gather_facts(root, {})
        texts = facts["fidelity"].value if facts.has("fidelity") else []
        compared = [t for t in texts if "kl" in t]
        bench = facts["bench.table"].value if facts.has("bench.table") else {"prompts": [], "decode": []}
        cells = (
            root.resolve().name,
            facts["parameters"].shown.split(" ")[0],
            facts["precision"].shown,
            facts["weights.bytes"].shown,
            facts["context"].shown,
            facts["kv"].shown.rsplit(", ", 1)[1],
            ", ".join(f"{t['kl']:.3g} ({t['text']})" for t in compared) or "–",
            ", ".join(f"{t['top1']:.3f}" for t in compared) or "–",
            " – ".join(f"{p['seconds']:.3g}" for p in (bench["prompts"][:1] + bench["prompts"][1:][-1:])) or "–",
            decimal(bench["decode"][0]["tok_s"]) if bench["decode"] else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
