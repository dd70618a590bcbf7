"""What is known of a bundle, as facts: each a value, how a card shows it, and where it comes from.

Sources are the bundle's manifest and files, measurements kept with it, `plan`'s estimate, or what was given on the
command line. A card says nothing that is not a fact, so that checking it means gathering them again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.bundle.folder import Bundle
from headrace.measure.bench import parameter_count
from headrace.measure.record import bundle_digest
from headrace.model.weights import Weight, quantized_weights
from headrace.plan import GraphStyle, Port, ports
from headrace.quantize.budget import average_bits
from headrace.targets.device_loop import longest_prompt
from headrace.targets.qualcomm.soc import SOCS

__all__ = ["PLAN", "Fact", "Facts", "bundle_facts", "decimal", "human", "table_rows"]

MANIFEST, PLAN = "headrace.json", "plan"
_LANGUAGES = {"en": "English", "zh": "Chinese"}
_ORIGIN = {"base_model": "repository"}  # what a fact is called in the manifest, where that differs


@dataclass(frozen=True)
class Fact:
    """A value as JSON has it, how the card shows it, and its source."""

    value: Any
    shown: str
    source: str

    def __str__(self) -> str:
        return self.shown


class Facts(dict[str, Fact]):
    """Facts by name."""

    def put(self, name: str, value: Any, source: str, shown: str | None = None) -> None:
        """Add one; shown as `value` is written unless told otherwise."""
        self[name] = Fact(value, str(value) if shown is None else shown, source)

    def has(self, name: str) -> bool:
        """Whether it is known (templates cannot say `in` of a name with a dot)."""
        return name in self

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: {name: {value, source}}."""
        return {name: {"value": fact.value, "source": fact.source} for name, fact in self.items()}


def bundle_facts(bundle: Bundle, given: Mapping[str, str]) -> Facts:
    """What manifest, files and plan say of a bundle.

    Args:
        bundle: an opened bundle.
        given: what nobody can derive: base_model, license, license_name, license_link, languages ("zh,en"), title.
    """
    facts = Facts()
    facts.put("digest", bundle_digest(bundle.root), MANIFEST)
    origin = bundle.provenance.get("origin", {})
    for name in ("title", "base_model", "license", "license_name", "license_link"):
        stated = origin.get(_ORIGIN.get(name, name))
        if value := given.get(name) or stated:
            facts.put(name, value, "given" if name in given else f"{MANIFEST}#/provenance/origin")
    codes = given.get("languages") or origin.get("languages") or ""
    source = "given" if given.get("languages") else f"{MANIFEST}#/provenance/origin"
    facts.put("languages", codes, source, _listed([_LANGUAGES.get(c, c) for c in codes.split(",") if c]))
    _geometry(facts, bundle)
    _weights(facts, bundle)
    _ports(facts, bundle)
    return facts


def _listed(names: Sequence[str]) -> str:
    """`English`, `Chinese and English`, `fr, German and English`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "not stated; see the original model"


def human(size: float) -> str:
    """`98.4 MB`, `5.06 GB`; decimal units, three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * scale:  # 999.6 MB are 1 GB in three digits
            return f"{size / scale:.3g} {unit}" if size < 999.5 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def decimal(value: float, digits: int = 4) -> str:
    """`8.55`, `17,037`: so many significant digits, and never a power of ten for a large number."""
    return f"{value:,.0f}" if value >= 10**digits - 0.5 else f"{value:.{digits}g}"


def _geometry(facts: Facts, bundle: Bundle) -> None:
    config, where = bundle.config, f"{MANIFEST}#/geometry"
    count = parameter_count(bundle)
    scale, unit = (1e9, "B") if count >= 1e9 else (1e6, "M")
    facts.put("parameters", count, where, f"{count / scale:.4g}{unit} ({count:,})")
    for name, value in (
        ("layers", config.num_layers),
        ("hidden", config.hidden_size),
        ("feed_forward", config.intermediate_size),
        ("heads", config.num_heads),
        ("kv_heads", config.num_kv_heads),
        ("head_dim", config.head_dim),
        ("vocabulary", config.vocab_size),
    ):
        facts.put(name, value, where)
    facts.put("architecture", config.architecture, where)
    facts.put("made.from", bundle.provenance.get("checkpoint", "unknown"), f"{MANIFEST}#/provenance/checkpoint")
    plan = f"{MANIFEST}#/plan"
    facts.put("prompt.length", bundle.prompt_length, plan)
    facts.put("context", list(bundle.contexts), plan, ", ".join(map(str, bundle.contexts)))
    facts.put("parts.count", len(bundle.parts), plan, f"{len(bundle.parts)} parts")
    longest = longest_prompt(0, bundle.step_lengths, bundle.contexts)
    facts.put(
        "prompt.longest",
        longest,
        plan,
        f"{longest} tokens on a device, whose last step must end before the context does; one of {bundle.context} "
        "leaves no room for an answer",
    )


def _weights(facts: Facts, bundle: Bundle) -> None:
    config = bundle.config
    table = quantized_weights(config)
    rules = bundle.recipe.resolve(table)
    where = f"{MANIFEST}#/recipe"
    facts.put("weights.bytes", bundle.weight_bytes, f"{MANIFEST}#/files", human(bundle.weight_bytes))
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for name, rule in rules.items():
        kind = "linears" if table[name].layer is not None else "embedding and head"
        grid = f"int{rule.bits}, " + (f"a scale for {rule.block} columns" if rule.block else "a scale a channel")
        key = (kind, grid, rule.method)
        counts[key] += 1
        sizes[key] += rule.grid.nbytes(*table[name].matrix)
    rows = [(*key, str(counts[key]), human(sizes[key])) for key in sorted(counts)]
    facts.put("grids", [[*key, counts[key], sizes[key]] for key in sorted(counts)], where, table_rows(rows))
    linears = [name for name in rules if table[name].layer is not None]
    by_bits = {
        bits: [name for name in linears if rules[name].bits == bits]
        for bits in sorted({rules[name].bits for name in linears})
    }
    counted = {str(bits): len(names) for bits, names in by_bits.items()}
    # 16-bit results are a device's: its static ranges are there.
    width = "a16" if "encodings.json" in bundle.files else ""
    blocks = sorted({rule.block for rule in rules.values() if rule.block})
    told = [f"w{bits}{width} ({len(names)} of {len(linears)} linears)" for bits, names in by_bits.items()]
    told[0] = f"w{min(by_bits)}{width}" + (f" (blocks of {', '.join(map(str, blocks))})" if blocks else "")
    facts.put(
        "precision",
        {"bits": counted, "linears": len(linears), "blocks": blocks, "a16": bool(width)},
        where,
        " + ".join(told),
    )
    average = average_bits(config, rules)
    have = ", ".join(
        f"{count} have {bits}{' bits' if i == 0 else ''}" for i, (bits, count) in enumerate(counted.items())
    )
    facts.put(
        "bits",
        {"average": round(average, 4), "linears": len(linears), **counted},
        where,
        f"Of {len(linears)} linears {have}; on average over their weights a code has {average:.3g} bits.",
    )
    wider = {bits: names for bits, names in by_bits.items() if bits > min(by_bits)}
    lines = [f"- {bits} bits: {_by_module([table[name] for name in names])}" for bits, names in wider.items()]
    facts.put("wider", {str(bits): names for bits, names in wider.items()}, where, "\n".join(lines) or "- none")
    each = 2 * config.num_layers * config.kv_size * (1 if bundle.kv_scales else 4)
    facts.put(
        "kv",
        {"type": bundle.kv_dtype, "token_bytes": each, "bytes": each * bundle.context},
        f"{MANIFEST}#/recipe/kv",
        f"{bundle.kv_dtype}, {each:,} bytes a token, {human(each * bundle.context)} at {bundle.context}",
    )


def _by_module(linears: Sequence[Weight]) -> str:
    """ "`mlp.down_proj` 0, 2–5": layers by module."""
    layers: dict[str, list[int]] = defaultdict(list)
    for linear in linears:
        layers[linear.role.value].append(linear.layer or 0)
    return "; ".join(f"`{module}` of {_ranges(found)}" for module, found in layers.items())


def _ranges(numbers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def _ports(facts: Facts, bundle: Bundle) -> None:
    """Inputs and outputs of every part, from the plan that graphs are made by."""
    config = bundle.config
    targets = [s.name for s in SOCS if any(f.startswith(f"{s.name}/") for f in bundle.files)]
    if targets:
        titles = [soc.title for soc in SOCS if soc.name in targets]
        facts.put("targets", targets, f"{MANIFEST}#/files", " and ".join(titles))
    style = GraphStyle.DEVICE if facts["precision"].value["a16"] else GraphStyle.HOST
    facts.put("ports.style", style.value, PLAN)
    lengths = (bundle.prompt_length, 1)
    rows, values, parts, sizes = [], [], [], []
    for part in bundle.parts:
        cells: list[str] = []
        for role, length in zip(("prompt", "token"), lengths):
            made = ports(config, part, style, length=length, context=bundle.context, kv_dtype=bundle.kv_dtype)
            values.append([part.name, length, [[[p.name, list(p.shape), p.dtype] for p in side] for side in made]])
            if style is GraphStyle.DEVICE or length > 1:  # a host graph serves any length
                cells += [_sides(side) for side in made]
            if part.number == 1:
                tokens = f"{length} token" + ("s" if length > 1 else "")
                facts.put(f"{role}.ids", length, PLAN, tokens)
                what = "logits" if part.heads else f"embeddings of {tokens}"
                facts.put(f"{role}.first", [list(p.shape) for p in made[1][:1]], PLAN, what)
        rows.append((str(part.number), *cells))
        size = int(bundle.files[f"weights/{part.name}.safetensors"]["bytes"])
        span = [f"{part.start}–{part.stop - 1}"] if part.layers else []
        held = ", ".join([*span, *["embedding"] * part.embeds, *["norm and head"] * part.heads])
        compiled = [
            human(f["bytes"])
            for target in targets
            for path, f in bundle.files.items()
            if path.startswith(f"{target}/") and f"_{part.number}_of_{part.count}" in path and path.endswith(".bin")
        ]
        parts.append((str(part.number), held, human(size), *([", ".join(compiled)] if targets else [])))
        sizes.append([part.number, part.start, part.stop, size, compiled])
    facts.put("token.count", 1, PLAN, "1 token")
    facts.put("parts", sizes, f"{MANIFEST}#/files", table_rows(parts))
    facts.put("ports", values, PLAN, table_rows(rows))
    facts.put(*_qairt(bundle, targets))


def _sides(side: Sequence[Port]) -> str:
    """Ports in words: those of layers of one shape together."""
    told, layers = [], defaultdict(list)
    for port in side:
        shape = f"({', '.join(map(str, port.shape))}) {port.dtype}"
        if port.name.startswith("past_"):
            _, kind, layer, way = port.name.split("_")
            layers[f"past_{kind}_i_{way}", shape].append(int(layer))
        else:
            told.append(f"`{port.name}` {shape}")
    told += [f"`{name}` {shape}, i = {_ranges(numbers)}" for (name, shape), numbers in layers.items()]
    return "<br>".join(told)


def _qairt(bundle: Bundle, targets: Sequence[str]) -> tuple[str, str | None, str, str]:
    for target in targets:
        path = bundle.root / target / "metadata.yaml"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if line.startswith("qairt_minimum:"):
                release = line.split(":", 1)[1].split("#")[0].strip().strip('"')
                return "qairt", release, f"{target}/metadata.yaml", release
    return "qairt", None, f"{MANIFEST}#/files", "none: this bundle was not compiled for a phone"


def table_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a Markdown table."""
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
