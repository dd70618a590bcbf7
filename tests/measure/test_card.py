"""The card: valid for the hub, every number with its source, and no number that can be changed unseen."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from headrace.bundle.folder import check_files, open_bundle
from headrace.cli.main import _run
from headrace.config import ModelConfig
from headrace.errors import BundleError, UserError
from headrace.measure.bench import bench_bundle
from headrace.measure.bundle_score import evaluate_bundle
from headrace.measure.card import card_problems, differences, gather_facts, make_card, write_card
from headrace.measure.claims import claim_problems
from headrace.measure.facts import decimal
from headrace.measure.questions import ask_bundle
from headrace.measure.record import make_record, save_record
from headrace.plan import plan_parts
from tests.exports import CONTEXT, LAYERS, PROMPT_LENGTH, Exports
from tests.measure.test_item_sets import CHOICES

GIVEN = {
    "title": "Tiny river",
    "base_model": "someone/tiny-river",
    "license": "other",
    "license_name": "river-licence",
    "license_link": "https://example.org/licence",
    "languages": "zh,en",
}
BLOCK = "<!-- headrace-card"
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
# What the published card of Baichuan2-7B states; the geometry is config.json's of Baichuan2-7B-Chat.
REFERENCE = """- Input sequence length for Prompt Processor: 128
- Context length: 4096
- Number of parameters: 7.07B
- Num of key-value heads: 8
- Prompt Processor and Token Generator are split into 5 parts each.
- Prompt processor input (part1): 128 tokens
- Token generator input (part1): 128 tokens
| Baichuan2-7B | Snapdragon 8 Elite QRD | Snapdragon 8 Elite | QNN | 7.72 | 0.208 - 6.658 |
"""
BAICHUAN2 = ModelConfig(
    architecture="baichuan", vocab_size=125696, hidden_size=4096, intermediate_size=11008, num_layers=32,
    num_heads=32, num_kv_heads=32, head_dim=128, rms_norm_eps=1e-6, rope_theta=10000.0, max_context=4096,
    tied_head=False,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def any_size() -> Iterator[None]:
    """Tiny models are estimated like large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.measure.measured_facts.LEAST_SHARE", 0.0)
        yield


@pytest.fixture(scope="module")
def bundle(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one measurement of each kind and its card."""
    root = exports.copy(tmp_path_factory.mktemp("card") / "river.bundle", "tied", context=512)
    record = bench_bundle(root, prompts=(16, 40), tokens=2, depths=(8,), repeats=2)
    save_record(root, "bench-host", record)
    opened, source = open_bundle(root), exports.checkpoint("tied")
    (text,) = evaluate_bundle(root, [exports.text], checkpoint=source, windows=1, length=64)
    save_record(root, "text", make_record("text", opened, "host", {"simulate": None, "texts": [text.to_dict()]}))
    (asked,) = ask_bundle(root, ["ceval"], CHOICES, checkpoint=source, shots=0)
    save_record(root, "ceval", make_record("choices", opened, "host", asked))
    write_card(root, GIVEN, pictures=False)
    return root


@pytest.fixture(scope="module")
def card(bundle: Path) -> str:
    return (bundle / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_it(card: str) -> None:
    data = huggingface_hub.ModelCard(card).data.to_dict()
    assert data["library_name"] == "headrace" and data["pipeline_tag"] == "text-generation"
    assert data["license"] == "other" and data["license_link"] == GIVEN["license_link"]
    assert data["language"] == ["zh", "en"]
    assert data["base_model"] == "someone/tiny-river" and data["base_model_relation"] == "quantized"
    assert {"android", "quantized", "llama"} <= set(data["tags"])


def test_it_has_the_reference_cards_sections_in_its_order(card: str) -> None:
    places = [
        card.index(text)
        for text in (
            "# Tiny river", "### Model details", "- **Model stats:**", "Input sequence length for prompt processor: 32",
            "Context length: 512", "Number of parameters:", "Precision: w4a16", "Number of key-value heads: 2",
            "are split into 5 parts each", "Prompt processor model size:", "Prompt processor input (part 1): 32 tokens",
            "Token generator input (part 1): 1 token", "Supported languages: Chinese and English",
            "Minimum QAIRT version", "| Model | Device | Chipset |", "## Measured fidelity", "## How to run it",
            "## License", "## References", "## Usage and limitations", BLOCK,
        )
    ]  # fmt: skip
    assert places == sorted(places)


def test_every_width_is_told(exports: Exports) -> None:
    facts = gather_facts(exports.bundle(recipe=exports.mixed("float16"), parts=3), {})
    assert facts["precision"].shown == (
        "w4 (blocks of 16, 32) + w5 (8 of 28 linears) + w6 (3 of 28 linears) + w8 (16 of 28 linears)"
    )
    assert facts["bits"].shown.startswith("Of 28 linears 1 have 4 bits, 8 have 5, 3 have 6, 16 have 8; on average")
    assert "linears | int5, a scale for 16 columns" in facts["grids"].shown
    lines = facts["wider"].shown.splitlines()
    assert [line.split(":")[0] for line in lines] == ["- 5 bits", "- 6 bits", "- 8 bits"]
    assert "`mlp.up_proj` of 1" in lines[0]


def test_its_numbers_are_the_bundles(card: str, bundle: Path) -> None:
    opened, facts = open_bundle(bundle), gather_facts(bundle, GIVEN)
    assert facts["weights.bytes"].value == opened.weight_bytes
    for part in opened.parts:
        assert facts["parts"].value[part.number - 1][1:3] == [part.start, part.stop]
    # Ports are those of the graphs: `(kv heads, 1, D, C − S)` and so on.
    assert "`past_key_i_in` (2, 1, 16, 480) uint8, i = 0" in card  # 512 − 32
    assert "`past_value_i_in` (2, 1, 511, 16) uint8, i = 0" in card
    assert "`logits` (1, 1, 420) uint16" in card
    record = json.loads((bundle / "measurements" / "bench-host.json").read_text(encoding="utf-8"))
    assert f"{record['prompts'][0]['seconds']:.3g} (16 tokens) – {record['prompts'][1]['seconds']:.3g} (40)" in card
    estimated = [line for line in card.splitlines() if "estimated, `plan`" in line]
    assert estimated and all(re.search(r"\| ~[\d.]+ \(", line) for line in estimated)
    assert not any("~" in line for line in card.splitlines() if "measured, `bench-host.json`" in line)
    sources = {fact["source"].split("#")[0].split(", ")[0] for fact in facts.to_dict().values()}
    assert sources == {
        "headrace.json", "plan", "given", "measurements/bench-host.json", "measurements/text.json",
        "measurements/ceval.json",
    }  # fmt: skip


def test_large_numbers_are_written_out() -> None:
    assert [decimal(value) for value in (8.5507, 999.96, 9999.4, 9999.7, 17037.2)] == [
        "8.551", "1000", "9999", "10,000", "17,037"
    ]  # fmt: skip
    assert [decimal(value, 3) for value in (0.00751, 99.96, 1953.9)] == ["0.00751", "100", "1,954"]


def test_a_model_far_smaller_than_published_ones_is_not_estimated(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.measure.measured_facts.LEAST_SHARE", 0.5)
    text = make_card(bundle, GIVEN)
    assert "estimated, `plan`" not in text and "measured, `bench-host.json`" in text


def test_a_bundle_without_measurements_says_so(exports: Exports) -> None:
    text = make_card(exports.bundle(kv="float32"), {})
    assert "not measured" in text and "Not measured yet" in text and "![" not in text
    assert "each of which serves both roles" in text  # a float cache is no device's
    assert f"Context length: {CONTEXT}" in text and f"prompt processor: {PROMPT_LENGTH}" in text
    assert f"{LAYERS} layers" in text


def test_no_number_can_be_changed_unseen(card: str) -> None:
    assert differences(card, card) == []
    body = card.index(BLOCK)
    digits = [i for i, c in enumerate(card) if c.isdigit()]
    inside = random.Random(0).sample([i for i in digits if i > body], 300)
    for place in [i for i in digits if i < body] + inside:
        changed = f"{card[:place]}{(int(card[place]) + 1) % 10}{card[place + 1 :]}"
        assert differences(changed, card), card[max(0, place - 40) : place + 20]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("key-value heads: 2", "key-value heads: 8", "says:   - Number of key-value heads: 8"),
        ("### Precision", "It runs at 99 tok/s.\n\n### Precision", "has no source: It runs at 99 tok/s."),
        ("  - Context length: 512\n", "", "a line is missing:   - Context length: 512"),
        ('"kv_heads": {"value": 2', '"kv_heads": {"value": 8', "fact kv_heads: the card has 8; headrace.json"),
        ("pipeline_tag: text-generation", "pipeline_tag: fill-mask", "says: pipeline_tag: fill-mask"),
        ('{"version": 1', "{version: 1", "cannot be read"),
        ('{"version": 1', '{"version": 2', "the facts have version 2; expected 1"),
        ('"kv_heads": {"value": 2', '"kv_heads":  {"value": 2', "not written as headrace writes them"),
    ],
)
def test_what_was_changed_is_named(bundle: Path, card: str, tmp_path: Path, old: str, new: str, told: str) -> None:
    other = tmp_path / "card.md"
    other.write_text(card.replace(old, new), encoding="utf-8")
    assert card_problems(bundle) == []
    problems = card_problems(bundle, other)
    assert any(told in problem for problem in problems), problems


def test_prose_may_be_edited(bundle: Path, card: str, tmp_path: Path) -> None:
    other = tmp_path / "card.md"
    other.write_text(card.replace("## License", "A word of our own, without numbers.\n\n## License"), encoding="utf-8")
    assert card_problems(bundle, other) == []


def test_a_changed_measurement_is_told(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "measurements" / "text.json"
    before = path.read_text(encoding="utf-8")
    record = json.loads(before)
    record["texts"][0]["kl"] *= 1.5
    path.write_text(json.dumps(record), encoding="utf-8")
    try:
        assert _run(["card", str(bundle), "--check"]) == 1
        told = capsys.readouterr()
        assert "fact fidelity" in told.out and "do not hold" in told.err
        assert _run(["card", str(bundle), "--check", "--json"]) == 1
        assert not json.loads(capsys.readouterr().out.splitlines()[-1])["ok"]
        path.unlink()
        assert any("fidelity" in problem for problem in card_problems(bundle))
    finally:
        path.write_text(before, encoding="utf-8")
    assert _run(["card", str(bundle), "--check"]) == 0


def test_the_reference_card_would_have_been_caught() -> None:
    found = claim_problems(REFERENCE, BAICHUAN2, plan_parts(BAICHUAN2), 128, 4096)
    assert found == [
        "key-value heads: the card says 8; the model has 32",
        "tokens into the token generator's first part: the card says 128; the model has 1",
        "parameters: the card says 7.07B; the model has 7,505,973,248",
        "time to first token: 6.658 s is 32 × 0.208 s: one step multiplied, not measured; and a prompt of 4096 tokens "
        "leaves no room for an answer",
    ]
    right = REFERENCE.replace("7.07B", "7.51B").replace("heads: 8", "heads: 32").replace("6.658", "7.912")
    right = right.replace("Token generator input (part1): 128 tokens", "Token generator input (part1): 1 token")
    assert claim_problems(right, BAICHUAN2, plan_parts(BAICHUAN2), 128, 4096) == []
    # 28 layers and a hidden size of 3584 are another model's.
    other = claim_problems("28 layers, hidden 3584, split into 6 parts", BAICHUAN2, plan_parts(BAICHUAN2), 128, 4096)
    assert [problem.split(":")[0] for problem in other] == ["layers", "the hidden size", "parts"]


def test_a_foreign_card_is_held_against_the_geometry(bundle: Path, card: str, tmp_path: Path) -> None:
    foreign = tmp_path / "README.md"
    foreign.write_text(REFERENCE, encoding="utf-8")
    assert any("key-value heads: the card says 8; the model has 2" in p for p in card_problems(bundle, foreign))
    # Our own card makes the same kind of claims, and they hold without its facts too.
    foreign.write_text(card[: card.index(BLOCK)], encoding="utf-8")
    assert card_problems(bundle, foreign) == []
    foreign.write_text("# My own card\n\nA model of 12 rivers.\n", encoding="utf-8")
    (told,) = card_problems(bundle, foreign)
    assert told.startswith("nothing of the model is stated; expected a card with its layers")


def test_what_was_given_stays_and_what_is_not_ours_is_not_written_over(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = exports.copy(tmp_path / "b.bundle")
    words = ["card", str(root), "--no-plots"]
    assert _run([*words, "--license", "apache-2.0", "--languages", "en"]) == 0
    assert _run([*words, "--title", "River", "--json"]) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "# River:" in text and "license: apache-2.0" in text and "languages: English" in text
    assert check_files(root) == []
    (root / "README.md").write_text("mine\n", encoding="utf-8")
    capsys.readouterr()
    assert _run(words) == 2
    assert "was not written by headrace" in capsys.readouterr().err
    (root / "README.md").unlink()
    with pytest.raises(BundleError, match="expected a card: headrace card"):
        card_problems(root)
    with pytest.raises(UserError, match="takes no 'colour'"):
        make_card(root, {"colour": "red"})
    assert _run(["card", str(root), str(root)]) == 2


def test_bundles_side_by_side(bundle: Path, exports: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["card", "--all", str(bundle), str(exports.bundle())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| river.bundle |") and "text.txt" in lines[2]
    assert lines[3].count("–") >= 4  # nothing was measured of the other


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_example_cards_are_what_card_writes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert huggingface_hub.ModelCard(text).data.to_dict()["library_name"] == "headrace"
    assert differences(text, text) == []
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (path.parent / picture).is_file()


def test_there_is_an_example_card_of_each_kind() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)]+)/README\.md\)", table))
    assert linked == {path.parent.name for path in EXAMPLES.glob("*/README.md")} and len(linked) == 4
