"""The example that writes tasks for lm-evaluation-harness: its rows and its YAML, without the harness."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from helpers import build, make_tokenizer

from spul import ForgetRetainCollator
from spul.evaluation.metrics import response_likelihoods
from spul.evaluation.metrics.scoring import score_completions

EXAMPLES = Path(__file__).parents[1] / "examples"
GENERIC = [" neutral", " unknown"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lm_eval_task

    return lm_eval_task


def reviews() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"review {c} :", "completion": (" positive", " negative")[i % 2]} for i, c in enumerate("abcd")]
    )


def test_choices_are_the_labels_and_the_generic_completions_and_the_answer_is_the_rows_own(example):
    rows = example.choice_rows(reviews(), GENERIC)
    assert [row["prompt"] for row in rows] == reviews()["prompt"]
    assert all(row["choices"] == [" negative", " positive", *GENERIC] for row in rows)
    assert [row["choices"][row["answer"]] for row in rows] == reviews()["completion"]


def test_a_generic_answer_that_is_a_label_too_is_one_choice(example):
    rows = example.choice_rows(reviews(), [" positive", " unknown"])
    assert rows[0]["choices"] == [" negative", " positive", " unknown"]


def test_free_form_rows_have_their_own_answer_and_the_generic_ones(example):
    rows = Dataset.from_list([{"prompt": f"who {i} ?", "completion": f" number {i}"} for i in range(40)])
    for i, row in enumerate(example.choice_rows(rows, GENERIC)):
        assert row == {"prompt": f"who {i} ?", "choices": [f" number {i}", *GENERIC], "answer": 0}


def test_the_likeliest_choice_is_what_score_completions_counts(example):
    """Labels of one token each, of the tokens that the model likes best: then both rules agree."""
    tokenizer, model = make_tokenizer(), build("llama")
    collator = ForgetRetainCollator(tokenizer, GENERIC, max_length=48)
    rows, said = reviews(), []
    for prompt in rows["prompt"]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said.append(tokenizer.decode(model(ids).logits[0, -1].argmax()))
    said[0] = " good" if said[0] != " good" else " bad"  # one row is answered wrongly
    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c in zip(rows["prompt"], said, strict=True)])
    right = []
    for row in example.choice_rows(rows, []):
        each = Dataset.from_list([{"prompt": row["prompt"], "completion": choice} for choice in row["choices"]])
        found = [likelihood.log_probs.sum() for likelihood in response_likelihoods(model, each, collator.encoder)]
        right.append(max(range(len(found)), key=found.__getitem__) == row["answer"])
    assert right[0] is False
    assert sum(right) / len(right) == score_completions(model, rows, collator)["accuracy"] > 0


def test_the_script_writes_a_task_for_each_group_that_finds_its_rows_from_anywhere(example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("forget", "retain"):
        rows = reviews() if name == "forget" else reviews().select([0])
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--generic", " unknown", "--output-dir", "out"]
    monkeypatch.setattr(sys, "argv", ["lm_eval_task.py", *options])
    example.main()
    for name, num_rows in (("spul_forget", 4), ("spul_retain", 1)):
        task = yaml.safe_load((tmp_path / "out" / f"{name}.yaml").read_text())
        data = Path(task["dataset_kwargs"]["data_files"][task["test_split"]])
        assert task["task"] == name
        assert data.is_absolute()
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        assert len(rows) == num_rows
        columns = {task[f"doc_to_{part}"] for part in ("text", "choice", "target")}
        assert all(row.keys() == columns and row["choices"][-1] == " unknown" for row in rows)
        assert task["target_delimiter"] == "", "the completions bring their own space"


def test_without_files_it_takes_the_quick_starts_test_rows(example, monkeypatch, tmp_path):
    from toy_reviews import make_splits

    monkeypatch.setattr(sys, "argv", ["lm_eval_task.py", "--output-dir", str(tmp_path)])
    example.main()
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "spul_forget.jsonl").read_text().splitlines()]
    assert prompts == make_splits(0)["test_forget"]["prompt"]


def test_rows_that_are_no_task_raise_and_write_nothing(example, tmp_path):
    chat = [{"role": "user", "content": "film"}]
    with pytest.raises(ValueError, match="rows is empty"):
        example.write_task("t", reviews().select([]), GENERIC, tmp_path / "out")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['completion'\]"):
        example.write_task("t", reviews().remove_columns("completion"), GENERIC, tmp_path / "out")
    with pytest.raises(ValueError, match="chat template"):
        example.write_task("t", Dataset.from_list([{"prompt": chat, "completion": chat}]), GENERIC, tmp_path / "out")
    with pytest.raises(ValueError, match="expected text in both"):
        example.write_task("t", Dataset.from_list([{"prompt": "a :", "completion": " "}]), GENERIC, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_of_the_files_is_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval_task.py", "--forget", "forget.jsonl"])
    with pytest.raises(SystemExit):
        example.main()
    assert "go together" in capsys.readouterr().err
