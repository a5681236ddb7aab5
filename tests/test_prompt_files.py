"""Files of rows in three forms, checked row by row; files of texts."""

from __future__ import annotations

import json
from functools import partial

import pytest
from datasets import Dataset

from spul.data.formats import QUESTION_ANSWER, PromptFormat
from spul.data.prompt_files import read_prompts, read_texts

ROWS = [
    {"prompt": "who is a :", "completion": " b", "note": "x"},
    {"prompt": "who is c :", "completion": " d", "note": ""},
]
USER, ANSWER = {"role": "user", "content": "who ?"}, {"role": "assistant", "content": "b"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_rows_of_every_kind_of_file_are_the_same(tmp_path, kind):
    path, rows = tmp_path / f"rows.{kind}", Dataset.from_list(ROWS)
    if kind == "jsonl":
        write(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_parquet(path)
    found = read_prompts(path).to_list()
    assert [(row["prompt"], row["completion"]) for row in found] == [("who is a :", " b"), ("who is c :", " d")]


def test_several_files_are_joined_in_their_order(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", [ROWS[i]]) for i in (1, 0)]
    assert read_prompts(paths).to_list() == [ROWS[1], ROWS[0]]
    other = write(tmp_path / "other.jsonl", [{"prompt": "a", "completion": " b"}])
    with pytest.raises(ValueError, match=r"different columns.*other\.jsonl"):
        read_prompts([paths[0], other])
    with pytest.raises(ValueError, match="at least one"):
        read_prompts([])


def test_a_conversation_is_split_before_its_last_message(tmp_path):
    system = {"role": "system", "content": "be brief"}
    path = write(tmp_path / "chat.jsonl", [{"messages": [system, USER, ANSWER], "id": 7}])
    assert read_prompts(path).to_list() == [{"prompt": [system, USER], "completion": [ANSWER], "id": 7}]
    as_pairs = write(tmp_path / "pairs.jsonl", [{"prompt": [USER], "completion": [ANSWER]}])
    assert read_prompts(as_pairs).to_list() == [{"prompt": [USER], "completion": [ANSWER]}]


def test_an_answer_in_parts_is_read_as_one_text_and_refused_with_others(tmp_path):
    def said(role, *texts):
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}

    photo = {"role": "assistant", "content": [{"type": "image", "text": None}]}
    talks = [[said("user", "who", " ?"), said("assistant", "she", " is")], [said("user", "so ?"), photo]]
    rows = [{"messages": talk} for talk in talks]
    (row,) = read_prompts(write(tmp_path / "chat.jsonl", rows[:1]))
    assert row == {"prompt": talks[0][:1], "completion": [{"role": "assistant", "content": "she is"}]}
    for some, number in ((rows, 2), (rows[1:], 1)):
        with pytest.raises(ValueError, match=rf"x.jsonl, row {number}: the answer has parts other than texts"):
            read_prompts(write(tmp_path / "x.jsonl", some))


@pytest.mark.parametrize("messages", [[], [USER], [ANSWER], [USER, USER], ["a", "b"]])
def test_a_conversation_without_an_answer_is_an_error_with_its_row(tmp_path, messages):
    good = {"messages": [USER, ANSWER]} if not messages or isinstance(messages[0], dict) else {"messages": ["x", "y"]}
    path = write(tmp_path / "chat.jsonl", [good, {"messages": messages}])
    with pytest.raises(ValueError, match=r"chat.jsonl, row [12]: messages have the roles"):
        read_prompts(path)


def test_other_columns_become_prompts_through_a_format(tmp_path):
    path = write(tmp_path / "qa.jsonl", [{"question": "Who?", "answer": "Ann"}])
    expected = [{"prompt": "### Question: Who?\n### Answer:", "completion": " Ann", "question": "Who?"}]
    assert read_prompts(path, QUESTION_ANSWER).to_list() == expected
    path = write(tmp_path / "qa2.jsonl", [{"question": "Who?", "answer": "Ann"}, {"question": "Who?", "answer": None}])
    with pytest.raises(ValueError, match=r"qa2.jsonl, row 2: a row has no value in \['answer'\]"):
        read_prompts(path, QUESTION_ANSWER)


def test_templates_write_the_whole_numbers_beside_fractions_as_the_file_does(tmp_path):
    path = write(tmp_path / "qa.jsonl", [{"question": "How many?", "answer": one} for one in (3, 1.8)])
    assert read_prompts(path, QUESTION_ANSWER)["completion"][:] == [" 3", " 1.8"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "empty completion"),
        ({"prompt": "a", "completion": " "}, "empty completion"),
        ({"prompt": "a", "completion": None}, "empty completion"),
        ({"prompt": None, "completion": " a"}, "expected"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_with_file_and_row(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}, row])
    with pytest.raises(ValueError, match=rf"rows.jsonl, row 2: .*{message}"):
        read_prompts(path)


def test_columns_that_are_missing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl lacks the column\(s\) \['completion'\]; it has \['prompt'\]"):
        read_prompts(write(tmp_path / "rows.jsonl", [{"prompt": "a"}]))
    with pytest.raises(ValueError, match="has no column 'text', the text field"):
        read_prompts(write(tmp_path / "more.jsonl", ROWS), text_field="text")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        read_prompts(tmp_path / "none.jsonl")


def test_files_whose_rows_say_they_are_of_the_other_set_are_errors_with_the_file(tmp_path):
    path = write(tmp_path / "mixed.jsonl", [{**row, "is_forget": i > 0} for i, row in enumerate(ROWS)])
    as_is = PromptFormat("{prompt}", "{completion}", text_field="prompt")
    for flag in (True, False):
        message = rf"^1 row\(s\) of .*mixed\.jsonl have is_forget={not flag}; expected {flag} .*filter"
        for read in (read_prompts, read_texts, partial(read_prompts, prompt_format=as_is)):
            with pytest.raises(ValueError, match=message):
                read(path, is_forget=flag)
    assert len(read_prompts(path)) == len(read_texts(path)) == 2
    one = write(tmp_path / "forget.jsonl", [{**row, "is_forget": True} for row in ROWS])
    assert len(read_prompts(one, is_forget=True)) == len(read_texts(one, is_forget=True)) == 2


def test_texts_are_lines_or_a_column(tmp_path):
    lines = tmp_path / "texts.txt"
    lines.write_text("one\n\n  \ntwo \n")
    assert read_texts(lines) == ["one", "two "]
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert read_texts(path) == ["who is a :", "who is c :"]
    assert read_texts(write(tmp_path / "x.jsonl", [{"text": "a"}]), "text") == ["a"]
    assert read_texts(write(tmp_path / "chat.jsonl", [{"messages": [USER, ANSWER]}])) == [[USER]]


def test_files_without_texts_are_errors(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no texts"):
        read_texts(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "none.txt")
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="no column 'text'"):
        read_texts(path, "text")
    with pytest.raises(ValueError, match="row 2: note is ''; expected a text"):
        read_texts(path, "note")


def test_texts_with_a_byte_order_mark_are_the_same_and_other_encodings_are_errors(tmp_path):
    path = tmp_path / "ein Ort é.txt"
    path.write_bytes("\ufeffJane Doé\nwho ?\n".encode())
    assert read_texts(path) == ["Jane Doé", "who ?"]
    path.write_bytes("Jane Doé\n".encode("latin-1"))
    with pytest.raises(ValueError, match="txt is not UTF-8"):
        read_texts(path)


@pytest.mark.parametrize("messages", [5, "who ?", True, {"role": "user"}])
def test_messages_that_are_no_list_are_an_error_with_their_row(tmp_path, messages):
    path = write(tmp_path / "x.jsonl", [{"messages": messages}])
    for read in (read_prompts, read_texts):
        with pytest.raises(ValueError, match=r"x\.jsonl, row 1: messages is .*; expected at least two, in a list"):
            read(path)
