"""Data sets divided into what is forgotten and what is kept."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from spul.data.clusters import TextClustering
from spul.data.splits import (
    split_by_cluster,
    split_by_entity,
    split_by_predicate,
    split_by_source,
    subsample_forget,
    train_test,
)

TEXTS = [
    "Steven Spielberg 's best film",
    "steven\n spielberg returns",
    "SPIELBERG, again!",
    "spielbergian and un-chanted",
    "Jackie Chan meets Adam Sandler",
    "the bond between them",
    "Bond, James Bond",
    "a quiet film",
]


def data(texts: list[str] = TEXTS, **columns: list) -> Dataset:
    return Dataset.from_dict({"text": texts, "number": list(range(len(texts))), **columns})


def capitalized(texts):
    """A recognizer for tests: each run of capitalized words is a name."""
    found = []
    for text in texts:
        runs: list[list[str]] = [[]]
        for word in text.replace(",", " ,").replace("!", "").split():
            if word.istitle():
                runs[-1].append(word)
            else:
                runs.append([])
        found.append([" ".join(run) for run in runs if run])
    return found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["spielberg"], [0, 1, 2]),
        (["Steven Spielberg"], [0, 1]),
        (["chan"], [4]),
        (["bond"], [5, 6]),
        (["un"], [3]),
        (["chanted", " A   quiet "], [3, 7]),
    ],
)
def test_names_match_as_whole_words_in_any_case_and_spacing(names, expected):
    split = split_by_entity(data(), names)
    assert split.forget["number"][:] == expected
    assert split.retain["number"][:] == [i for i in range(len(TEXTS)) if i not in expected]


@pytest.mark.parametrize(
    ("name", "there", "elsewhere"),
    [
        ("Agnès Varda", "AGNE\u0300S VARDA films", "agnes varda films"),  # an accent of its own, and none
        ("Groß", "mit GROSS und klein", "größe"),
        ("Жан", "снял жан.", "жанр"),
        ("राम", "यह राम है", "रामू किराम"),  # vowel signs belong to the word
        ("O'Brien", "o'brien's", "brien o'"),
        ("J.Lo", "with j.lo.", "with jxlo"),
        *(("O'Brien", f"by o{sign}brien", f"brien o{sign}") for sign in "\u2019\u2018\u02bc\u00b4`"),
        *(("Anne\u2010Marie", f"anne{sign}marie", "anne marie") for sign in "-\u2011\u2012\u2013"),
    ],
)
def test_names_match_in_any_script(name, there, elsewhere):
    assert split_by_entity(data([elsewhere, there]), [name]).forget["number"][:] == [1]


def test_a_row_naming_two_people_counts_for_both_and_overlapping_names_count_apart():
    split = split_by_entity(data(), ["sandler", "Jackie Chan", "chan", "spielberg", "CHAN"])
    assert split.report.groups == {"spielberg": 3, "sandler": 1, "Jackie Chan": 1, "chan": 1}
    assert next(iter(split.report.groups)) == "spielberg"
    assert (split.report.num_forget, split.report.num_retain) == (4, 4)


def test_all_columns_stay_and_the_data_set_is_not_changed():
    rows = data(extra=[{"a": [i]} for i in range(len(TEXTS))])
    before = rows.to_list()
    split = split_by_entity(rows, ["bond"])
    assert split.forget.to_list() == before[5:7]
    assert split.retain.to_list() == before[:5] + before[7:]
    assert rows.to_list() == before


def test_names_found_nowhere_are_reported_and_warned_of(caplog):
    split = split_by_entity(data(), ["bond", "kubrick"])
    assert split.report.unmatched == ["kubrick"]
    assert split.report.groups == {"bond": 2}
    assert "kubrick" in caplog.text
    with pytest.raises(ValueError, match=r"none of the names.*'kubrick', 'lean'"):
        split_by_entity(data(), ["kubrick", "lean"])


def test_with_names_and_a_recognizer_a_name_counts_only_where_the_recognizer_found_it():
    split = split_by_entity(data(), ["bond", "chan"], capitalized)
    assert split.forget["number"][:] == [4, 6]  # not row 5: bond is no person there
    assert split.report.groups == {"bond": 1, "chan": 1}


def test_a_recognizer_alone_forgets_all_that_it_finds():
    split = split_by_entity(data(), recognizer=capitalized)
    assert split.forget["number"][:] == [0, 4, 6]
    assert split.report.groups == {
        "Steven Spielberg": 1, "Jackie Chan": 1, "Adam Sandler": 1, "Bond": 1, "James Bond": 1
    }  # fmt: skip
    assert "5 in all" in split.report.rule
    typed_and_typeset = data(["by O'Brien", "by O\u2019Brien", "by nobody"])
    split = split_by_entity(typed_and_typeset, recognizer=capitalized)
    assert split.report.groups == {"O'Brien": 2}


def test_names_are_drawn_from_the_recognizers_by_the_seed():
    drawn = [split_by_entity(data(), recognizer=capitalized, num_names=2, seed=seed).report for seed in range(8)]
    assert all(len(report.groups) == 2 for report in drawn)
    assert len({tuple(sorted(report.groups)) for report in drawn}) > 1
    assert drawn[3] == split_by_entity(data(), recognizer=capitalized, num_names=2, seed=3).report
    with pytest.raises(ValueError, match="found 5 different"):
        split_by_entity(data(), recognizer=capitalized, num_names=6)


def test_lower_cased_text_does_not_silently_find_nobody():
    rows = data([text.lower() for text in TEXTS])
    with pytest.raises(ValueError, match=r"no name in 8 texts.*all lower case.*names=.*title_case=True"):
        split_by_entity(rows, recognizer=capitalized)
    with pytest.raises(ValueError, match=r"no name in 8 texts\.$"):
        split_by_entity(data(), recognizer=lambda texts: [[] for _ in texts])


def test_lower_cased_text_in_which_few_are_found_is_warned_of(caplog):
    class TitleCased:
        title_case = True

        def __call__(self, texts):
            return capitalized(texts)

    rows = data(["a quiet film"] * 200 + ["by Spielberg"])
    split_by_entity(rows, recognizer=TitleCased())
    split_by_entity(data(["a quiet Film"] * 200 + ["by Spielberg"]), recognizer=lambda t: [[]] * 200 + [["by"]])
    assert not caplog.records
    split_by_entity(rows, recognizer=capitalized)
    assert "only 1 of 201 texts" in caplog.text
    assert "title_case=True" in caplog.text


def test_by_entity_rejects_what_it_cannot_use():
    with pytest.raises(ValueError, match="names=, a recognizer=, or both"):
        split_by_entity(data())
    with pytest.raises(TypeError, match=r"expected a list: \['bond'\]"):
        split_by_entity(data(), "bond")
    with pytest.raises(ValueError, match="names is empty"):
        split_by_entity(data(), [])
    with pytest.raises(ValueError, match="expected names as text"):
        split_by_entity(data(), ["bond", " "])
    with pytest.raises(ValueError, match="num_names=1"):
        split_by_entity(data(), ["bond"], capitalized, num_names=1)
    with pytest.raises(ValueError, match="num_names=0"):
        split_by_entity(data(), recognizer=capitalized, num_names=0)
    with pytest.raises(TypeError, match="recognizer is a str"):
        split_by_entity(data(), recognizer="en_core_web_sm")
    with pytest.raises(ValueError, match="1 lists of names for 8 texts"):
        split_by_entity(data(), recognizer=lambda texts: [["Bond"]])
    with pytest.raises(TypeError, match="names that are no strings"):
        split_by_entity(data(), recognizer=lambda texts: [[1]] * len(texts))
    with pytest.raises(TypeError, match="text 1: None"):
        split_by_entity(data(["bond", None]), ["bond"])


@pytest.mark.parametrize(
    "split",
    [
        lambda rows, column: split_by_entity(rows, ["film"], text_field=column),
        lambda rows, column: split_by_cluster(rows, clustering(), clustering().assign(["film"]), text_field=column),
        lambda rows, column: split_by_source(rows, ["film"], column),
        lambda rows, column: split_by_predicate(rows, lambda row: True, text_field=column),
    ],
    ids=["entity", "cluster", "source", "predicate"],
)
def test_every_splitter_rejects_other_types_unknown_columns_and_empty_sets(split):
    with pytest.raises(TypeError, match="DatasetDict"):
        split(DatasetDict(train=data()), "text")
    with pytest.raises(ValueError, match=r"rows lacks the column\(s\) \['review'\]; it has \['text', 'number'\]"):
        split(data(), "review")
    with pytest.raises(ValueError, match="rows is empty"):
        split(data().select([]), "text")
    with pytest.raises(ValueError, match="retain set is empty"):
        split(data(["film", "film"]), "text")


def clustering() -> TextClustering:
    return TextClustering.fit(["film actor", "film scene", "soup pasta", "soup bread"] * 3, 2, dim=3, progress=False)


def test_by_cluster_forgets_the_rows_of_the_clusters():
    fitted = clustering()
    film, soup = (int(number) for number in fitted.assign(["film", "soup"]))
    rows = data(["a soup", "an actor", "the scene of a film", "bread", "soup, soup"])
    split = split_by_cluster(rows, fitted, [np.int64(soup)])
    assert split.forget["number"][:] == [0, 3, 4]
    assert split.report.groups == {str(soup): 3}
    with pytest.raises(ValueError, match="holds 2; expected clusters from 0 to 1"):
        split_by_cluster(rows, fitted, [film, 2])
    with pytest.raises(TypeError, match="forget_clusters is 1"):
        split_by_cluster(rows, fitted, 1)
    with pytest.raises(TypeError, match=r"expected TextClustering\.fit"):
        split_by_cluster(rows, [0, 1], [1])
    with pytest.raises(ValueError, match="none of the clusters"):
        split_by_cluster(rows.select([1, 2]), fitted, [soup])


def test_by_source_forgets_the_rows_with_the_values(caplog):
    rows = data(source=[1, 2, 3, 1, None, 2, 2, 3])
    split = split_by_source(rows, [2, None, 7])
    assert split.forget["number"][:] == [1, 4, 5, 6]
    assert split.report.groups == {"2": 3, "None": 1}
    assert split.report.unmatched == ["7"]
    assert "7" in caplog.text
    assert split_by_source(data(source=[True, False] * 4), [1]).report.groups == {"1": 4}
    with pytest.raises(ValueError, match=r"none of the sources '1'.*4 different values: 1, 2, 3, None\."):
        split_by_source(rows, ["1"])
    with pytest.raises(TypeError, match="expected a list"):
        split_by_source(rows, "alice")


def test_by_predicate_forgets_the_rows_for_which_it_is_true():
    split = split_by_predicate(data(), lambda row: row["number"] > 5, "rows after the fifth")
    assert split.forget["number"][:] == [6, 7]
    assert (split.report.rule, split.report.groups, split.report.unmatched) == ("rows after the fifth", {}, [])
    with pytest.raises(ValueError, match="forget set is empty: 0 of 8 rows are rows after the last"):
        split_by_predicate(data(), lambda row: None, "rows after the last")
    with pytest.raises(TypeError, match="predicate is a str"):
        split_by_predicate(data(), "number > 5")


def test_the_report_reads_well_and_goes_into_json():
    report = split_by_entity(data(), ["spielberg", "bond", "kubrick"]).report
    assert str(report).splitlines() == [
        "5 rows to forget, 3 to retain: rows whose column 'text' names one of 3 names",
        "rows matched: spielberg 3, bond 2",
        "found nowhere: kubrick",
        "forget: Steven Spielberg 's best film",
        "forget: steven spielberg returns",
        "forget: SPIELBERG, again!",
        "retain: spielbergian and un-chanted",
        "retain: Jackie Chan meets Adam Sandler",
        "retain: a quiet film",
    ]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["examples"]["forget"] == TEXTS[:3]


def hundred() -> Dataset:
    return data([f"{'bond' if i < 100 else 'film'} {i}" for i in range(300)])


def test_a_subsample_leaves_rows_out_of_both_sets_and_says_so():
    whole = split_by_entity(hundred(), ["bond"])
    some = subsample_forget(whole, 0.25, seed=1)
    kept = some.forget["number"][:]
    assert len(set(kept)) == 25
    assert kept == sorted(kept)
    assert max(kept) < 100
    assert kept != list(range(25))
    assert some.retain["number"][:] == list(range(100, 300))
    assert (some.report.num_forget, some.report.num_retain) == (25, 200)
    assert "75 excluded from both sets" in some.report.rule
    assert set(some.report.examples["forget"]) <= set(some.forget["text"])
    assert subsample_forget(whole, 0.25, seed=1).forget["number"][:] == kept
    assert subsample_forget(whole, 0.25, seed=2).forget["number"][:] != kept
    assert subsample_forget(whole, 1).forget["number"][:] == list(range(100))
    for fraction in (0, 1.5, -1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            subsample_forget(whole, fraction)
    with pytest.raises(ValueError, match="leaves none"):
        subsample_forget(whole, 0.001)


def test_train_and_test_parts_are_shuffled_disjoint_and_complete_for_each_group():
    split = split_by_entity(hundred(), ["bond"])
    parts = {name: rows["number"][:] for name, rows in train_test(split, 0.29, seed=3).items()}
    assert {name: len(numbers) for name, numbers in parts.items()} == {
        "train_retain": 142, "train_forget": 71, "test_retain": 58, "test_forget": 29
    }  # fmt: skip
    assert sorted(parts["train_forget"] + parts["test_forget"]) == list(range(100))
    assert sorted(parts["train_retain"] + parts["test_retain"]) == list(range(100, 300))
    assert all(numbers != sorted(numbers) for numbers in parts.values())
    again = train_test(split, 0.29, seed=3)
    assert all(again[name]["number"][:] == numbers for name, numbers in parts.items())
    assert train_test(split, 0.29, seed=4)["test_forget"]["number"][:] != parts["test_forget"]


def test_train_test_rejects_a_share_that_empties_a_part():
    split = split_by_entity(data(), ["chan"])
    with pytest.raises(ValueError, match="divides 1 forget row"):
        train_test(split)
    for fraction in (0, 1, 30):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            train_test(split, fraction)


def test_nothing_is_logged_when_all_is_found(caplog):
    with caplog.at_level(logging.DEBUG, logger="spul"):
        split_by_entity(data(), ["bond"])
    assert not caplog.records


@pytest.mark.parametrize("function", [train_test, lambda split: subsample_forget(split, 0.5)])
def test_what_is_no_split_is_refused(function):
    with pytest.raises(TypeError, match="split is a Dataset; expected a Split"):
        function(Dataset.from_list([{"text": "a"}]))


def test_of_many_names_found_nowhere_a_dozen_are_shown_and_all_are_kept(caplog):
    names = ["bond", *(f"nobody{i}" for i in range(1_000))]
    with caplog.at_level(logging.WARNING):
        split = split_by_entity(data(), names)
    assert split.report.unmatched == names[1:]
    for text in (caplog.text, str(split.report)):
        assert "nobody11, and 988 more" in text


@pytest.mark.parametrize(
    "split",
    [
        lambda rows: split_by_predicate(rows, lambda row: "dna" in row["question"]),
        lambda rows: split_by_entity(rows, ["dna"]),
        lambda rows: split_by_cluster(rows, clustering(), [0]),
    ],
    ids=["predicate", "entity", "cluster"],
)
def test_without_a_column_text_the_message_names_text_field_and_how_to_set_it(split):
    rows = Dataset.from_dict({"number": [1, 2], "question": ["what is dna", "who is jane"], "answer": ["a", "b"]})
    with pytest.raises(ValueError, match=r"The argument text_field names the column: text_field='question'"):
        split(rows)
    with pytest.raises(ValueError, match=r"The argument column names the column: column='question'"):
        split_by_source(rows, ["jane"])
