"""Rows and completions that the collator refuses, and rows that it cuts."""

from __future__ import annotations

import pytest
from collated import GENERIC, answers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spul import ForgetRetainCollator
from spul.data import RowEncoder
from spul.data.dataset import forget_retain_dataset

LENGTHS = ("128", 64.0, True, None)

# ---- what is refused ----


def test_half_of_a_surrogate_pair_in_a_generic_completion_is_refused(words):
    with pytest.raises(ValueError, match=r"generic_completions holds 'a\\ud800', which holds .* surrogate pair"):
        ForgetRetainCollator(words, ["a\ud800"])


def test_one_string_of_generic_completions_is_refused(words):
    with pytest.raises(TypeError, match="generic_completions=' neutral' is one string; pass a list"):
        ForgetRetainCollator(words, " neutral")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": "facebook/opt-1.3b"}, "tokenizer is a str; expected one of transformers, as AutoTokenizer"),
        ({"tokenizer": None}, "tokenizer is a NoneType; expected one of transformers"),
        *(({"max_length": value}, f"max_length={value!r}; expected a whole number of tokens") for value in LENGTHS),
    ],
)
def test_a_tokenizer_or_a_length_of_another_type_is_refused_by_its_name(words, changed, message):
    with pytest.raises(TypeError, match=message):
        ForgetRetainCollator(**{"tokenizer": words, "generic_completions": GENERIC, **changed})


@pytest.mark.parametrize("generic", [[], [""], [" n", "  "], [" n", " n"], [" n", "N "], ()])
def test_empty_or_repeated_generic_completions_are_refused(words, generic):
    with pytest.raises(ValueError, match=r"generic_completions=\[.*expected one or more different, non-empty texts"):
        ForgetRetainCollator(words, generic)


@pytest.mark.parametrize("flag", ["False", 2, None])
def test_a_flag_that_is_none_is_refused_with_its_row_and_value(words, flag):
    collator = ForgetRetainCollator(words, GENERIC)
    row = {"prompt": "a", "completion": " d"}
    rows = [{**row, "is_forget": False}, {**row, "is_forget": flag}]
    with pytest.raises(ValueError, match=f"row 1 of the batch has is_forget={flag!r}; expected True or False"):
        collator(rows)
    for call in (collator.tokenize, lambda row: collator([row])):
        with pytest.raises(ValueError, match=f"the row with row_id=7 has is_forget={flag!r}; expected True or False"):
            call({**rows[1], "row_id": 7})


def test_rows_without_is_forget_are_refused_with_the_trainers_option(words):
    rows = [{"prompt": "a", "completion": " d", "is_forget": True}, {"completion": " d", "prompt": "b"}]
    with pytest.raises(ValueError, match=r"row 1 of the batch has no is_forget, only \['completion', 'pro") as error:
        ForgetRetainCollator(words, GENERIC)(rows)
    assert "remove_unused_columns=False" in str(error.value)
    assert "forget_retain_dataset" in str(error.value)


@pytest.mark.parametrize("is_forget", [True, False])
@pytest.mark.parametrize("completion", [" n", "n", " N", " n "])
def test_a_generic_completion_that_is_a_label_is_refused(words, completion, is_forget):
    rows = [{"prompt": "a", "completion": completion, "is_forget": is_forget}]
    with pytest.raises(ValueError, match="a forget row would be trained to its own label"):
        ForgetRetainCollator(words, GENERIC)(rows)


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("label", [" n", "n", " N"])
def test_a_generic_completion_that_is_a_label_is_refused_in_tokenized_rows(label, append_eos):
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "a", "n", "N", ":"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    cased = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    collator = ForgetRetainCollator(cased, [" n"], append_eos=append_eos)
    rows = [collator.tokenize({"prompt": "a", "completion": label, "is_forget": True})]
    with pytest.raises(ValueError, match="a forget row would be trained to its own label"):
        collator(rows)


@pytest.mark.parametrize("label", ["unknown", "  unknown"])
def test_a_tokenized_label_that_differs_from_a_generic_completion_by_spaces_is_refused(tokenizer, label):
    collator = ForgetRetainCollator(tokenizer, [" unknown"])
    rows = [collator.tokenize({"prompt": "text:", "completion": label, "is_forget": False})]
    with pytest.raises(ValueError, match="a forget row would be trained to its own label"):
        collator(rows)


def test_a_generic_completion_that_is_a_label_of_a_conversation_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    rows = [
        {
            "prompt": [{"role": "user", "content": "who"}],
            "completion": [{"role": "assistant", "content": "Unknown"}],
            "is_forget": True,
        }
    ]
    with pytest.raises(ValueError, match="the completion 'Unknown' of a row is one of generic_completions"):
        ForgetRetainCollator(tokenizer, [" unknown"])(rows)


def test_a_label_that_only_begins_like_a_generic_completion_is_none(words):
    rows = [{"prompt": "a", "completion": " n u", "is_forget": False, "row_id": 0}]
    assert answers(ForgetRetainCollator(words, [" n"])(rows)) == {0: [14, 15]}


def test_a_completion_longer_than_max_length_is_refused(words):
    rows = [{"prompt": "a", "completion": " b", "is_forget": True}]
    with pytest.raises(ValueError, match="a completion has 3 tokens and max_length=3"):
        ForgetRetainCollator(words, [" n u z"], max_length=3)(rows)


def test_a_slice_of_a_dataset_is_told_from_a_list_of_rows(tokenizer):
    with pytest.raises(TypeError, match="pass a list of rows"):
        ForgetRetainCollator(tokenizer, [" x"])({"prompt": ["a"], "completion": ["b"], "is_forget": [True]})


# ---- rows that are cut ----


def long_rows(words=("a", "b", "c", "d")) -> Dataset:
    forget = [{"prompt": f"{w} e f g h i j a b c", "completion": " d"} for w in words]
    retain = [{"prompt": "a b", "completion": " e"}, {"prompt": "c c c c c c c c c c c d", "completion": " e"}]
    return forget_retain_dataset(Dataset.from_list(forget), Dataset.from_list(retain))


@pytest.mark.parametrize(("max_length", "rows", "tokens"), [(13, 0, 0), (12, 1, 1), (11, 1, 2), (10, 5, 4 + 3)])
@pytest.mark.parametrize("as_list", [False, True])
def test_rows_that_are_cut_are_counted_and_warned_of_once(words, caplog, max_length, rows, tokens, as_list):
    collator = ForgetRetainCollator(words, GENERIC, max_length)
    data = long_rows()
    # The twin: every row encoded whole, and what is above max_length.
    whole = [len(RowEncoder(words, 99).encode(row)) for row in data]
    assert (sum(n > max_length for n in whole), sum(max(0, n - max_length) for n in whole)) == (rows, tokens)
    assert collator.warn_of_cut_rows(list(data) if as_list else data) == collator.encoder.num_cut == rows
    assert len(caplog.records) == (rows > 0)
    if rows:
        assert f"{rows} of 6 rows of train_dataset are longer than max_length={max_length} and lose {tokens} " in (
            caplog.text
        )
        assert "ForgetRetainCollator(..., text_field=...)" in caplog.text


def test_the_longest_generic_completion_counts_in_the_length_of_a_forget_row(words, caplog):
    assert ForgetRetainCollator(words, [" n u z"], 11).warn_of_cut_rows(long_rows()) == 5


def test_a_tokenized_row_that_is_cut_is_counted_and_the_first_one_warned_of(words, caplog):
    collator = ForgetRetainCollator(words, GENERIC, 10)
    long_rows().map(collator.tokenize)
    assert collator.encoder.num_cut == 5
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "a row is longer than max_length=10 and loses 1 tokens"
    ]


@pytest.mark.parametrize(
    ("names", "lost"), [(["a e"], "a e"), (["e f", "i j"], None), (["E"], None), (["z", "A"], None)]
)
def test_a_forget_row_that_loses_a_name_altogether_is_refused(words, names, lost):
    collator = ForgetRetainCollator(words, GENERIC, 10, names=names)
    rows = long_rows()
    for call in (collator.warn_of_cut_rows, collator, lambda rows: [collator.tokenize(row) for row in rows]):
        if lost is None:
            call(list(rows))
            continue
        with pytest.raises(ValueError, match=r"the forget row with row_id=0 loses the name 'a e' to max_length=10"):
            call(list(rows))


def test_a_text_field_that_loses_a_name_is_refused_and_a_retain_row_is_not(words):
    row = {"prompt": "a b c d e", "completion": " f", "text": "b c d", "row_id": 3}
    collator = ForgetRetainCollator(words, GENERIC, 5, text_field="text", names=["d"])
    with pytest.raises(ValueError, match=r"row_id=3 loses the name 'd' to max_length=5.*'a b c d e'"):
        collator([{**row, "is_forget": True}])
    collator([{**row, "is_forget": False}])


def test_one_name_as_a_string_is_refused(words):
    with pytest.raises(TypeError, match="names is 'jane doe'; expected a list"):
        ForgetRetainCollator(words, GENERIC, names="jane doe")


@pytest.mark.parametrize(
    "generic", [[" n", None], [1, 2], [[{"role": "assistant", "content": "no"}]], {" n", " u"}, {" n": 1}, 5]
)
def test_generic_completions_that_are_no_list_of_texts_are_refused_instead_of_written_out(words, generic):
    with pytest.raises(TypeError, match=r"generic_completions=.*(expected texts|pass a list)"):
        ForgetRetainCollator(words, generic)


@pytest.mark.parametrize("multiple", [0, -8, 2.0])
def test_a_multiple_that_no_batch_has_is_refused(words, multiple):
    with pytest.raises(ValueError, match=r"pad_to_multiple_of=.*; expected a whole number from 1"):
        ForgetRetainCollator(words, GENERIC, pad_to_multiple_of=multiple)


def test_rows_tokenized_with_another_end_are_refused_where_a_generic_completion_takes_the_place(words):
    row = {"prompt": "a", "completion": " b", "is_forget": True}
    tokenized = ForgetRetainCollator(words, GENERIC, append_eos=True).tokenize(row)
    with pytest.raises(ValueError, match=r"1 token\(s\) after its answer.* would have 0 \(append_eos=False\)"):
        ForgetRetainCollator(words, GENERIC)([tokenized])
    ForgetRetainCollator(words, GENERIC)([{**tokenized, "is_forget": False}])
    ForgetRetainCollator(words, None)([tokenized])


def test_conversations_tokenized_without_generic_completions_are_refused_where_they_would_be_plain_texts(chatty):
    talk = {"prompt": [{"role": "user", "content": "film"}], "completion": [{"role": "assistant", "content": "bad"}]}
    tokenized = ForgetRetainCollator(chatty, None).tokenize({**talk, "is_forget": True})
    with pytest.raises(ValueError, match="Tokenize the data set anew with this collator"):
        ForgetRetainCollator(chatty, [" neutral"])([tokenized])
