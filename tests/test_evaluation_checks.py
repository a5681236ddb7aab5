"""Rows that cannot be scored are refused before anything is measured: TOFU's questions and running text, too."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from datasets import Dataset
from helpers import make_collator, make_tokenizer, rows
from small_evaluations import QUESTIONS, counted, make_model, make_splits, measured, questions

from spul.evaluation import AttackSettings

NEW = "unheard"  # a token that the models do not embed


def enlarged():
    """A collator with another model's tokenizer."""
    collator, tokenizer = make_collator(), make_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(200)] + [NEW])
    collator.tokenizer = collator.encoder.tokenizer = tokenizer
    return collator


def changed(**columns: Any) -> dict[str, Dataset]:
    return {"forget": questions("film"), "retain": Dataset.from_list([{**row, **columns} for row in QUESTIONS])}


def with_row(**columns: Any) -> dict[str, Dataset]:
    given = [dict(row) for row in make_splits()["test_retain"]]
    given[3].update(columns)
    return make_splits(test_retain=Dataset.from_list(given))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a question's token": (
        {"questions": changed(question=f"{NEW} film?"), "collator": enlarged()},
        ValueError,
        r"questions retain: the tokenizer gives a row the token id \d+, and the base has \d+ input embeddings",
    ),
    "a text's token": (
        {"unrelated_texts": ["good film", f"good film {NEW}"], "collator": enlarged()},
        ValueError,
        "unrelated_texts: the tokenizer gives a row the token id",
    ),
    "a column less": (
        {"questions": {"forget": questions("film").remove_columns("answer")}},
        ValueError,
        r"questions forget lacks the column\(s\) \['answer'\]",
    ),
    "questions of no set": ({"questions": {"forget": QUESTIONS}}, TypeError, "questions forget is a list"),
    "no questions": ({"questions": {"forget": questions("film").select([])}}, ValueError, "forget is empty"),
    "no wrong answers": ({"questions": changed(perturbed_answer=[])}, ValueError, r"retain: perturbed_answer=\[\]"),
    "a wrong answer is missing": (
        {"questions": changed(perturbed_answer=["a", None])},
        ValueError,
        "questions retain: None is among the answers of a question",
    ),
    "answers that are no texts": (
        {"questions": changed(answer=["good"])},
        ValueError,
        r"questions retain: \['good'\] is among the answers",
    ),
    "an empty question": ({"questions": changed(question=None)}, ValueError, r"no value in \['question'\]"),
    "a text is missing": ({"unrelated_texts": ["good film", None]}, TypeError, "text 1: None"),
    "one text": ({"unrelated_texts": "good film"}, TypeError, "texts is one string"),
    "half a character": ({"unrelated_texts": ["good \ud800"]}, ValueError, "half of a surrogate pair"),
    "texts without tokens": ({"unrelated_texts": ["", ""]}, ValueError, "none of 2 texts has a token to predict"),
    "a completion of white space": (
        {"splits": with_row(completion=" ")},
        ValueError,
        "test_retain: a row has an empty completion",
    ),
    "an empty completion": ({"splits": with_row(completion="")}, ValueError, "test_retain: a row has an empty"),
    "an empty prompt": ({"splits": with_row(prompt="")}, ValueError, "test_retain: the prompt of a row has no tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_refused_before_anything_is_measured(monkeypatch, name):
    options, kind, message = REFUSED[name]
    done = counted(monkeypatch)
    with pytest.raises(kind, match=message):
        measured(make_model("prompt_tuning"), "utility", "unrelated text", "questions", **options)
    assert done == []


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "neighbors without names": (
        {"neighbors": rows("near", 3)},
        TypeError,
        "neighbors is a Dataset; expected a dict",
    ),
    "a list of neighbors": ({"neighbors": [rows("near", 3)]}, TypeError, "neighbors is a list"),
    "neighbors named as a split": (
        {"neighbors": {"test_forget": rows("near", 3)}},
        ValueError,
        r"neighbors \['test_forget'\] have the name of another set",
    ),
    "neighbors named as unseen rows": (
        {"neighbors": {"unseen": rows("near", 3)}, "unseen": rows("other", 3)},
        ValueError,
        r"neighbors \['unseen'\] have the name",
    ),
    "names of questions alone": ({"questions": ["forget"]}, TypeError, "questions is a list; expected a dict"),
    "a format as text": ({"question_format": "{question}"}, TypeError, "question_format is a str"),
    "attacks as a dict": ({"attacks": {"num_rows": 3}}, TypeError, "attacks is a dict"),
    "a seed as text": ({"seed": "1"}, TypeError, "seed is a str, '1'; expected a whole number"),
    "a broken seed": ({"seed": 1.5}, TypeError, "seed is a float"),
    "a flag as seed": ({"seed": True}, TypeError, "seed is a bool"),
    "a seed below 0": ({"seed": -1}, ValueError, "seed=-1: expected a whole number from 0 to 4294967295"),
    "a seed of 33 bits": ({"seed": 2**32}, ValueError, "seed=4294967296: expected a whole number from 0"),
    "an empty path": ({"output_dir": ""}, ValueError, "output folder is empty"),
    "no list of texts": ({"unrelated_texts": None}, TypeError, "unrelated_texts is a NoneType; expected a list"),
    "a file as folder": ({"output_dir": __file__}, FileExistsError, "is a file; expected a folder"),
    "a folder in a file": ({"output_dir": f"{__file__}/out"}, FileExistsError, "is a file; expected a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_other_types_are_refused_by_name(name):
    options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        measured(make_model("prompt_tuning"), "utility", **options)


@pytest.mark.parametrize("number", [0, 1.5, True, "3", math.nan])
def test_numbers_of_attacks_are_whole(number):
    with pytest.raises(ValueError, match=rf"num_rows={number!r}: expected a whole number of at least 1"):
        AttackSettings(num_rows=number)


@pytest.mark.parametrize("name", ["turns", "document_words", "relearn_steps", "bits", "tries"])
@pytest.mark.parametrize("numbers", [4, None, (), (4, 4), (4.0,), (2.5, 8), (True,), (0, 8), "48"])
def test_numbers_of_steps_turns_and_tries_are_a_tuple_of_different_whole_ones(name, numbers):
    found = re.escape(f"{name}={numbers!r}")
    with pytest.raises(ValueError, match=f"{found}: expected a tuple of different whole numbers of at least"):
        AttackSettings(**{name: numbers})
    assert getattr(AttackSettings(**{name: [4]}), name) == [4]


def test_questions_that_are_cut_are_warned_of_before_they_are_asked(caplog):
    long = {"forget": Dataset.from_list([{**row, "question": "film " * 60} for row in QUESTIONS])}
    measured(make_model("prompt_tuning"), "utility", questions=long)
    assert "questions forget" in caplog.text
    assert "max_length" in caplog.text
