"""Files to rows, and what is wrong with them said."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from known_data import write_jsonl, write_tsv

from spul.data.known import load_known
from spul.data.known_reviews import load_sst2
from spul.data.sources import read_file


def test_a_missing_file_is_an_error_that_lists_what_is_there(tmp_path):
    write_tsv(tmp_path / "dev.tsv", ("sentence", "label"), [("a film", 1)])
    with pytest.raises(FileNotFoundError, match=r"train\.tsv does not exist; its folder has dev\.tsv"):
        load_sst2(tmp_path)


def test_a_folder_in_place_of_a_file_is_an_error_that_lists_what_is_in_it(tmp_path):
    write_tsv(tmp_path / "dev.tsv", ("sentence", "label"), [("a film", 1)])
    with pytest.raises(FileNotFoundError, match=r"is a folder; expected a file: it has dev\.tsv"):
        read_file(tmp_path)


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.parquet"])
def test_columns_of_one_name_are_an_error(tmp_path, name):
    path = tmp_path / name
    if name == "x.parquet":
        columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
        pq.write_table(pa.Table.from_arrays(columns, names=["prompt", "prompt", "completion"]), path)
    else:
        lines = "prompt,prompt,completion\na,b,c\n"
        path.write_text(lines.replace(",", "\t") if name == "x.tsv" else lines, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name} has more than one column 'prompt'; expected a name for each"):
        read_file(path)


@pytest.mark.parametrize("name", ["sst2", "imdb", "yelp", "wmdp", "tofu"])
def test_a_missing_folder_is_an_error(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* is not a folder; expected one with"):
        load_known(name, tmp_path / "nowhere")


def test_a_missing_column_is_an_error_that_names_path_found_and_expected(tmp_path):
    write_tsv(tmp_path / "train.tsv", ("text", "label"), [("a film", 1)])
    with pytest.raises(ValueError, match=r"train\.tsv lacks .*'sentence'.*it has \['text', 'label'\], expected"):
        load_sst2(tmp_path)


def test_a_line_of_another_width_is_an_error_that_numbers_it(tmp_path):
    write_tsv(tmp_path / "x.tsv", ("sentence", "label"), [("a film", 1), ("a\tfilm", 1)])
    with pytest.raises(ValueError, match=r"x\.tsv, line 3: 3 values; expected 2"):
        read_file(tmp_path / "x.tsv")


def test_only_a_line_feed_ends_a_line_of_a_tsv_and_quotes_are_text(tmp_path):
    write_tsv(tmp_path / "x.tsv", ("sentence", "label"), [('a "film\r \u2028\x85 of', 1), ('bad"', 0)])
    assert read_file(tmp_path / "x.tsv")["sentence"][:] == ['a "film\r \u2028\x85 of', 'bad"']


def test_rows_of_json_with_different_columns_are_an_error(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"a": 1, "b": 2}, {"a": 1}])
    with pytest.raises(ValueError, match=r"x\.jsonl, row 2: found \['a'\]; expected the columns of the first"):
        read_file(tmp_path / "x.jsonl")


def test_json_may_be_a_list_or_lines(tmp_path):
    rows = [{"a": "x\ny", "b": [1, 2]}, {"a": "z", "b": []}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    write_jsonl(tmp_path / "lines.json", rows)
    assert read_file(tmp_path / "list.json").to_list() == read_file(tmp_path / "lines.json").to_list() == rows
    (tmp_path / "list.json").write_text("\n " + json.dumps(rows))
    assert read_file(tmp_path / "list.json").to_list() == rows


@pytest.mark.parametrize(
    ("written", "found"),
    [
        *(
            (["7", "-1"], [7, -1]),
            (["0.5", "2.0"], [0.5, 2.0]),
            (["True", "False"], [True, False]),
            (["7", ""], [7, None]),
        ),
        *((texts, texts) for texts in (["007", "8"], ["1e3", "2"], ["0x10", "2"], ["true", "false"], ["0.50", "1"])),
        *((texts, texts) for texts in (["NA", "7"], ["x", "NaN"])),
    ],
)
def test_values_of_a_csv_are_texts_unless_python_writes_them_as_the_file_does(written, found, tmp_path):
    (tmp_path / "x.csv").write_text("id,a\n" + "".join(f"x,{one}\n" for one in written))
    assert read_file(tmp_path / "x.csv")["a"][:] == found


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (["3", "-7"], [3, -7]),
        (["0.5", "2.0", "null"], [0.5, 2.0, None]),
        (["true", "false", "null"], [True, False, None]),
        (["3", "1.8", "null"], ["3", "1.8", None]),
        (["1.8", "9007199254740993"], ["1.8", "9007199254740993"]),  # 2**53 + 1, which is no float
        (["[1, 2.5]", "[]"], [["1", "2.5"], []]),
        (["[1]", "[2.5, null]"], [["1"], ["2.5", None]]),
        (["[0.5]", "[2.5]"], [[0.5], [2.5]]),
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_whole_numbers_and_fractions_in_one_column_of_json_are_texts(written, found, name, tmp_path):
    rows = [f'{{"id": "x", "a": {one}}}' for one in written]
    (tmp_path / name).write_text("\n".join(rows) if name == "x.jsonl" else f"[{', '.join(rows)}]")
    column = read_file(tmp_path / name, as_written=True)["a"][:]
    assert column == found
    assert [type(one) for one in column] == [type(one) for one in found]


@pytest.mark.parametrize("written", [["1.5", "true"], ["true", "3"], ["[1.5]", "[true]"]])
def test_booleans_and_numbers_in_one_column_of_json_are_an_error_with_the_row(written, tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"a": {one}}}\n' for one in written))
    with pytest.raises(ValueError, match=r"x\.jsonl, row 2: a is \[?(True|3)\]?; expected either numbers or true and"):
        read_file(tmp_path / "x.jsonl", as_written=True)


def test_numbers_of_json_are_numbers_where_no_template_writes_them(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"sampling_weight": 0.5}\n{"sampling_weight": 3}\n')
    assert read_file(tmp_path / "x.jsonl")["sampling_weight"][:] == [0.5, 3.0]


def test_a_column_is_forget_of_a_csv_is_read_in_any_case(tmp_path):
    (tmp_path / "x.csv").write_text("a,is_forget\nx,true\ny,FALSE\n")
    assert read_file(tmp_path / "x.csv")["is_forget"][:] == [True, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.json",
            "{",
            r"x\.json, line 1, is not JSON \(Expecting .*, character 2\); expected a row a line, or a list",
        ),
        ("x.jsonl", '{"a": 1}\n\n{"a": "b', r"line 3, is not JSON \(Unterminated string starting at, character 7\)"),
        ("x.json", '[{"a": 1},\n{"a" 2}]', "line 2, is not JSON"),
        ("x.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "has more than one column 'a'"),
        ("x.jsonl", "null\n", "row 1: found None; expected values by column"),
        ("x.jsonl", "", "is empty"),
        ("x.txt", "a", "ends in one of .tsv"),
    ],
)
def test_files_that_cannot_be_read_are_errors(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", b'[{"a": "x"}]'),
        ("x.jsonl", b'{"a": "x"}\n'),
        ("x.csv", b"a\nx\n"),
        ("x.tsv", b"a\nx\n"),
        ("x.tsv.gz", b"a\nx\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_column_and_other_encodings_are_errors(name, content, tmp_path):
    path, packed = tmp_path / name, gzip.compress if name.endswith(".gz") else bytes
    path.write_bytes(packed(b"\xef\xbb\xbf" + content))
    assert read_file(path).to_list() == [{"a": "x"}]
    path.write_bytes(packed(content.replace(b"x", b"\xff")))
    with pytest.raises(ValueError, match=rf"{name} (is not UTF-8|cannot be read)"):
        read_file(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"a": "x"}\n{"a": 5}\n'),
        ("x.jsonl", b'{"a": 100000000000000000000000}\n'),
        ("x.json", b'[{"a": ' + b"[" * 100_000),
        ("x.csv", b"a,b\n1\n"),
        ("x.parquet", b"PAR1"),
        ("x.parquet", b""),
        ("x.tsv.gz", gzip.compress(b"a\nx\n" * 99, mtime=0)[:-9]),
        ("x.tsv.gz", b"a\nx\n"),
    ],
)
def test_content_of_another_type_is_an_error_that_names_the_file(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_file(path)


def test_half_of_a_surrogate_pair_in_json_is_refused_with_its_text_and_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "who", "completion": "a"}\n{"prompt": "who \\ud83d", "completion": "a"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: the text 'who \\ud83d' holds '\\ud83d' at character 4, which"):
        read_file(path)
