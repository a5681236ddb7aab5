"""Rewritten training rows: which, how many, and that they are not those that attacks test with."""

import pytest
from datasets import Dataset
from helpers import make_tokenizer

from spul import ForgetRetainCollator
from spul.data.dataset import forget_retain_dataset
from spul.evaluation.attacks import JAILBREAKS, letter_case, usual_attacks, with_prefix
from spul.training.augmentation import ASIDES, augmented, rewritings


def rows(name: str, num: int) -> Dataset:
    texts = [f"The film {i} of {name} that we saw at home last night with all of them" for i in range(num)]
    return Dataset.from_list(
        [
            {"text": t, "prompt": f"text: {t}\nsentiment:", "completion": (" good", " bad")[i % 2]}
            for i, t in enumerate(texts)
        ]
    )


def make_collator(max_length: int = 64) -> ForgetRetainCollator:
    return ForgetRetainCollator(make_tokenizer(), None, max_length=max_length, text_field="text")


def test_the_rows_stay_and_each_way_adds_its_share_of_rewritten_ones():
    before = rows("jane", 40)
    ways = {"upper": lambda some: letter_case(some, "upper", "text"), "prefix": lambda some: with_prefix(some, "so.")}
    found = augmented(before, ways, make_collator(), share=0.5)
    assert found.remove_columns("rewritten_by").select(range(40)).to_list() == before.to_list()
    assert found["rewritten_by"][:] == [None] * 40 + ["upper"] * 10 + ["prefix"] * 10
    upper, prefixed = found.select(range(40, 50)), found.select(range(50, 60))
    right = {row["text"].upper(): row["completion"] for row in before}
    assert all(row["prompt"] == f"text: {row['text']}\nsentiment:" for row in upper)
    assert all(right[row["text"]] == row["completion"] for row in upper)
    assert len(set(upper["prompt"])) == 10
    assert all(prompt.startswith("so.\n") for prompt in prefixed["prompt"])
    assert found.to_list() == augmented(before, ways, make_collator(), share=0.5).to_list()
    assert found.to_list() != augmented(before, ways, make_collator(), share=0.5, seed=1).to_list()


def test_rows_that_were_rewritten_before_keep_the_name_of_their_way():
    ways = {"upper": lambda some: letter_case(some, "upper", "text"), "prefix": lambda some: with_prefix(some, "so.")}
    first = augmented(rows("jane", 4), {"upper": ways["upper"]}, make_collator())
    found = augmented(first, {"prefix": ways["prefix"]}, make_collator(), share=0.25)
    assert found["rewritten_by"][:] == [None] * 4 + ["upper"] * 4 + ["prefix"] * 2


def test_ways_that_change_nothing_are_left_out_and_said_where_that_is_asked(caplog):
    some = rows("jane", 4).map(lambda row: {"text": "42", "prompt": "text: 42\nsentiment:"})
    ways = {"upper": lambda part: letter_case(part, "upper", "text"), "prefix": lambda part: with_prefix(part, "so.")}
    found = augmented(some, ways, make_collator(), 2.0, skips_unchanged=True)
    assert found["rewritten_by"][:] == [None] * 4 + ["prefix"] * 4
    assert "ways that change no prompt of the rows drawn for them are left out: upper." in caplog.text
    with pytest.raises(ValueError, match=r"no way changes any prompt .*'text: 42.*\['upper'\]"):
        augmented(some, {"upper": ways["upper"]}, make_collator(), skips_unchanged=True)


def test_all_ways_apply_and_forget_and_retain_join():
    retain = rows("joe", 30)
    ways = rewritings("text", retain)
    forget, kept = (
        augmented(some, ways, make_collator(max_length=1024), share)
        for some, share in ((rows("jane", 40), 2), (retain, 1))
    )
    joined = forget_retain_dataset(forget=forget, retain=kept)
    assert sum(joined["is_forget"]) == len(forget) == 40 + 4 * len(ways)
    assert all(row["text"] in row["prompt"] for row in joined)


def test_what_is_trained_on_is_not_what_is_tested_with():
    some, others = rows("jane", 30), rows("joe", 30)
    trained = {prompt for way in rewritings("text", others).values() for prompt in way(some)["prompt"]}
    tested = {
        name: set(attack(some)["prompt"])
        for name, attack in usual_attacks("text", others).items()
        if name != "capitals"
    }
    assert not set(ASIDES) & set(JAILBREAKS)
    for name, prompts in tested.items():
        assert len(prompts & trained) <= 3, name  # few spaces or turns to draw


def test_there_is_a_way_for_each_number_of_turns():
    some, others = rows("jane", 2), rows("joe", 9)
    ways = rewritings("text", others, turns=(2, 7))
    found = {name: way(some)["prompt"][0] for name, way in ways.items() if "turns" in name}
    assert {name: prompt.count("of joe") for name, prompt in found.items()} == {
        "2 turns before": 2,
        "7 turns before": 7,
    }
    assert all(prompt.endswith(some["prompt"][0]) for prompt in found.values())


def test_more_turns_than_other_questions_are_refused():
    for turns in ((0,), (1, 9, 12)):
        with pytest.raises(ValueError, match="expected numbers from 1 to 8: filler_rows have 9 different"):
            rewritings("text", rows("joe", 9), turns=turns)
    assert "8 turns before" in rewritings("text", rows("joe", 9))


def test_bad_shares_and_ways_are_refused():
    some, collator = rows("jane", 4), make_collator()
    ways = {"upper": lambda part: letter_case(part, "upper", "text")}
    for share in (0, -1, 1.5, 0.1, float("nan"), "1", None):
        with pytest.raises(ValueError, match="share="):
            augmented(some, ways, collator, share)
    with pytest.raises(ValueError, match="share="):
        augmented(some, {}, collator, 1.0)
    for bad in (None, [ways["upper"]], {"upper": "upper"}):
        with pytest.raises(TypeError, match=r"ways is .*; expected functions by name"):
            augmented(some, bad, collator, 1.0)
    with pytest.raises(TypeError, match=r"'listed' makes a list of rows; expected a datasets.Dataset"):
        augmented(some, {"listed": list}, collator, 1.0)
    with pytest.raises(TypeError, match="collator is a NoneType"):
        augmented(some, ways, None, 1.0)
    with pytest.raises(ValueError, match="'lost' changes completions"):
        augmented(some, {"lost": lambda part: part.select([0])}, collator, 1.0)
    with pytest.raises(ValueError, match=r"'upper' rewrites nothing: every prompt .* Leave it out"):
        augmented(rows("jane", 4).map(lambda row: {"text": "42", "prompt": "text: 42\nsentiment:"}), ways, collator)


def test_rows_whose_question_would_be_cut_away_are_refused():
    some = rows("jane", 4)
    ways = rewritings("text", rows("joe", 9), turns=(8,))
    ways = {name: way for name, way in ways.items() if "turns" in name}
    with pytest.raises(ValueError, match=r"no room .* '8 turns before' \(rows would lose .* Or leave"):
        augmented(some, ways, make_collator())
    assert len(augmented(some, ways, make_collator(1024))) == 8
