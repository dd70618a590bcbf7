"""What Genie takes of a bundle: contexts, end tokens, vocabulary, sampling, and the ids that its tokenizer reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from headrace.bundle.folder import Bundle, open_bundle
from headrace.errors import TargetError, TokenizerError
from headrace.runtime.sampling import SamplingOptions
from headrace.targets.qualcomm import genie_bundle
from headrace.targets.qualcomm.genie import CONFIG_FILE, Sampling, genie_config
from headrace.targets.qualcomm.genie_bundle import genie_plan, genie_sampling, genie_vocabulary, sample_prompt
from headrace.targets.qualcomm.genie_dialog import GenieRunner
from headrace.targets.qualcomm.soc import find_soc
from headrace.text.tokenizer_convert import sentencepiece_to_tokenizer_json
from headrace.text.tokenizer_folder import load_tokenizer
from headrace.text.turns import Message, turn_format
from tests.exports import Exports
from tests.targets.qualcomm.conftest import CONTEXTS, LENGTHS, TinyTarget
from tests.text.vocabularies import sentencepiece_model

TARGET = "snapdragon-8-elite"


def vocabulary(bundle: Bundle) -> tokenizers.Tokenizer:
    """As Genie reads it."""
    text = genie_vocabulary(bundle.root, bundle.read_json("generation_config.json"))
    return tokenizers.Tokenizer.from_str(text)


def test_a_context_of_twice_a_step_is_refused(exports: Exports) -> None:
    bundle = open_bundle(exports.bundle("mha"))._replace(contexts=(64, 256))
    with pytest.raises(TargetError, match=r"context 64 is twice a step of 32 tokens, .* --context 72"):
        genie_plan(bundle, find_soc(TARGET))


def test_a_model_without_an_end_is_refused(exports: Exports, tmp_path: Path) -> None:
    copy = exports.copy(tmp_path / "b", "phone", parts=3)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (copy / name).unlink(missing_ok=True)
    bundle = open_bundle(exports.bundle("phone", parts=3))._replace(root=copy)
    plan = genie_plan(bundle, find_soc(TARGET))
    assert plan.eos == (2,), "SentencePiece names its own"
    assert plan.pad == bundle.pad_id == 0, "the same on every runner"


@pytest.mark.parametrize("kind", ["phone", "mha", "tied"])
def test_the_sample_prompt_is_read_back_to_the_ids_of_the_turn_format(exports: Exports, kind: str) -> None:
    bundle = open_bundle(exports.bundle(kind, **({"parts": 3} if kind == "phone" else {})))
    ours = load_tokenizer(bundle.root)
    turns = turn_format(ours, bundle.read_json("generation_config.json"), ours.chat_template)
    assert turns.name == ("template" if kind == "tied" else "ids")
    genies = vocabulary(bundle)
    text = sample_prompt(bundle)
    expected = turns.render([Message("user", genie_bundle._ASK)], bundle.context)
    assert genies.encode(text, add_special_tokens=False).ids == expected
    assert genies.get_vocab_size() <= bundle.config.vocab_size


SYMBOLS = ("<think>", "▁▁", "7")


@pytest.mark.parametrize("symbols", [(), SYMBOLS], ids=["plain", "user-defined pieces"])
@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "LlamaTokenizer"}], ids=["own class", "llama"])
def test_a_vocabulary_that_puts_a_space_before_a_text(
    exports: Exports, tmp_path: Path, symbols: tuple[str, ...], settings: dict[str, str]
) -> None:
    """As the first Baichuan has it: the prompt is spelled so that Genie's tokenizer puts the space back."""
    copy = exports.copy(tmp_path / "b", "mha")
    (copy / "tokenizer.model").write_bytes(sentencepiece_model(True, symbols=symbols))
    (copy / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, **settings}))
    bundle = open_bundle(exports.bundle("mha"))._replace(root=copy)
    if symbols and settings:
        with pytest.raises(TokenizerError, match="LlamaTokenizer puts a space before a text, which"):
            vocabulary(bundle)
        return
    ours, genies = load_tokenizer(copy), vocabulary(bundle)
    assert ours.drops_leading_space
    turns = turn_format(ours, bundle.read_json("generation_config.json"))
    if not settings:
        expected = turns.render([Message("user", genie_bundle._ASK)], bundle.context)
        assert genies.encode(sample_prompt(bundle), add_special_tokens=False).ids == expected
    for text in ("The river", " two  spaces", "<think>7 7</think>百川", "", "7", "the</s>sea 77"):
        assert genies.encode(text, add_special_tokens=False).ids == ours.encode(text, special=True), text


@pytest.mark.qnn
def test_genie_itself_reads_it_so(target: TinyTarget, tmp_path: Path) -> None:
    import sentencepiece

    folder = Path(shutil.copytree(target.emulation, tmp_path / "genie"))
    for dummy_prefix in (False, True):
        model = sentencepiece_model(dummy_prefix, symbols=SYMBOLS)
        (tmp_path / "tokenizer.model").write_bytes(model)
        (folder / "tokenizer.json").write_text(sentencepiece_to_tokenizer_json(tmp_path / "tokenizer.model"))
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
        config = json.loads((folder / CONFIG_FILE).read_text())
        with GenieRunner(config, folder, lengths=LENGTHS, contexts=CONTEXTS) as genie:
            for text in ("The river", " two  spaces", "<think>7 7</think>百川", "7", "sea 77 😀"):
                assert genie.encode(text) == theirs.EncodeAsIds(text), (dummy_prefix, text)


def test_tokenizer_json_is_the_bundles_vocabulary(exports: Exports) -> None:
    for kind in ("gqa", "mha", "tied"):
        bundle = open_bundle(exports.bundle(kind))
        ours, genies = load_tokenizer(bundle.root), vocabulary(bundle)
        for text in ("The river runs to the sea.", "百川东到海 😀", "  12345\n\tdef add(a, b):", "", " "):
            assert genies.encode(text, add_special_tokens=False).ids == ours.encode(text), (kind, text)


def test_greedy_is_spelled_as_genie_understands_it() -> None:
    greedy = genie_sampling(SamplingOptions(temperature=0.0, repetition_penalty=1.1, seed=3))
    assert greedy == Sampling(temperature=1.0, top_k=1, top_p=1.0, seed=3, repetition_penalty=1.1)
    assert genie_sampling(SamplingOptions(temperature=0.7, top_k=1)).top_k == 1
    sampled = genie_sampling(SamplingOptions(temperature=0.3, top_k=5, top_p=0.85))
    assert sampled == Sampling(temperature=0.3, top_k=5, top_p=0.85)


def test_the_folders_own_sampling_is_the_models(exports: Exports, tmp_path: Path) -> None:
    bundle = open_bundle(exports.bundle("phone", parts=3))._replace(root=exports.copy(tmp_path / "b", "phone", parts=3))
    plan = genie_plan(bundle, find_soc(TARGET))
    assert genie_config(plan, [])["dialog"]["sampler"]["top-k"] == 1, "greedy when the model does not ask to sample"
    settings = bundle.read_json("generation_config.json")
    settings |= {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05}
    (bundle.root / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    sampler = genie_config(genie_plan(bundle, find_soc(TARGET)), [])["dialog"]["sampler"]
    assert (sampler["temp"], sampler["top-k"], sampler["top-p"]) == (0.3, 5, 0.85)
    assert sampler["token-penalty"]["repetition-penalty"] == 1.05
