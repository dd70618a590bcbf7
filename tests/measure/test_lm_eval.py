"""The real lm-evaluation-harness over a bundle: every item's choice, and its accuracy, are our own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.language_model import load
from headrace.measure.choices import answer_subject
from headrace.measure.item_sets import SETS, open_set
from headrace.measure.questions import following
from headrace.model.fidelity import log_softmax
from tests.exports import Exports
from tests.measure.test_item_sets import CHOICES

pytestmark = [pytest.mark.lm_eval, pytest.mark.filterwarnings("default")]  # the harness's own dependencies warn

COLUMNS = ["question", "A", "B", "C", "D", "answer"]
SHOTS = 1


def write_task(folder: Path, name: str, subject: Any) -> str:
    """A subject as a local task of the harness: the published prompts, spelled in its own YAML."""
    chosen = SETS[name]
    task = f"own_{name}_{subject.name}"
    files = {}
    for split, items in (("dev", subject.examples), ("test", subject.items)):
        files[split] = str(folder / f"{task}_{split}.csv")
        with Path(files[split]).open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            rows.writerows((i.question, *i.options, "ABCD"[i.answer]) for i in items)
    introduction = chosen.introduction(subject.name)
    options = "".join(f"\\n{letter}. {{{{{letter}}}}}" for letter in "ABCD")
    (folder / f"{task}.yaml").write_text(
        f"""task: {task}
dataset_path: csv
dataset_kwargs: {{data_files: {{dev: "{files["dev"]}", test: "{files["test"]}"}}}}
test_split: test
fewshot_split: dev
num_fewshot: {SHOTS}
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
description: "{introduction}\\n\\n"
doc_to_text: "{chosen.opening}{{{{question}}}}{options}\\n{chosen.asking}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(answer)}}}}"
target_delimiter: "{chosen.answer_prefix}"
fewshot_delimiter: "\\n\\n"
metric_list:
  - metric: acc
""",
        encoding="utf-8",
    )
    return task


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    import lm_eval.tasks

    import headrace.measure.lm_eval  # noqa: F401  (registers the model)

    def run(bundle: Path, runner: str, tasks: list[str]) -> dict[str, Any]:
        result: dict[str, Any] = lm_eval.simple_evaluate(
            model="headrace",
            model_args={"bundle": str(bundle), "runner": runner},
            tasks=tasks,
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
        return result

    return run


@pytest.mark.parametrize("runner", ["host", pytest.param("native", marks=pytest.mark.kernels)])
def test_every_choice_is_our_own(exports: Exports, harness: Any, tmp_path: Path, runner: str) -> None:
    bundle = exports.bundle("tied", context=512)
    subjects = {}
    for name in SETS:
        _, found = open_set(name, CHOICES)
        for subject in found[:2]:
            subjects[write_task(tmp_path, name, subject)] = (SETS[name], subject)
    result = harness(bundle, runner, list(subjects))
    with load(bundle, runner=runner) as model:
        for task, (chosen, subject) in subjects.items():
            own = answer_subject(chosen, subject, model.encode_raw, following(model), model.context - 1, shots=SHOTS)
            samples = sorted(result["samples"][task], key=lambda s: s["doc_id"])
            theirs = np.array([[float(option[0][0]) for option in s["resps"]] for s in samples])
            np.testing.assert_allclose(theirs, own.log_likelihoods, atol=0.05)
            assert theirs.argmax(1).tolist() == own.chosen.tolist()
            assert [int(s["target"]) for s in samples] == own.answers.tolist()
            assert result["results"][task]["acc,none"] == pytest.approx(own.right.mean())


def test_rolling_and_generation(exports: Exports, harness: Any) -> None:
    from lm_eval.api.instance import Instance

    from headrace.measure.lm_eval import HeadraceLM

    bundle = exports.bundle("tied", context=512)
    lm = HeadraceLM(bundle=str(bundle), batch_size=1)
    model = lm.model
    text = "百川东到海，何时复西归？ The river goes east."
    (total,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = [lm.prefix_token_id, *model.tokenizer.encode(text)]
    rows = log_softmax(model.logits(ids[:-1]))
    assert total == pytest.approx(rows[np.arange(len(rows)), ids[1:]].sum(), rel=1e-3)
    long = text * 40  # several windows
    (many,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (long,), 0)])
    assert len(model.tokenizer.encode(long)) > 2 * model.context
    assert many < 20 * total
    kwargs = {"until": ["\n\n"], "max_gen_toks": 8}
    (answer,) = lm.generate_until([Instance("generate_until", {}, (text, kwargs), 0)])
    own = "".join(t.text for t in model.generate(text, max_tokens=8, stop=["\n\n"], temperature=0))
    assert answer == own
    model.close()
