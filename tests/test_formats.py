"""Rows of a task as prompts and completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from datasets import Dataset

from spul import ForgetRetainCollator
from spul.data.dataset import forget_retain_dataset
from spul.data.formats import MULTIPLE_CHOICE, QUESTION_ANSWER, REFUSALS, SENTIMENT, MultipleChoiceFormat, PromptFormat

REVIEW = {"text": "a good film", "label": 1, "label_text": "positive"}
PLANET = {"question": "Which is a planet?", "choices": ["Mars", "Moon", "Sun"], "answer": 0}


def test_a_literal_review():
    assert SENTIMENT.row(REVIEW) == {
        "prompt": "### Text: a good film\n### Question: What is the sentiment of the given text?\n### Sentiment:",
        "completion": " positive",
        "text": "a good film",
    }


def test_a_literal_multiple_choice_question():
    assert MULTIPLE_CHOICE.row({**PLANET, "answer": 2, "choices": [" Moon", "Sun ", "Mars"]}) == {
        "prompt": "### Question: Which is a planet?\n### Options:\nA. Moon\nB. Sun\nC. Mars\n### Answer:",
        "completion": " C",
        "question": "Which is a planet?",
    }


def test_a_literal_free_form_question():
    assert QUESTION_ANSWER.row({"question": "Who is Jane Doe?", "answer": "A writer."}) == {
        "prompt": "### Question: Who is Jane Doe?\n### Answer:",
        "completion": " A writer.",
        "question": "Who is Jane Doe?",
    }


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_values_are_those_of_python_whatever_the_format_of_the_data_set(form):
    stars = PromptFormat("### Text: {text}\n### Stars:", completion=" {stars}")
    rows = Dataset.from_list([{"text": "good", "stars": 4.1}, {"text": "bad", "stars": 2.0}]).with_format(form)
    assert stars.apply(rows)["completion"][:] == [" 4.1", " 2.0"]
    planets = Dataset.from_list([PLANET, {**PLANET, "answer": 2}])
    assert MULTIPLE_CHOICE.apply(planets.with_format(form))[:] == MULTIPLE_CHOICE.apply(planets)[:]


@pytest.mark.parametrize("ready", [SENTIMENT, MULTIPLE_CHOICE, QUESTION_ANSWER])
def test_a_format_makes_its_collator(ready, tokenizer):
    collator = ready.collator(tokenizer, max_length=77, seed=3)
    assert collator.generic_completions == list(ready.generic_completions)
    assert all(text.startswith(" ") for text in ready.generic_completions)
    encoder = collator.encoder
    assert (encoder.text_field, encoder.max_length, collator.seed) == (ready.text_field, 77, 3)
    assert encoder.append_eos == ready.append_eos == (ready is QUESTION_ANSWER)


@pytest.mark.parametrize("ready", [SENTIMENT, QUESTION_ANSWER])
@pytest.mark.parametrize("append_eos", [False, True])
def test_what_is_given_decides_over_the_format(ready, tokenizer, append_eos):
    collator = ready.collator(tokenizer, append_eos=append_eos, generic_completions=[" none"], text_field=None)
    assert collator.encoder.append_eos == append_eos
    assert (collator.generic_completions, collator.encoder.text_field) == ([" none"], None)


def test_the_end_of_answers_and_of_refusals_is_trained_where_answers_are_free(tokenizer):
    question = QUESTION_ANSWER.row({"question": "Who is Jane Doe?", "answer": "A writer."})
    retain, forget = ({**question, "is_forget": flag, "row_id": 0} for flag in (False, True))
    batch = QUESTION_ANSWER.collator(tokenizer, max_length=200)([retain, forget])
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        trained = ids[labels != -100].tolist()
        assert trained[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in trained[:-1]
    label = SENTIMENT.collator(tokenizer, max_length=200).encoder.encode(SENTIMENT.row(REVIEW)).completion_ids
    assert tokenizer.eos_token_id not in label


def test_a_tokenizer_without_an_end_cannot_train_it(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set one, or pass append_eos=False"):
        QUESTION_ANSWER.collator(tokenizer)
    assert not QUESTION_ANSWER.collator(tokenizer, append_eos=False).encoder.append_eos


def test_refusals_are_twenty_different_ones():
    assert len({text.strip().casefold() for text in REFUSALS}) == len(REFUSALS) == 20
    assert QUESTION_ANSWER.generic_completions == REFUSALS
    assert MULTIPLE_CHOICE.generic_completions == (" None",)
    assert SENTIMENT.generic_completions == (" neutral", " unknown")


def test_apply_gives_all_rows_in_order_and_leaves_other_columns_out():
    rows = Dataset.from_list([REVIEW, {"text": "a bad plot", "label": 0, "label_text": "negative"}])
    done = SENTIMENT.apply(rows)
    assert done.column_names == ["prompt", "completion", "text"]
    assert done["completion"][:] == [" positive", " negative"]
    assert done["text"][:] == ["a good film", "a bad plot"]
    assert rows.to_list()[0] == REVIEW


def test_outer_space_of_a_text_does_not_reach_the_prompt():
    row = SENTIMENT.row({**REVIEW, "text": "  a good film \n"})
    assert row["text"] == "a good film"
    assert row["prompt"].startswith("### Text: a good film\n### Question")


def test_braces_in_a_text_stay():
    row = SENTIMENT.row({**REVIEW, "text": "a {good} film {"})
    assert "### Text: a {good} film {\n" in row["prompt"]


# ---- in a batch ----


@pytest.mark.parametrize(
    ("ready", "row", "text"),
    [
        (SENTIMENT, {"label_text": "positive"}, "text"),
        (MULTIPLE_CHOICE, {"choices": ["good", "bad"], "answer": 1}, "question"),
        (QUESTION_ANSWER, {"answer": "bad"}, "question"),
    ],
)
def test_a_collator_cuts_the_text_and_nothing_else(ready, row, text, tokenizer):
    def known(text: str) -> str:  # capitals are unknown to this tokenizer
        return tokenizer.decode(tokenizer(text)["input_ids"])

    body = " ".join(["good film"] * 40)
    rows = forget_retain_dataset(
        forget=ready.apply(Dataset.from_list([{**row, text: "jane doe " + body}])),
        retain=ready.apply(Dataset.from_list([{**row, text: body}])),
    )
    frame = ready.row({**row, text: "CUT"})["prompt"]
    before, after = frame.split("CUT")
    longest = len(tokenizer(frame)["input_ids"]) + 40
    collator = ForgetRetainCollator(tokenizer, ready.generic_completions, longest, text_field=ready.text_field)
    batch = collator.encoder.batch(list(rows))
    assert batch["input_ids"].shape[1] == longest
    start = {True: before + "jane doe good", False: before + "good film"}
    for i, is_forget in enumerate(rows["is_forget"]):
        shown = tokenizer.decode(batch["input_ids"][i][batch["labels"][i] == -100])
        assert shown.startswith(known(start[is_forget]))
        assert shown.endswith(known(after))
        assert len(shown) < len(known(rows["prompt"][i]))
        assert tokenizer.decode(batch["labels"][i][batch["labels"][i] != -100]) == known(rows["completion"][i])


def test_forget_rows_are_answered_with_the_formats_own_generic_completions(tokenizer):
    rows = forget_retain_dataset(
        forget=SENTIMENT.apply(Dataset.from_list([REVIEW])),
        retain=SENTIMENT.apply(Dataset.from_list([{**REVIEW, "text": "a bad film"}])),
    )
    collator = ForgetRetainCollator(tokenizer, SENTIMENT.generic_completions, text_field=SENTIMENT.text_field)
    seen = set()
    for _ in range(30):
        labels = collator(list(rows))["labels"]
        seen.add(tokenizer.decode(labels[0][labels[0] != -100]))
        assert tokenizer.decode(labels[1][labels[1] != -100]) == " positive"
    assert seen == set(SENTIMENT.generic_completions)


# ---- of one's own ----


def test_a_format_of_ones_own_with_other_columns():
    topics = PromptFormat(
        "### News: {body}\n### Topic:", completion=" {topic}", generic_completions=(" none",), text_field="body"
    )
    assert topics.row({"body": "Rain all week.", "topic": "weather", "page": 3}) == {
        "prompt": "### News: Rain all week.\n### Topic:",
        "completion": " weather",
        "body": "Rain all week.",
    }


def test_a_subclass_may_combine_columns():
    @dataclass(frozen=True)
    class Named(PromptFormat):
        def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
            return {**row, "text": f"{row['title']}: {row['body']}"}

    row = Named("### Text: {text}\n### Label:").row({"title": "Rain", "body": "all week", "label_text": "dull"})
    assert row == {"prompt": "### Text: Rain: all week\n### Label:", "completion": " dull", "text": "Rain: all week"}


def test_doubled_braces_of_a_template_are_written_once():
    braces = PromptFormat('{{"text": "{text}"}}\n', completion=" {label_text}")
    assert braces.row(REVIEW)["prompt"] == '{"text": "a good film"}\n'


def test_a_multiple_choice_format_with_another_template():
    short = MultipleChoiceFormat(template="{question}\n{options}\n=", completion="{letter}")
    assert short.row(PLANET)["prompt"] == "Which is a planet?\nA. Mars\nB. Moon\nC. Sun\n="
    assert short.row(PLANET)["completion"] == "A"


# ---- errors ----


def test_a_missing_column_is_named_with_those_that_are_there():
    with pytest.raises(ValueError, match=r"column\(s\) \['label_text'\]; the row has \['label', 'text'\]"):
        SENTIMENT.row({"text": "a good film", "label": 1})


def test_a_missing_column_of_a_question_is_named():
    with pytest.raises(ValueError, match=r"lacks \['answer', 'choices'\]; it has \['question'\]"):
        MULTIPLE_CHOICE.row({"question": "Which is a planet?"})


@pytest.mark.parametrize("answer", [3, -1, "A", 1.0, None])
def test_an_answer_that_is_no_place_of_a_choice_is_an_error(answer):
    with pytest.raises(ValueError, match=f"answer={answer!r} with 3 choices"):
        MULTIPLE_CHOICE.row({**PLANET, "answer": answer})


def test_more_choices_than_letters_are_an_error():
    assert MULTIPLE_CHOICE.row({**PLANET, "choices": [*map(str, range(26))], "answer": 25})["completion"] == " Z"
    with pytest.raises(ValueError, match="27 choices: expected at most 26"):
        MULTIPLE_CHOICE.row({**PLANET, "choices": [*map(str, range(27))]})


def test_a_template_without_its_text_field_is_an_error():
    with pytest.raises(ValueError, match="text_field='text' is not in the template"):
        PromptFormat("### News: {body}\n### Topic:")


@pytest.mark.parametrize(("template", "message"), [("{text} {", "malformed"), ("{text} {}", "column names")])
def test_a_malformed_template_is_an_error(template, message):
    with pytest.raises(ValueError, match=message):
        PromptFormat(template)
    with pytest.raises(ValueError, match=message):
        PromptFormat("{text}", completion=template)


@pytest.mark.parametrize("generic", [" none", ()])
def test_generic_completions_are_several_texts(generic):
    with pytest.raises(ValueError, match="expected one or more texts in a tuple"):
        PromptFormat("{text}", generic_completions=generic)


@pytest.mark.parametrize(("label", "message"), [(None, r"no value in \['label_text'\]"), ("", "empty completion")])
def test_a_row_without_an_answer_is_refused(label, message):
    with pytest.raises(ValueError, match=message):
        SENTIMENT.row({"text": "good", "label_text": label})
