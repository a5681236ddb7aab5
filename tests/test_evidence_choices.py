"""The example of multiple choice with a topic to forget: whose rows are whose, and its plan."""

import json

import pytest
from datasets import concatenate_datasets
from stored_evidence import DATA

from spul.data import MULTIPLE_CHOICE

WORDS = ["moon", "solar system"]


@pytest.fixture
def example(examples):
    import choice_rows

    return choice_rows


def query(text, gold=0, choices=("one", "two", "three")):
    return {"id": text, "query": f"Question: {text}\nAnswer:", "choices": list(choices), "gold": gold}


def sciq(i):
    wrong = {f"distractor{n}": f"wrong {n}" for n in (1, 2, 3)}
    return {"question": f"Cell {i}?", "correct_answer": f"right {i}", **wrong, "support": "Cells."}


@pytest.fixture
def folder(tmp_path):
    parts = {
        "sciq/validation": [sciq(i) for i in range(20)],
        "arc_easy/train": [query(f"Does the Moon turn {i} times?", i % 3) for i in range(10)],
        "arc_easy/test": [query("What is a moonstone?"), query("Why   IS it so?", 1)],
        "arc_challenge/train": [
            query("What is far?", 1, ["a pond", "The Solar  System", "a hill", "a road", "a town"])
        ],
        "openbookqa/train": [query("Who barks?", 0, ["a dog", "the moon", "a hill"]), query("why is it so?")],
    }
    for name, rows in parts.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_forget_rows_are_those_whose_question_or_right_answer_names_the_topic(example, folder):
    splits = example.topic_splits(example.questions(folder, 1), WORDS)
    forget = {row["question"] for name in ("train_forget", "test_forget") for row in splits[name]}
    retain = {row["question"] for name in ("train_retain", "test_retain") for row in splits[name]}
    assert forget == {"What is far?", *(f"Does the Moon turn {i} times?" for i in range(10))}
    assert retain == {"What is a moonstone?", "Why   IS it so?", *(f"Cell {i}?" for i in range(20))}
    assert sum(map(len, splits.values())) == len(forget) + len(retain)  # nobody's row twice


def test_a_question_asked_twice_keeps_its_first_choices_and_answer(example, folder):
    (found,) = [row for row in example.questions(folder, 1) if row["question"].casefold().split()[0] == "why"]
    assert found == {"question": "Why   IS it so?", "choices": ["one", "two", "three"], "answer": 1}


def test_the_shuffled_choices_of_sciq_keep_the_right_one(example, folder):
    rows = [row for row in example.questions(folder, 1) if row["question"].startswith("Cell")]
    assert [row["choices"][row["answer"]] for row in rows] == [f"right {i}" for i in range(20)]
    assert len({row["answer"] for row in rows}) > 1


def test_a_query_of_another_form_is_refused(example):
    with pytest.raises(ValueError, match="expected 'Question: "):
        example.query_row({"query": "Why?", "choices": ["a"], "gold": 0})


def test_a_row_in_two_splits_is_not_written_as_if_it_were_in_one(example, folder, tmp_path):
    splits = example.topic_splits(example.questions(folder, 1), WORDS)
    data = example.write_splits(splits, tmp_path / "whole")
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        name: len(rows) for name, rows in splits.items()
    }
    with pytest.raises(ValueError, match="repeat another or are in two splits"):
        example.write_splits(
            splits | {"train_retain": concatenate_datasets([splits["train_retain"], splits["test_forget"]])},
            tmp_path / "leaking",
        )


def test_the_plan_reads_the_folder_that_the_command_names_and_has_the_settings_chosen_on_sst2(
    example, folder, tmp_path
):
    from evidence.plan import Plan

    example.write_splits(example.topic_splits(example.questions(folder, 1), WORDS), tmp_path / "splits")
    plan = Plan.read(DATA / "choices-smollm2-plan.json")
    experiment = plan.experiment(1, "some/model", str(tmp_path / "splits"), tmp_path / "models")
    assert experiment.data.format == MULTIPLE_CHOICE
    assert experiment.rows["train_forget"]["completion"][0] in (" A", " B", " C", " D", " E")
    assert not [system.name for system in plan.systems if plan.chooses_by(system) is not None]
    chosen = json.loads((DATA / "sst2-smollm2-chosen.json").read_text())["systems"]
    sst2 = Plan.read(DATA / "sst2-plan.json")
    compared = [system for system in plan.systems if system.name in chosen]
    assert len(compared) == 4
    for system in compared:
        assert plan.settings(system, {}) == sst2.settings(sst2.system(system.name), chosen)
