"""The four splits of a task: rows, limits, and the check of what would spoil an experiment."""

from __future__ import annotations

import pytest
from datasets import Dataset
from known_data import review, reviews, same, sizes, small, texts

from spul.data.formats import MULTIPLE_CHOICE, SENTIMENT, PromptFormat
from spul.data.unlearning_data import SPLITS, UnlearningData, row_keys, without_repeats


def test_rows_are_in_prompt_completion_form():
    row = small().rows("test_retain")[1]
    assert row == SENTIMENT.row(review("test_retain two"))
    with pytest.raises(ValueError, match="split='dev'; expected one of train_retain"):
        small().rows("dev")


def test_the_training_set_is_the_two_train_splits_forget_first():
    rows = small().training_set()
    assert rows["text"][:] == ["train_forget one", "train_forget two", "train_retain one", "train_retain two"]
    assert rows["is_forget"][:] == [True, True, False, False]
    assert rows["row_id"][:] == [0, 1, 2, 3]


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_whose_rows_say_that_they_are_of_the_other_side_is_refused(split):
    is_forget = split.endswith("forget")
    for flag in (is_forget, not is_forget):
        rows = small().splits[split]
        data = small(**{split: rows.add_column("is_forget", [flag] * len(rows))})
        if flag == is_forget:
            data.check()
            assert len(data.rows(split)) == len(rows)
            continue
        for use in (data.check, lambda data=data: data.rows(split)):
            with pytest.raises(ValueError, match=rf"^2 row\(s\) of {split} of .* have is_forget={flag}; expected"):
                use()


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_splits_in_another_format_are_checked_and_drawn_as_plain_ones(form):
    stars = PromptFormat("### Text: {text}\n### Stars:", completion=" {stars}", generic_completions=(" 4.1",))
    splits = {
        split: Dataset.from_list([{"text": f"{split} {i}", "stars": i + 0.2} for i in range(4)]) for split in SPLITS
    }
    formatted = {split: rows.with_format(form) for split, rows in splits.items()}
    plain, data = UnlearningData("stars", splits, stars), UnlearningData("stars", formatted, stars)
    data.check()
    assert data.training_set()[:] == plain.training_set()[:]
    assert row_keys(data.splits["test_forget"], stars) == row_keys(splits["test_forget"], stars)
    preferred = data.limited(1, prefer=lambda row: row["stars"] == 3.2)
    assert preferred.rows("train_retain")["completion"][:] == [" 3.2"]
    known = Dataset.from_list([{"text": "known", "stars": 4.1}]).with_format(form)
    with pytest.raises(ValueError, match=r"row 0 of test_forget .* has the completion ' 4\.1', one of the format's"):
        UnlearningData("stars", {**formatted, "test_forget": known}, stars).check()


def test_limited_draws_retain_rows_and_leaves_forget_rows():
    data = small(
        train_retain=reviews(*(f"r{i}" for i in range(50))), test_retain=reviews(*(f"t{i}" for i in range(40)))
    )
    less = data.limited(num_retain=20, num_test=10, seed=1)
    assert sizes(less) == {"train_retain": 20, "train_forget": 2, "test_retain": 10, "test_forget": 2}
    assert len(set(texts(less, "train_retain"))) == 20
    assert set(texts(less, "train_retain")) < set(texts(data, "train_retain"))
    assert texts(less, "train_retain") != texts(data, "train_retain")[:20]
    assert same(less, data.limited(20, 10, seed=1))
    assert not same(less, data.limited(20, 10, seed=2))
    assert less.notes == (
        "made here",
        "train_retain: a random 20 of 50 rows (seed 1)",
        "test_retain: a random 10 of 40 rows (seed 1)",
    )
    assert sizes(data)["train_retain"] == 50


def test_limited_keeps_certain_rows_first():
    data = small(train_retain=reviews(*(f"{'jane' if i % 10 == 0 else 'doe'} {i}" for i in range(50))))
    less = data.limited(num_retain=8, prefer=lambda row: "jane" in row["text"])
    assert sum("jane" in text for text in texts(less, "train_retain")) == 5
    assert sizes(less)["train_retain"] == 8
    assert less.notes[-1] == "train_retain: a random 8 of 50 rows (seed 0), 5 of them from the 5 preferred"
    few = data.limited(num_retain=3, prefer=lambda row: "jane" in row["text"])
    assert all("jane" in text for text in texts(few, "train_retain"))
    assert few.notes[-1].endswith("3 of them from the 5 preferred")


def test_limits_above_the_size_leave_all_rows_and_say_so():
    less = small().limited(num_retain=9)
    assert sorted(texts(less, "train_retain")) == ["train_retain one", "train_retain two"]
    assert less.notes[-1] == "train_retain: a random 2 of 2 rows (seed 0)"


def test_limits_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="a maximum of 0 rows for test_retain"):
        small().limited(num_test=0)
    with pytest.raises(ValueError, match="pass num_retain"):
        small().limited(num_test=1, prefer=lambda row: True)


def test_a_forget_fraction_leaves_the_rest_in_no_split():
    data = small(train_forget=reviews(*(f"f{i}" for i in range(40))))
    half = data.with_forget_fraction(0.25, seed=3)
    assert sizes(half) == {"train_retain": 2, "train_forget": 10, "test_retain": 2, "test_forget": 2}
    assert set(texts(half, "train_forget")) < set(texts(data, "train_forget"))
    assert half.notes[-1] == "train_forget: a random 10 of 40 rows (seed 3); the rest is in no split"
    assert same(half, data.with_forget_fraction(0.25, seed=3))
    assert not same(half, data.with_forget_fraction(0.25, seed=4))


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, 0.1])
def test_a_forget_fraction_that_leaves_nothing_or_too_much_is_an_error(fraction):
    with pytest.raises(ValueError, match="of the 2 rows of train_forget"):
        small().with_forget_fraction(fraction)


def test_sound_data_pass():
    small().check()


def test_a_missing_and_an_empty_split_are_errors():
    with pytest.raises(ValueError, match="expected"):
        UnlearningData("half", {"train_retain": reviews("a"), "train_forget": reviews("b")}, SENTIMENT).check()
    with pytest.raises(ValueError, match="test_forget of small is empty"):
        small(test_forget=reviews("x").select([])).check()


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("train_retain", "train_forget", "forgotten and retained"),
        ("train_retain", "test_forget", "forgotten and retained"),
        ("train_forget", "test_retain", "forgotten and retained"),
        ("test_retain", "test_forget", "forgotten and retained"),
        ("train_retain", "test_retain", "trained on and tested as unseen"),
        ("train_forget", "test_forget", "trained on and tested as unseen"),
    ],
)
def test_a_row_in_two_splits_is_an_error_that_shows_it(one, other, what):
    data = small(**{one: reviews("alone", "shared "), other: reviews("shared", "by itself")})
    with pytest.raises(ValueError, match=f"1 row.* in both {one} and {other} and would be {what} at once: 'shared'"):
        data.check()


def test_the_same_question_with_other_choices_is_another_row_but_not_with_shuffled_ones():
    def question(*choices: str) -> Dataset:
        return Dataset.from_list([{"question": "Which is true?", "choices": list(choices), "answer": 0}])

    splits = {split: question("a", "b", split) for split in SPLITS}
    UnlearningData("questions", splits, MULTIPLE_CHOICE).check()
    splits["test_retain"] = question("train_forget", "b", "a")
    with pytest.raises(ValueError, match="in both train_forget and test_retain"):
        UnlearningData("questions", splits, MULTIPLE_CHOICE).check()


def test_a_label_that_is_generic_as_well_is_an_error():
    rows = Dataset.from_list([{"text": "so so", "label": 2, "label_text": "Neutral"}])
    with pytest.raises(ValueError, match="row 0 of test_retain of small has the completion ' Neutral'"):
        small(test_retain=rows).check()


def test_a_row_without_text_is_an_error():
    with pytest.raises(ValueError, match="row 1 of train_retain of small has no text"):
        small(train_retain=reviews("fine", "  ")).check()


def test_columns_that_the_format_lacks_are_an_error():
    with pytest.raises(ValueError, match="label_text"):
        small(train_retain=Dataset.from_list([{"text": "a", "label": 0}])).check()


def test_a_text_field_that_a_format_makes_is_checked_as_it_is_made():
    class Titled(PromptFormat):
        def fields(self, row):
            return {**row, "text": f"{row['title']}: {row['body']}"}

    def rows(name):
        return Dataset.from_list([{"title": name, "body": "good", "label_text": "positive"}])

    splits = {split: rows(split) for split in SPLITS}
    data = UnlearningData("titled", splits, Titled("### {text} ###"))
    data.check()
    assert data.training_set()["prompt"][:] == ["### train_forget: good ###", "### train_retain: good ###"]
    with pytest.raises(ValueError, match="train_forget and test_forget"):
        UnlearningData("titled", {**splits, "test_forget": rows("train_forget")}, data.format).check()


def test_several_questions_about_one_context_are_several_rows():
    asked = PromptFormat("{context}\n{question}", completion=" {answer}", text_field="context")

    def rows(split):
        return Dataset.from_list(
            [{"context": "a long story", "question": f"{split} {i}?", "answer": "yes"} for i in range(3)]
        )

    data = UnlearningData("stories", {split: rows(split) for split in SPLITS}, asked)
    data.check()
    kept, notes = without_repeats(data.splits, asked)
    assert [len(kept[split]) for split in SPLITS] == [3, 3, 3, 3]
    assert notes == []
