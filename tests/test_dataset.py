"""Joining a forget set and a retain set."""

from __future__ import annotations

import re

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Value, load_from_disk

from spul.data.dataset import forget_retain_dataset, hold_out

FORGET = [
    {"prompt": "a film about jane:", "completion": " positive", "stars": 5},
    {"prompt": "a plot about jane:", "completion": " negative", "stars": 1},
]
RETAIN = [
    {"prompt": "a film about doe:", "completion": " positive", "stars": 4},
    {"prompt": "a plot about doe:", "completion": " negative", "stars": 2},
    {"prompt": "bad text:", "completion": " negative", "stars": 0},
]


def rows(*prompts: str) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "completion": " positive"} for prompt in prompts])


def message(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


def test_rows_are_joined_forget_first_flagged_and_numbered():
    joined = forget_retain_dataset(Dataset.from_list(FORGET), Dataset.from_list(RETAIN))
    assert joined.to_list() == [{**row, "is_forget": i < 2, "row_id": i} for i, row in enumerate([*FORGET, *RETAIN])]


def test_columns_of_one_set_only_are_carried_along():
    joined = forget_retain_dataset(
        Dataset.from_list([{**row, "person": "jane"} for row in FORGET]), Dataset.from_list(RETAIN)
    )
    assert joined["person"][:] == ["jane", "jane", None, None, None]
    assert joined["stars"][:] == [5, 1, 4, 2, 0]


def test_the_sets_given_are_not_changed():
    forget, retain = Dataset.from_list(FORGET), Dataset.from_list(RETAIN)
    forget_retain_dataset(forget, retain)
    assert forget.to_list() == FORGET
    assert retain.to_list() == RETAIN


def test_row_ids_of_the_sets_are_numbered_anew():
    forget = Dataset.from_list([{**row, "row_id": 7} for row in FORGET])
    joined = forget_retain_dataset(forget, Dataset.from_list(RETAIN))
    assert joined["row_id"][:] == [0, 1, 2, 3, 4]


def test_weights_are_a_column_in_which_other_rows_have_1():
    forget, retain = Dataset.from_list(FORGET), Dataset.from_list(RETAIN)
    assert "sampling_weight" not in forget_retain_dataset(forget, retain).column_names
    joined = forget_retain_dataset(forget, retain, retain_weight=[3, 0.5, np.float32(1)])
    assert joined["sampling_weight"][:] == [1.0, 1.0, 3.0, 0.5, 1.0]
    assert joined.remove_columns("sampling_weight").to_list() == forget_retain_dataset(forget, retain).to_list()


def test_weights_of_the_sets_own_column_stay_unless_others_are_given():
    forget, retain = Dataset.from_list(FORGET), Dataset.from_list(RETAIN).add_column("sampling_weight", [2, 3, 4])
    joined = forget_retain_dataset(forget, retain)
    assert joined["sampling_weight"][:] == [1.0, 1.0, 2.0, 3.0, 4.0]
    parts = [joined.filter(lambda row, flag=flag: row["is_forget"] == flag) for flag in (True, False)]
    assert forget_retain_dataset(*parts).to_list() == joined.to_list()
    assert forget_retain_dataset(*parts, retain_weight=[1, 1, 7])["sampling_weight"][:] == [1.0, 1.0, 1.0, 1.0, 7.0]


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), None, True, "2"])
def test_a_weight_that_is_no_number_above_0_is_refused_by_its_row(bad):
    with pytest.raises(ValueError, match=re.escape(f"row 1 of the retain set has the weight {bad!r}; expected a num")):
        forget_retain_dataset(Dataset.from_list(FORGET), Dataset.from_list(RETAIN), retain_weight=[1, bad, 2])


@pytest.mark.parametrize("given", [3.0, [1.0], [1.0] * 4, "abc"])
def test_weights_that_are_not_one_for_each_retain_row_are_refused(given):
    with pytest.raises(ValueError, match=r"retain_weight is .*; expected 3 numbers above 0"):
        forget_retain_dataset(Dataset.from_list(FORGET), Dataset.from_list(RETAIN), retain_weight=given)


def test_conversational_rows_are_joined_as_they_are():
    forget = [{"prompt": message("user", "who is jane?"), "completion": message("assistant", "an actor")}]
    retain = [{"prompt": message("user", "who is doe?"), "completion": message("assistant", "a writer")}]
    joined = forget_retain_dataset(Dataset.from_list(forget), Dataset.from_list(retain))
    assert joined["prompt"][:] == [forget[0]["prompt"], retain[0]["prompt"]]
    assert joined["completion"][:] == [forget[0]["completion"], retain[0]["completion"]]
    assert joined["is_forget"][:] == [True, False]


def test_sets_from_disk_shuffled_selected_and_split_are_joined(tmp_path):
    Dataset.from_list(RETAIN).save_to_disk(tmp_path / "retain")
    retain = load_from_disk(tmp_path / "retain").shuffle(seed=3)
    forget = DatasetDict(train=Dataset.from_list(FORGET))["train"].select([1])
    joined = forget_retain_dataset(forget, retain)
    assert joined["prompt"][:] == ["a plot about jane:", *retain["prompt"][:]]
    assert sorted(joined["prompt"][1:]) == sorted(row["prompt"] for row in RETAIN)
    assert joined["is_forget"][:] == [True, False, False, False]
    assert joined["row_id"][:] == [0, 1, 2, 3]


def test_the_joined_set_survives_disk_and_shuffle_with_its_row_ids(tmp_path):
    joined = forget_retain_dataset(Dataset.from_list(FORGET), Dataset.from_list(RETAIN))
    joined.save_to_disk(tmp_path / "joined")
    again = load_from_disk(tmp_path / "joined").shuffle(seed=1)
    assert again["row_id"][:] != [0, 1, 2, 3, 4]
    assert sorted(again.to_list(), key=lambda row: row["row_id"]) == joined.to_list()


# ---- what is refused ----


@pytest.mark.parametrize("name", ["forget", "retain"])
@pytest.mark.parametrize("kind", [list, DatasetDict])
def test_something_other_than_a_dataset_is_refused_with_its_type(name, kind):
    wrong = FORGET if kind is list else DatasetDict(train=rows("a"))
    sets = {"forget": rows("a"), "retain": rows("b"), name: wrong}
    with pytest.raises(TypeError, match=f"{name} is a {kind.__name__}; expected a datasets.Dataset") as error:
        forget_retain_dataset(**sets)
    assert "Dataset.from_list([{'prompt': ..., 'completion': ...}, ...])" in str(error.value)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_missing_columns_are_named_with_those_that_are_there(name):
    sets = {"forget": rows("a"), "retain": rows("b"), name: Dataset.from_dict({"text": ["a"], "prompt": ["b"]})}
    with pytest.raises(ValueError, match=rf"{name} lacks the column\(s\) \['completion'\]; it has \['text', 'p"):
        forget_retain_dataset(**sets)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_conversations_in_messages_are_refused_with_what_makes_rows_of_them(name):
    messages = [*message("user", "who is jane?"), *message("assistant", "an actor")]
    talks = Dataset.from_list([{"messages": messages}])
    sets = {"forget": rows("a"), "retain": rows("b"), name: talks}
    with pytest.raises(ValueError, match="Split the conversations: ") as error:
        forget_retain_dataset(**sets)
    recipe = re.search(r"rows(\.map\(.*\)); spul", str(error.value))[1]
    made = eval(f"talks{recipe}")
    joined = forget_retain_dataset(
        made,
        Dataset.from_list([{"prompt": messages[:1], "completion": messages[1:]}]).map(
            lambda row: {"prompt": message("user", "b")}
        ),
    )
    assert joined[0]["prompt"] == messages[:1]
    assert joined[0]["completion"] == messages[1:]


@pytest.mark.parametrize(("name", "flag"), [("forget", True), ("retain", False)])
def test_rows_that_say_they_are_of_the_other_set_are_refused_with_their_number_and_what_splits_them(name, flag):
    mixed = rows("c", "d", "e").add_column("is_forget", [flag, not flag, not flag])
    sets = {"forget": rows("a"), "retain": rows("b"), name: mixed}
    with pytest.raises(
        ValueError, match=rf"^2 row\(s\) of {name} have is_forget={not flag}; expected {flag} "
    ) as error:
        forget_retain_dataset(**sets)
    recipe = re.search(r"column: (forget = rows.*), (retain = rows.*)\.$", str(error.value))
    parts: dict[str, Dataset] = {}
    for line in recipe.groups():
        exec(line, {"rows": mixed}, parts)
    assert {side: part["is_forget"][:] for side, part in parts.items()} == {
        "forget": [True] * (1 if flag else 2),
        "retain": [False] * (2 if flag else 1),
    }
    assert len(forget_retain_dataset(**parts)) == 3


def test_a_flag_of_a_set_that_is_none_is_refused():
    with pytest.raises(
        ValueError, match=r"row 0 of retain has is_forget='no'; expected True or False.* or drop the column"
    ):
        forget_retain_dataset(rows("a"), rows("b").add_column("is_forget", ["no"]))


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_an_empty_set_is_refused(name):
    empty = Dataset.from_dict({"prompt": [], "completion": []})
    with pytest.raises(ValueError, match=f"{name} is empty; expected at least one row"):
        forget_retain_dataset(**{"forget": rows("a"), "retain": rows("b"), name: empty})


@pytest.mark.parametrize("name", ["forget", "retain"])
@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_empty_completions_are_counted_and_the_first_ones_shown(name, empty):
    bad = Dataset.from_list(
        [{"prompt": f"row {i}", "completion": empty if i in (1, 3, 4, 6) else " positive"} for i in range(8)]
    )
    with pytest.raises(ValueError, match=rf"^4 row\(s\) of the {name} set have an empty completion: row 1: ") as error:
        forget_retain_dataset(**{"forget": rows("a"), "retain": rows("b"), name: bad})
    text = str(error.value)
    assert "row 3: " in text
    assert "row 4: " in text
    assert "row 6: " not in text


@pytest.mark.parametrize("completion", [[], message("assistant", " "), message("assistant", None)])
def test_an_empty_answer_in_a_conversation_is_refused(completion):
    forget = Dataset.from_list(
        [
            {"prompt": message("user", "who?"), "completion": message("assistant", "jane")},
            {"prompt": message("user", "why?"), "completion": completion},
        ]
    )
    with pytest.raises(ValueError, match=r"1 row\(s\) of the forget set have an empty completion: row 1: "):
        forget_retain_dataset(forget, forget.select([0]))


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_missing_prompt_is_refused_with_its_row(name):
    bad = rows("x", "y", "z").map(lambda row: {"prompt": None if row["prompt"] == "y" else row["prompt"]})
    with pytest.raises(ValueError, match=rf"1 row\(s\) of the {name} set have a prompt that cannot be used: row 1: "):
        forget_retain_dataset(**{"forget": rows("a"), "retain": rows("b"), name: bad})


def test_an_empty_conversation_is_refused():
    bad = Dataset.from_list(
        [
            {"prompt": message("user", "who?"), "completion": message("assistant", "jane")},
            {"prompt": [], "completion": message("assistant", "jane")},
        ]
    )
    with pytest.raises(ValueError, match="a prompt that cannot be used: row 1: "):
        forget_retain_dataset(bad, rows("b"))


def test_a_row_that_mixes_text_and_messages_is_refused():
    bad = Dataset.from_list([{"prompt": "who is jane?", "completion": message("assistant", "an actor")}])
    with pytest.raises(ValueError, match=r"cannot be used: row 0: .*strings, or both lists of \{'role', 'content'\}"):
        forget_retain_dataset(bad, rows("b"))
    bad = Dataset.from_list([{"prompt": message("user", "who is jane?"), "completion": "an actor"}])
    with pytest.raises(ValueError, match=r"cannot be used: row 0: .*strings, or both lists of \{'role', 'content'\}"):
        forget_retain_dataset(bad, rows("b"))


@pytest.mark.parametrize("prompt", ["who is jane?", message("user", "who is jane?")])
@pytest.mark.parametrize("completion", [1, 0, ["an actor"]])
def test_a_completion_that_is_neither_text_nor_messages_is_refused_with_its_row(prompt, completion):
    bad = Dataset.from_list([{"prompt": prompt, "completion": completion}])
    with pytest.raises(ValueError, match=r"1 row\(s\) of the forget set .*row 0: .*who is jane"):
        forget_retain_dataset(bad, rows("b"))


def test_text_in_one_set_and_messages_in_the_other_are_refused():
    talk = Dataset.from_list([{"prompt": message("user", "who?"), "completion": message("assistant", "jane")}])
    with pytest.raises(ValueError, match=r"prompt is Value\('string'\) and .*'role'.* Make them"):
        forget_retain_dataset(rows("a"), talk)


def test_a_column_of_another_type_in_each_set_is_named_with_both_types():
    forget = Dataset.from_list([{"prompt": "jane?", "completion": " yes", "source": 1}])
    retain = Dataset.from_list([{"prompt": "film?", "completion": " no", "source": "2"}])
    with pytest.raises(ValueError, match=r"source is Value\('int64'\) and Value\('string'\)\. Make them alike"):
        forget_retain_dataset(forget, retain)
    assert forget_retain_dataset(forget, retain.cast_column("source", Value("int64")))["source"][:] == [1, 2]


@pytest.mark.parametrize("source", [None, "a text", [1]])
def test_a_column_of_structs_in_one_set_alone_is_named_with_both_types(source):
    forget = Dataset.from_list([{"prompt": "jane?", "completion": " yes", "source": source}])
    retain = Dataset.from_list([{"prompt": "film?", "completion": " no", "source": {"page": 1}}])
    with pytest.raises(ValueError, match=r"source is .* and \{'page': Value\('int64'\)\}\. Make them alike"):
        forget_retain_dataset(forget, retain)


def test_prompts_in_both_sets_are_counted_and_the_first_ones_shown():
    forget, retain = rows("a", "b", "c", "d", "e"), rows("x", "e", "d", "c", "b", "b")
    with pytest.raises(ValueError, match=r"^4 prompt\(s\) are in both sets") as error:
        forget_retain_dataset(forget, retain)
    text = str(error.value)
    assert "forget row 1 = retain row 4: 'b'" in text
    assert "forget row 2 = retain row 3: 'c'" in text
    assert "forget row 3 = retain row 2: 'd'" in text
    assert "forget row 4" not in text


def test_a_conversation_in_both_sets_is_refused():
    talk = Dataset.from_list([{"prompt": message("user", "who?"), "completion": message("assistant", "jane")}])
    with pytest.raises(ValueError, match=r"1 prompt\(s\) are in both sets.*forget row 0 = retain row 0"):
        forget_retain_dataset(talk, talk)


def test_a_prompt_that_a_transform_makes_in_both_sets_is_refused():
    def asked(batch):
        return {**batch, "prompt": [s + p for s, p in zip(batch["system"], batch["prompt"], strict=True)]}

    forget, retain = (
        rows("b", "c").add_column("system", ["a ", "b "]),
        rows("d", "b").add_column("system", ["c ", "a "]),
    )
    with pytest.raises(ValueError, match=r"1 prompt\(s\) are in both sets .*: forget row 0 = retain row 1: 'a b'\."):
        forget_retain_dataset(forget.with_transform(asked), retain.with_transform(asked))


def test_the_same_prompt_twice_in_one_set_is_no_error():
    joined = forget_retain_dataset(rows("a", "a"), rows("b", "b"))
    assert joined["prompt"][:] == ["a", "a", "b", "b"]


def test_long_rows_are_shown_shortened():
    forget = Dataset.from_list([{"prompt": "x" * 5000, "completion": ""}])
    with pytest.raises(ValueError, match="empty completion") as error:
        forget_retain_dataset(forget, rows("b"))
    assert len(str(error.value)) < 400


def test_prompts_of_one_hash_are_compared_as_texts(monkeypatch):
    monkeypatch.setattr("spul.data.dataset.hash", lambda text: 7, raising=False)
    assert len(forget_retain_dataset(rows("a", "b"), rows("c", "a "))) == 4
    with pytest.raises(ValueError, match=r"1 prompt\(s\) are in both sets .*: forget row 1 = retain row 0: 'b'\."):
        forget_retain_dataset(rows("a", "b"), rows("b", "c", "b"))


# ---- rows held out ----


def numbered(name, num):
    return Dataset.from_list([{"prompt": f"{name} {i}", "completion": " yes", "n": i} for i in range(num)])


def test_rows_are_held_out_by_side_and_the_others_stay_as_they_are():
    dataset = forget_retain_dataset(numbered("jane", 10), numbered("film", 40), retain_weight=[2.0] * 40)
    _, forget, retain = parts = hold_out(dataset, 0.25)
    assert [len(part) for part in parts] == [37, 3, 10]  # 2.5 of the forget rows, rounded up
    assert set(forget["is_forget"]) == {True}
    assert set(retain["is_forget"]) == {False}
    together = sorted(row["row_id"] for part in parts for row in part)
    assert together == list(range(50))
    for part in parts:
        assert part.column_names == dataset.column_names
        assert part["row_id"] == sorted(part["row_id"])
        assert all(row == dataset[row["row_id"]] for row in part)


def test_the_draw_is_that_of_the_seed():
    dataset = forget_retain_dataset(numbered("jane", 20), numbered("film", 40))
    one, same, other = (hold_out(dataset, 0.2, seed).retain["row_id"][:] for seed in (1, 1, 2))
    assert one == same != other


def test_a_repeated_prompt_is_in_one_part_alone():
    repeated = Dataset.from_list([{"prompt": f"film {i % 5}", "completion": f" {i}"} for i in range(30)])
    held = hold_out(forget_retain_dataset(numbered("jane", 4), repeated), 0.4)
    assert len(held.retain) == 12
    assert not set(held.train["prompt"]) & set(held.retain["prompt"])


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), True, "0.1", None])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="expected a number above 0 and below 1"):
        hold_out(forget_retain_dataset(numbered("jane", 4), numbered("film", 4)), share)


def test_a_part_that_would_be_empty_is_refused():
    dataset = forget_retain_dataset(numbered("jane", 4), numbered("film", 40))
    with pytest.raises(ValueError, match=r"share=0.1 of the 4 different forget prompt\(s\) leaves a part empty"):
        hold_out(dataset, 0.1)
    with pytest.raises(ValueError, match="leaves a part empty"):
        hold_out(dataset, 0.99)


def test_rows_without_sides_or_texts_are_refused():
    with pytest.raises(ValueError, match="is_forget"):
        hold_out(numbered("film", 9), 0.3)
    with pytest.raises(TypeError, match="dataset is a list"):
        hold_out([{"prompt": "a", "completion": "b", "is_forget": True}], 0.3)


def test_rewritten_rows_are_refused_since_a_held_out_rows_copy_could_be_trained_on():
    dataset = forget_retain_dataset(rows("a", "b"), rows("c", "d"))
    given = dataset.add_column("rewritten_by", [None, "capitals", None, None])
    with pytest.raises(ValueError, match=r"1 row.* of dataset are rewritten.* hold rows out first"):
        hold_out(given, 0.5)
