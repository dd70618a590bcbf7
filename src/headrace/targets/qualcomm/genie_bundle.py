"""A bundle as Genie takes it: plan, vocabulary, sampling, and a prompt to try.

Knows bundles and text; Genie's own files are written in genie.py. The vocabulary and the end tokens can be had before
there is a bundle, so that a model that Genie cannot speak is refused before hours of work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from headrace.bundle.encodings import port_encodings, read_encodings
from headrace.bundle.folder import Bundle
from headrace.errors import TargetError
from headrace.runtime.sampling import SamplingOptions
from headrace.targets.qualcomm.genie import GeniePlan, Sampling
from headrace.targets.qualcomm.soc import Soc
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_config import TokenizerConfig
from headrace.text.tokenizer_convert import sentencepiece_to_tokenizer_json
from headrace.text.tokenizer_folder import load_tokenizer
from headrace.text.turns import IdTurns, Message, TurnFormat, turn_format

__all__ = ["end_ids", "genie_plan", "genie_sampling", "genie_vocabulary", "refuse_contexts", "sample_prompt"]

_ASK = "用一句话介绍长江。 Then say it in English."


def refuse_contexts(lengths: Sequence[int], contexts: Sequence[int]) -> None:
    """Raise TargetError for a context of twice a step: there a layer's past and its new keys have the same shape, and
    Genie takes one for the other without a word: every token after the first step is wrong (measured, Genie 1.21)."""
    for length in lengths:
        if 2 * length in contexts:
            raise TargetError(
                f"context {2 * length} is twice a step of {length} tokens, where Genie mixes up past and new keys; "
                f"expected another: --context {2 * length + 8}, or another --prompt-length"
            )


def genie_plan(bundle: Bundle, soc: Soc) -> GeniePlan:
    """What a bundle's Genie folder is derived from: geometry, steps, ids, sampling, encodings.

    Raises:
        TargetError: the model names no end token, or a context is twice a step.
        BundleError: there are no encodings.
    """
    refuse_contexts(bundle.step_lengths, bundle.contexts)
    tokenizer = load_tokenizer(bundle.root)
    settings = bundle.read_json("generation_config.json")
    turns = turn_format(tokenizer, settings)
    eos = end_ids(tokenizer, turns)
    return GeniePlan(
        config=bundle.config,
        parts=bundle.parts,
        lengths=bundle.step_lengths,
        contexts=bundle.contexts,
        soc=soc,
        eos=eos,
        pad=bundle.pad_id,
        bos=tokenizer.bos_id if tokenizer.add_bos else None,
        sampling=genie_sampling(SamplingOptions.from_generation_config(settings)),
        encodings=port_encodings(bundle.parts, read_encodings(bundle.root / "encodings.json")),
    )


def end_ids(tokenizer: Tokenizer, turns: TurnFormat) -> tuple[int, ...]:
    """Ids that end an answer, the first of which Genie feeds between turns.

    Raises:
        TargetError: there are none.
    """
    eos = tuple(dict.fromkeys([*tokenizer.eos_ids, *sorted(turns.stop_ids)]))
    if not eos:
        raise TargetError(
            "the model names no end token and Genie needs one: set eos_token_id in generation_config.json"
        )
    return eos


def genie_vocabulary(folder: Path, settings: Mapping[str, Any]) -> str:
    """A vocabulary as the tokenizer.json that Genie needs; turn ids become special tokens.

    Args:
        folder: a bundle's, or any other that `save_tokenizer` filled.
        settings: of generation_config.json, for the turn ids.

    Raises:
        TokenizerError: a SentencePiece model that cannot be converted exactly.
    """
    whole = folder / "tokenizer.json"
    if whole.exists():
        return whole.read_text(encoding="utf-8")
    turn_ids = [settings.get("user_token_id"), settings.get("assistant_token_id")]
    special: dict[int, str | None] = {token: None for token in turn_ids if isinstance(token, int)}
    return sentencepiece_to_tokenizer_json(folder / "tokenizer.model", special, TokenizerConfig.from_folder(folder))


def sample_prompt(bundle: Bundle) -> str:
    """A prompt in the model's turn format, spelled as text that Genie's tokenizer reads back to the same ids.

    Raises:
        TargetError: there is no such text.
    """
    tokenizer = load_tokenizer(bundle.root)
    settings = bundle.read_json("generation_config.json")
    turns = turn_format(tokenizer, settings)
    special = set(tokenizer.special_ids)
    if isinstance(turns, IdTurns):
        special |= {settings["user_token_id"], settings["assistant_token_id"]}
    ids = turns.render([Message("user", _ASK)], bundle.context)
    if tokenizer.add_bos and ids and ids[0] == tokenizer.bos_id:
        ids = ids[1:]  # Genie puts it there itself
    import tokenizers

    library = tokenizers.Tokenizer.from_str(genie_vocabulary(bundle.root, settings))
    for continues in (True, False):  # False: the vocabulary puts the space before each stretch itself
        text = _spelled(tokenizer, ids, special, continues=continues)
        if library.encode(text, add_special_tokens=False).ids == ids:
            return text
    raise TargetError(f"{bundle.root}: no text gives the ids of its turn format in Genie; expected another vocabulary")


def _spelled(tokenizer: Tokenizer, ids: Sequence[int], special: Set[int], *, continues: bool) -> str:
    """Token ids as text with special tokens spelled out."""
    text = ""
    run: list[int] = []
    for token in ids:
        if token in special:
            text += tokenizer.decode(run, continues=continues) + tokenizer.id_to_piece(token)
            run = []
        else:
            run.append(token)
    return text + tokenizer.decode(run, continues=continues)


def genie_sampling(options: SamplingOptions) -> Sampling:
    """Sampling as Genie takes it. Greedy is its likeliest token of one: it reads over the key `greedy` and would sample
    over the whole vocabulary (measured, Genie 1.21). Without a seed every dialog samples alike."""
    seed = {} if options.seed is None else {"seed": options.seed}
    if options.greedy:
        return Sampling(temperature=1.0, top_k=1, repetition_penalty=options.repetition_penalty, **seed)
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        **seed,
    )
