"""Checks of one row: each odd value is refused by the row's name and the column's, with what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import GENERIC, make_collator, make_tokenizer

from spul import ForgetRetainCollator
from spul.data import RowEncoder
from spul.data.row_checks import (
    check_all_texts,
    check_texts,
    check_token_ids,
    ending_of,
    generic_ids_of,
    row_name,
    split_tokenized,
)

TEXT = {"prompt": "review jane :", "completion": " positive", "is_forget": True}
USER, ANSWER = {"role": "user", "content": "jane"}, {"role": "assistant", "content": "good"}
CHAT = {"prompt": [USER], "completion": [ANSWER], "is_forget": False}
IDS = {"input_ids": [4, 5, 6], "completion_mask": [0, 0, 1], "is_forget": False}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**TEXT, "prompt": 5}, r"a row: prompt is 5; expected prompt and completion to be texts, or both lists"),
        ({**TEXT, "prompt": None, "row_id": 3}, r"the row with row_id=3: prompt is None; expected"),
        ({**TEXT, "completion": 5}, r"a row: completion is 5; expected .* both lists of \{'role', 'content'\}"),
        ({**TEXT, "completion": [ANSWER]}, r"prompt is 'review jane :'; expected .* or both lists"),
        ({**TEXT, "completion": None}, r"a row has an empty completion: \{'prompt'"),
        ({**TEXT, "completion": " \n"}, r"a row has an empty completion"),
        ({**TEXT, "prompt": "a\ud800"}, r"prompt holds '\\ud800' at character 1, which is half of a surrogate pair"),
        ({**TEXT, "completion": "\udfff"}, r"completion holds '\\udfff' at character 0"),
        ({**CHAT, "prompt": ["jane"]}, r"prompt is \['jane'\]; expected .* messages"),
        ({**CHAT, "prompt": []}, r"prompt is \[\]; expected"),
        ({**CHAT, "prompt": [{"content": "jane"}]}, r"prompt is \[\{'content': 'jane'\}\]; expected"),
        ({**CHAT, "completion": [{"role": "assistant"}]}, r"a row has an empty completion"),
        ({**CHAT, "completion": [{**ANSWER, "content": ""}]}, r"a row has an empty completion"),
        ({**CHAT, "completion": [{**ANSWER, "content": 5}]}, r"content of the last message of completion is 5, a int"),
        ({**CHAT, "prompt": [{**USER, "content": "\ud800"}]}, r"content of a message of prompt holds '\\ud800'"),
        ({**CHAT, "prompt": [{**USER, "content": [{"text": "\ud800"}]}]}, r"text of a message of prompt holds '\\ud8"),
        ({**CHAT, "prompt": [{**USER, "role": "judge"}]}, r"cannot render .*'judge'.*no such role\. Expected"),
        ({**CHAT, "tools": [{"name": "f"}]}, r"a row is a conversation with the column 'tools', \[\{'name': 'f'\}\]"),
        ({**CHAT, "chat_template_kwargs": {"enable_thinking": False}}, r"column 'chat_template_kwargs', .* set ena"),
        ({**IDS, "input_ids": [4, -1, 6]}, r"input_ids is \[4, -1, 6\]; expected a list of token ids"),
        ({**IDS, "input_ids": [4, 2**70, 6]}, r"input_ids is .*; expected a list of token ids"),
        ({**IDS, "input_ids": [4, 5.0, 6]}, r"input_ids is .*; expected a list of token ids"),
        ({**IDS, "input_ids": "456"}, r"input_ids is '456'; expected a list of token ids"),
        ({**IDS, "completion_mask": [0, 0, 2]}, r"completion_mask is \[0, 0, 2\]; expected a list of 0"),
        ({**IDS, "completion_mask": 1}, r"completion_mask is 1; expected a list of 0"),
        ({**IDS, "num_ending": 2}, r"num_ending is 2; expected a whole number from 0 to 1"),
        ({**IDS, "num_ending": "1"}, r"num_ending is '1'; expected"),
        ({**IDS, "is_forget": True, "generic_ids": [[4]]}, r"generic_ids is \[\[4\]\]; expected 2 lists of token ids"),
        ({**IDS, "is_forget": True, "generic_ids": [[4], []]}, r"generic_ids\[1\] is empty; expected at least one"),
        ({**IDS, "is_forget": True, "generic_ids": [[4], "a"]}, r"generic_ids\[1\] is 'a'; expected a list of token"),
        (
            {**TEXT, "row_id": 2**63},
            r"row 0 of the batch has row_id=9223372036854775808; expected a whole number of 64",
        ),
        ({**TEXT, "row_id": "\ud800"}, r"row 0 of the batch has row_id='\\ud800'; expected a whole number"),
        ({5: 5, "prompt": "a", "is_forget": 1}, r"a row has the columns \['5', 'is_forget', 'prompt'\]; expected"),
        ({5: 5, "prompt": "a"}, r"row 0 of the batch has no is_forget, only \['5', 'prompt'\]"),
    ],
)
def test_an_odd_row_is_refused_by_name_with_what_was_expected(row, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no such role.') }}{% endif %}"
        "{{ m.role + ' ' + m.content }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    with pytest.raises(ValueError, match=message):
        ForgetRetainCollator(tokenizer, GENERIC)([row])


@pytest.mark.parametrize("row", [None, 5, "text", ["is_forget"], torch.tensor(1)])
def test_what_is_no_row_is_refused_by_its_number(row):
    with pytest.raises(TypeError, match=rf"row 1 of the batch is a {type(row).__name__}; expected a mapping"):
        make_collator()([TEXT, row])
    with pytest.raises(TypeError, match=r"a row is a .*; expected a mapping of columns"):
        make_collator().encoder.encode(row)


@pytest.mark.parametrize("rows", [None, 5, torch.tensor(1)])
def test_what_are_no_rows_is_refused(rows):
    with pytest.raises(TypeError, match=rf"rows is a {type(rows).__name__}; expected a list of rows"):
        make_collator()(rows)


def test_rows_of_an_iterator_make_the_batch_of_the_list():
    for name, tensor in make_collator()([TEXT, IDS]).items():
        assert torch.equal(make_collator()(iter([TEXT, IDS]))[name], tensor)


@pytest.mark.parametrize("text", [None, 5, ["a"]])
def test_a_text_field_that_is_no_text_is_named(text):
    with pytest.raises(ValueError, match=r"a row: text is .*; expected text"):
        make_collator(text_field="text")([{**TEXT, "text": text}])


def test_a_long_row_is_not_shown_whole():
    for row in ({**TEXT, "completion": "", "text": "x" * 10_000}, {**TEXT, "other": "x" * 10_000, "text": "no part"}):
        with pytest.raises(ValueError, match=r"\.\.\.") as error:
            make_collator(text_field="text")([row])
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_token_ids_may_be_of_any_array(kind):
    row = {"input_ids": kind([4, 5, 6]), "completion_mask": kind([0, 0, 1]), "num_ending": kind([1])[0]}
    assert split_tokenized(row) == ([4, 5], [6])
    assert ending_of(row, 1) == 1
    assert generic_ids_of({"generic_ids": kind([[1, 2], [3, 4]])}, 2) == [[1, 2], [3, 4]]
    assert (ending_of({}, 1), generic_ids_of({}, 2)) == (0, None)


@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "tools": None, "chat_template_kwargs": {"enable_thinking": None}},
        {**CHAT, "tools": [], "chat_template_kwargs": {}},
        {**TEXT, "tools": ["f"]},
    ],
    ids=["filled in", "empty", "a text"],
)
def test_columns_of_a_chat_template_without_a_value_or_beside_a_text_pass(row):
    check_texts(row)


def test_a_row_is_named_by_its_id_or_its_number():
    assert row_name({"row_id": 7}, 2) == "the row with row_id=7"
    assert row_name({}, 2) == "row 2 of the batch"
    assert row_name({}) == "a row"


def test_a_tokenizer_of_more_tokens_than_embeddings_passes_where_no_row_has_one(tokenizer):
    encoder, rows = RowEncoder(tokenizer, 32), [{"prompt": "a", "completion": " b"}]
    largest = max(max(one.prompt_ids + one.completion_ids) for one in map(encoder.encode, rows))
    assert largest + 1 < len(tokenizer)
    check_token_ids(encoder, rows, largest + 1)
    check_token_ids(encoder, rows, None)
    with pytest.raises(ValueError, match=f"a row the token id {largest}, and the base has {largest} input embeddings"):
        check_token_ids(encoder, rows, largest)


def test_a_blank_text_field_is_refused_where_the_prompt_stands_before_it(tokenizer):
    rows = [{"prompt": "review :", "text": " ", "completion": " good"}]
    check_all_texts(RowEncoder(tokenizer, 32, "text"), rows)
    with pytest.raises(ValueError, match="that of column 'text' is empty"):
        check_all_texts(RowEncoder(tokenizer, 32, "text", prompt_position="message"), rows)
