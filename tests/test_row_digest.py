"""The digest of training rows tells apart what a plain one, of each row as JSON, does, and nothing else."""

import hashlib
import itertools
import json

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets

from spul.training import row_digest
from spul.training.row_digest import plain, plain_digest

COLUMNS = ("prompt", "completion", "input_ids", "row_id", "is_forget")
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]


def by_row(rows):
    """The plain twin."""
    found = hashlib.sha256()
    for row in rows:
        content = {name: row[name] for name in COLUMNS if name in row}
        found.update(json.dumps(content, sort_keys=True, default=plain).encode() + b"\n")
    return found.hexdigest()


SETS = {
    name: Dataset.from_dict(columns)
    for name, columns in {
        "texts": {"prompt": ["ab", "c"], "completion": ["d", "e"]},
        "texts cut elsewhere": {"prompt": ["a", "bc"], "completion": ["d", "e"]},
        "texts in another order": {"prompt": ["c", "ab"], "completion": ["e", "d"]},
        "columns swapped": {"prompt": ["d", "e"], "completion": ["ab", "c"]},
        "a text less": {"prompt": ["ab"], "completion": ["d"]},
        "an empty text": {"prompt": ["ab", ""], "completion": ["d", "e"]},
        "a missing text": {"prompt": ["ab", None], "completion": ["d", "e"]},
        "another missing text": {"prompt": [None, "ab"], "completion": ["d", "e"]},
        "no texts": {"prompt": [None, None], "completion": ["d", "e"]},
        "no column": {"completion": ["d", "e"]},
        "another letter": {"prompt": ["ab", "c"], "completion": ["d", "é"]},
        "a column that does not count": {"prompt": ["ab", "c"], "completion": ["d", "e"], "other": [1, 2]},
        "tokens": {"input_ids": [[1, 2], [3]]},
        "tokens cut elsewhere": {"input_ids": [[1], [2, 3]]},
        "tokens of one row": {"input_ids": [[1, 2, 3]]},
        "a row without tokens": {"input_ids": [[1, 2, 3], []]},
        "a row whose tokens are missing": {"input_ids": [[1, 2, 3], None]},
        "a missing token": {"input_ids": [[1, None], [3]]},
        "numbers": {"row_id": [1, 0]},
        "broken numbers": {"row_id": [1.0, 0.0]},
        "flags": {"row_id": [True, False]},
        "numbers as texts": {"row_id": ["1", "0"]},
        "a missing number": {"row_id": [1, None]},
        "numbers of another column": {"is_forget": [1, 0]},
        "messages": {"prompt": [MESSAGES[:1], MESSAGES[1:]]},
        "messages of one row": {"prompt": [MESSAGES]},
        "messages with other names": {
            "prompt": [[{"role": "user", "text": "a"}], [{"role": "assistant", "text": "é"}]]
        },
        "lists of texts": {"prompt": [["user", "a"], ["assistant", "é"]]},
    }.items()
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SETS, 2)))
def test_sets_are_told_apart_as_by_the_plain_twin(one, other):
    expected = by_row(SETS[one]) == by_row(SETS[other])
    assert (plain_digest(SETS[one], COLUMNS) == plain_digest(SETS[other], COLUMNS)) == expected


@pytest.mark.parametrize("name", SETS)
def test_rows_of_a_list_and_of_other_chunks_have_the_digest_of_a_set(name):
    rows = SETS[name]
    expected = plain_digest(rows, COLUMNS)
    twice = concatenate_datasets([rows, rows])
    assert plain_digest(rows.to_list(), COLUMNS) == expected
    assert plain_digest(twice.select(range(len(rows), len(twice))), COLUMNS) == expected
    assert plain_digest(twice.select(list(range(len(rows)))), COLUMNS) == expected
    assert plain_digest(rows.with_format("numpy"), COLUMNS) == expected


def test_types_of_arrow_for_the_same_values_do_not_count():
    message, other = pa.struct({"role": pa.string(), "content": pa.string()}), pa.large_string()
    values = {
        "prompt": [[{"role": "user", "content": "a"}], None],
        "completion": ["é", None],
        "input_ids": [[1, 2], [3, 4]],
        "row_id": [2**31 - 1, None],
        "is_forget": [0.5, None],
    }
    kinds = [
        (pa.list_(message), pa.string(), pa.list_(pa.int64()), pa.int64(), pa.float64()),
        (
            pa.large_list(pa.struct({"content": other, "role": other})),
            other,
            pa.list_(pa.int16(), 2),
            pa.uint64(),
            pa.float32(),
        ),
    ]
    found = set()
    for kind in kinds:
        arrays = [pa.array(each, one) for each, one in zip(values.values(), kind, strict=True)]
        found.add(plain_digest(Dataset(pa.table(arrays, list(values))), COLUMNS))
    assert len(found) == 1


def test_messages_that_lie_as_json_count_by_their_values():
    message = {"role": "user", "content": "a", "name": "b"}
    features = Features({"prompt": List(Json()), "completion": Value("string")})

    def digest_of(*messages):
        return plain_digest(Dataset.from_dict({"prompt": [list(messages)], "completion": ["c"]}, features), COLUMNS)

    first = digest_of(message, MESSAGES[1])
    assert first == digest_of(dict(reversed(message.items())), MESSAGES[1])
    assert first == plain_digest([{"prompt": [message, MESSAGES[1]], "completion": "c"}], COLUMNS)
    assert first != digest_of(message, MESSAGES[0])


def test_numbers_above_those_of_arrow_are_told_apart():
    sets = [Dataset(pa.table({"row_id": pa.array([number, 1], pa.uint64())})) for number in (2**63, 2**63 + 1)]
    assert len({plain_digest(rows, COLUMNS) for rows in sets}) == 2


LISTS = [
    [{"row_id": 1}, {"row_id": 2.0}],
    [{"row_id": 1}, {"row_id": 2}],
    [{"row_id": 1}, {"row_id": "2"}],
    [{"row_id": 1}, {"row_id": True}],
    [{"row_id": 1}, {"row_id": None}],
    [{"row_id": 1}, {}],
    [{}, {"row_id": 1}],
    [{"prompt": [{"a": 1}, {"b": 1}]}],
    [{"prompt": [{"a": 1, "b": None}, {"a": None, "b": 1}]}],
    [{"input_ids": torch.tensor([1, 2])}],
    [{"input_ids": [1, 2]}],
    [{"input_ids": [1, 2**70]}],
]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(len(LISTS)), 2)))
def test_lists_are_told_apart_as_by_the_plain_twin(one, other):
    expected = by_row(LISTS[one]) == by_row(LISTS[other])
    assert (plain_digest(LISTS[one], COLUMNS) == plain_digest(LISTS[other], COLUMNS)) == expected


def test_a_column_named_twice_counts_once():
    # as a text field that is the prompt
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"]})
    twice = ("prompt", "completion", "prompt")
    assert plain_digest(rows, twice) == plain_digest(rows, twice[:2]) == plain_digest(rows.to_list(), twice)


def test_every_part_counts(monkeypatch):
    monkeypatch.setattr(row_digest, "ROWS_OF_A_PART", 3)
    rows = Dataset.from_dict({"prompt": [str(i) for i in range(8)], "row_id": list(range(8))})
    expected = plain_digest(rows, COLUMNS)
    assert plain_digest(list(rows), COLUMNS) == expected
    for i in range(8):
        changed = rows.map(lambda row, i=i: {"prompt": row["prompt"] + "!" * (row["row_id"] == i)})
        assert plain_digest(changed, COLUMNS) != expected
