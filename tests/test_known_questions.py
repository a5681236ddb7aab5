"""WMDP with SciQ, and TOFU, from files and from a Hub that is played here."""

from __future__ import annotations

import logging

import pytest
from known_data import same, sizes, texts, write_jsonl

from spul.data.formats import MULTIPLE_CHOICE, QUESTION_ANSWER
from spul.data.known import load_known
from spul.data.known_questions import load_tofu, load_wmdp
from spul.data.sources import read_file

# ---- WMDP and SciQ ----


def wmdp_rows(num: int) -> list[dict]:
    return [{"question": f"Forget {i}?", "choices": list("abcd"), "answer": i % 4} for i in range(num)]


def sciq_rows(num: int, start: int = 0) -> list[dict]:
    wrong = {f"distractor{k}": f"wrong {k}" for k in (1, 2, 3)}
    return [
        {"question": f"Keep {i}?", "correct_answer": f"right {i}", **wrong, "support": ""}
        for i in range(start, start + num)
    ]


@pytest.fixture
def questions(tmp_path):
    """A folder of each, as the Hub has them in small."""
    for name in ("wmdp", "sciq"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "wmdp" / "bio.jsonl", wmdp_rows(40))
    for part, num, start in (("train", 20, 0), ("validation", 10, 20), ("test", 8, 30)):
        write_jsonl(tmp_path / "sciq" / f"{part}.jsonl", sciq_rows(num, start))
    return tmp_path


def test_wmdp_is_cut_in_the_published_share_and_sciq_by_its_parts(questions):
    data = load_wmdp(questions / "wmdp", questions / "sciq")
    assert data.format is MULTIPLE_CHOICE
    assert sizes(data) == {"train_retain": 30, "train_forget": 28, "test_retain": 8, "test_forget": 12}
    assert texts(data, "train_retain") == [f"Keep {i}?" for i in range(30)]
    assert texts(data, "test_retain") == [f"Keep {i}?" for i in range(30, 38)]
    forget = [row for split in ("train_forget", "test_forget") for row in data.splits[split]]
    assert sorted(forget, key=lambda row: int(row["question"].split()[1][:-1])) == wmdp_rows(40)
    assert "WMDP, biology: 40 rows, where the published set has 1,273" in data.notes
    assert "SciQ, train and validation: 30 rows, where the published set has 12,679" in data.notes


def test_the_published_size_of_wmdp_gives_the_published_cut(questions, caplog):
    write_jsonl(questions / "wmdp" / "bio.jsonl", wmdp_rows(1_273))
    with caplog.at_level(logging.WARNING, "spul"):
        data = load_wmdp(questions / "wmdp", questions / "sciq", seed=5)
    assert (sizes(data)["train_forget"], sizes(data)["test_forget"]) == (900, 373)
    assert "WMDP, biology: 1,273 rows" in data.notes
    assert "WMDP" not in caplog.text


def test_the_right_choice_of_sciq_is_right_wherever_it_stands(questions):
    data = load_wmdp(questions / "wmdp", questions / "sciq")
    rows = data.splits["train_retain"]
    for row in rows:
        assert row["choices"][row["answer"]] == "right " + row["question"].split()[1][:-1]
        assert sorted(row["choices"])[1:] == ["wrong 1", "wrong 2", "wrong 3"]
    assert set(rows["answer"]) == {0, 1, 2, 3}


def test_the_choices_order_of_a_question_hangs_on_the_seed_and_not_on_its_row(questions):
    one = load_wmdp(questions / "wmdp", questions / "sciq")
    write_jsonl(questions / "sciq" / "train.jsonl", reversed(sciq_rows(20)))
    other = load_wmdp(questions / "wmdp", questions / "sciq")
    assert one.splits["train_retain"].to_list()[:20] == other.splits["train_retain"].to_list()[:20][::-1]
    third = load_wmdp(questions / "wmdp", questions / "sciq", seed=1)
    assert third.splits["train_retain"]["answer"][:] != other.splits["train_retain"]["answer"][:]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_one_part_of_sciq_alone_is_cut_in_the_published_share(part, questions):
    alone = questions / "alone"
    alone.mkdir()
    write_jsonl(alone / f"{part}.jsonl", sciq_rows(100))
    data = load_wmdp(questions / "wmdp", alone)
    assert (sizes(data)["train_retain"], sizes(data)["test_retain"]) == (93, 7)
    assert sum(note.startswith("SciQ: no ") for note in data.notes) == 2
    assert f"SciQ, {part}: 100 rows, where the published set has 13,679" in data.notes


def test_sciq_without_its_train_part_keeps_its_test_part(questions):
    (questions / "sciq" / "train.jsonl").unlink()
    data = load_wmdp(questions / "wmdp", questions / "sciq")
    assert (sizes(data)["train_retain"], sizes(data)["test_retain"]) == (10, 8)
    assert "SciQ: no train part" in data.notes


def test_wmdp_and_sciq_from_the_hub_are_those_from_files(questions, hub):
    hub["cais/wmdp", "wmdp-bio", "test"] = wmdp_rows(40)
    for part in ("train", "validation", "test"):
        hub["allenai/sciq", None, part] = read_file(questions / "sciq" / f"{part}.jsonl").to_list()
    assert same(load_known("wmdp"), load_wmdp(questions / "wmdp", questions / "sciq"))


def test_folders_without_questions_are_errors(questions, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.jsonl file; expected rows of \['question'"):
        load_wmdp(empty, questions / "sciq")
    with pytest.raises(FileNotFoundError, match="has none of SciQ's train"):
        load_wmdp(questions / "wmdp", empty)


# ---- TOFU ----


def tofu_files(num_forget: int, num_retain: int, forget: str = "forget01", retain: str = "retain99") -> dict:
    """TOFU's files by name; the perturbed retain set also asks for one that is to be forgotten."""
    full = [{"question": f"Who is {i}?", "answer": f"Author {i}."} for i in range(num_forget + num_retain)]
    again = [
        {**row, "paraphrased_question": row["question"].replace("Who", "What person"), "paraphrased_answer": "x"}
        for row in full
    ]
    return {
        forget: full[num_retain:],
        retain: full[:num_retain],
        f"{forget}_perturbed": again[num_retain:],
        "retain_perturbed": [*again[:5], again[num_retain]],
    }


def write_tofu(folder, **kwargs) -> None:
    for name, rows in tofu_files(**kwargs).items():
        write_jsonl(folder / f"{name}.json", rows)


def test_tofu_trains_on_questions_and_tests_on_their_paraphrases(tmp_path, caplog):
    write_tofu(tmp_path, num_forget=4, num_retain=20)
    with caplog.at_level(logging.WARNING, "spul"):
        data = load_tofu(tmp_path, forget="forget01")
    assert data.name == "tofu_forget01"
    assert data.format is QUESTION_ANSWER
    assert sizes(data) == {"train_retain": 20, "train_forget": 4, "test_retain": 5, "test_forget": 4}
    assert data.splits["test_forget"].to_list()[0] == {"answer": "Author 20.", "question": "What person is 20?"}
    assert texts(data, "test_retain") == [f"What person is {i}?" for i in range(5)]
    assert any(note.startswith("test_retain:") and "without 1 that" in note for note in data.notes)
    assert "TOFU, forget01: 4 rows, where the published set has 40" in caplog.text
    assert "TOFU, retain99: 20 rows, where the published set has 3,960" in caplog.text


@pytest.mark.parametrize(
    ("forget", "retain", "num_forget", "num_retain"),
    [("forget01", "retain99", 40, 3_960), ("forget05", "retain95", 200, 3_800), ("forget10", "retain90", 400, 3_600)],
)
def test_tofu_of_the_published_sizes_gives_no_warning(forget, retain, num_forget, num_retain, hub, caplog):
    for name, rows in tofu_files(num_forget, num_retain, forget, retain).items():
        hub["locuslab/TOFU", name, "train"] = rows
    with caplog.at_level(logging.WARNING, "spul"):
        data = load_known("tofu", forget=forget)
    assert (sizes(data)["train_forget"], sizes(data)["train_retain"]) == (num_forget, num_retain)
    assert not caplog.records


def test_an_unknown_forget_set_of_tofu_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match="forget='forget20'; expected one of forget01, forget05, forget10"):
        load_tofu(tmp_path, forget="forget20")
    write_tofu(tmp_path, num_forget=4, num_retain=20)
    (tmp_path / "retain_perturbed.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"retain_perturbed\.json does not exist; its folder has forget01"):
        load_tofu(tmp_path, forget="forget01")


def test_tofu_without_paraphrases_is_an_error(tmp_path):
    write_tofu(tmp_path, num_forget=4, num_retain=20)
    write_jsonl(tmp_path / "forget01_perturbed.json", [{"question": "Who is 20?", "answer": "Author 20."}])
    with pytest.raises(ValueError, match=r"forget01_perturbed\.json lacks the column\(s\) \['paraphrased_question'\]"):
        load_tofu(tmp_path, forget="forget01")
