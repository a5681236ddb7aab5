"""Rows to token ids: what belongs to the completion, what is cut, what is refused."""

from __future__ import annotations

import pytest
from encoded import PROMPT, row, sentencepiece_like, with_template, word_level
from helpers import make_tokenizer

from spul.data import Encoded, RowEncoder

# ---- text ----


def test_a_short_row_is_tokenized_whole(ten):
    assert RowEncoder(ten, 8).encode(row("a b c", " d e")) == Encoded([3, 4, 5], [6, 7])


@pytest.mark.parametrize("completion", [" positive", " negative film", " xyz!", "\nabout jane", "."])
def test_prompt_and_completion_are_the_joint_tokenization_cut_in_two(tokenizer, completion):
    encoded = RowEncoder(tokenizer, 64).encode(row(PROMPT, completion))
    assert encoded.prompt_ids == tokenizer(PROMPT)["input_ids"]
    assert encoded.prompt_ids + encoded.completion_ids == tokenizer(PROMPT + completion)["input_ids"]


def test_a_one_word_completion_with_its_space_is_one_token(tokenizer):
    ids = RowEncoder(tokenizer, 64).completion_ids(" positive")
    assert tokenizer.convert_ids_to_tokens(ids) == ["Ġpositive"]


def test_a_sentencepiece_like_tokenizer_adds_no_second_space():
    tokenizer = sentencepiece_like()
    alone = tokenizer.convert_ids_to_tokens(tokenizer(" positive", add_special_tokens=False)["input_ids"])
    assert "".join(alone) == "▁▁positive"  # the trap: by itself, the text gets a space in front of its own
    encoded = RowEncoder(tokenizer, 64).encode(row("sentiment:", " positive"))
    assert encoded.prompt_ids + encoded.completion_ids == tokenizer("sentiment: positive")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encoded.completion_ids) == ["▁positive"]


@pytest.mark.parametrize("by", ["normalizer", "pre_tokenizer"])
def test_a_sentencepiece_like_tokenizer_adds_no_space_where_the_completion_has_none(by):
    tokenizer = sentencepiece_like(by)
    ids = RowEncoder(tokenizer, 64).completion_ids("positive")
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "positive"


def test_a_word_level_vocabulary_without_the_anchor_loses_no_word_of_the_completion():
    tokenizer = word_level("positive", "film")  # ":" is unknown, and so is ":positive"
    encoder = RowEncoder(tokenizer, 8)
    assert encoder.completion_ids(" positive film") == [3, 4]
    assert encoder.completion_ids("positive film") == [3, 4]
    assert encoder.encode(row("film", "positive")) == Encoded([4], [3])


def test_the_ids_of_a_completion_are_the_callers_to_change(ten):
    encoder = RowEncoder(ten, 8)
    encoder.completion_ids(" d").append(99)
    assert encoder.completion_ids(" d") == [6]


def test_a_beginning_of_sequence_token_stands_before_the_prompt_only(ten):
    encoded = RowEncoder(with_template(ten, "<s> $A"), 8).encode(row("a b", " c"))
    assert encoded == Encoded([1, 3, 4], [5])


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>"])
def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(ten, template):
    encoded = RowEncoder(with_template(ten, template), 8).encode(row("a b", " c"))
    assert encoded.prompt_ids[-2:] == [3, 4]
    assert 2 not in encoded.prompt_ids
    assert encoded.completion_ids == [5]


def test_a_prompt_that_ends_with_the_end_token_keeps_it_once(ten):
    assert RowEncoder(ten, 8).encode(row("a </s>", " c")).prompt_ids == [3, 2]
    assert RowEncoder(with_template(ten, "$A </s>"), 8).encode(row("a </s>", " c")).prompt_ids == [3, 2]


def test_append_eos_ends_completions_own_or_given(ten):
    encoder = RowEncoder(ten, 8, append_eos=True)
    assert encoder.encode(row("a b", " c")) == Encoded([3, 4], [5, 2])
    assert encoder.encode(row("a b", " c"), " d e") == Encoded([3, 4], [6, 7, 2])


def test_a_completion_given_stands_in_for_the_rows_own(ten):
    encoder = RowEncoder(ten, 8)
    assert encoder.encode(row("a b", " c"), " j") == Encoded([3, 4], [12])


# ---- cutting ----


def test_a_row_of_exactly_max_length_is_not_cut(ten):
    assert RowEncoder(ten, 5).encode(row("a b c", " d e")) == Encoded([3, 4, 5], [6, 7])


def test_a_long_row_loses_tokens_from_the_start_of_its_prompt(ten):
    assert RowEncoder(ten, 4).encode(row("a b c d", " e f")) == Encoded([5, 6], [7, 8])


def test_a_long_row_keeps_its_beginning_of_sequence_token(ten):
    tokenizer = with_template(ten, "<s> $A")
    assert RowEncoder(tokenizer, 4).encode(row("a b c d", " e f")) == Encoded([1, 6], [7, 8])


def test_the_prompts_last_token_goes_before_the_beginning_of_sequence_token_only_if_both_fit(ten):
    tokenizer = with_template(ten, "<s> $A")
    assert RowEncoder(tokenizer, 3).encode(row("a b c d", " e f")) == Encoded([6], [7, 8])


@pytest.mark.parametrize("max_length", range(4, 14))
def test_the_completion_is_never_cut_and_the_row_is_as_long_as_it_may_be(tokenizer, max_length):
    encoder = RowEncoder(tokenizer, max_length)
    encoded = encoder.encode(row(PROMPT, " positive film bad"))
    assert tokenizer.decode(encoded.completion_ids) == " positive film bad"
    whole = len(tokenizer(PROMPT + " positive film bad")["input_ids"])
    assert len(encoded.prompt_ids) + len(encoded.completion_ids) == min(max_length, whole)
    assert tokenizer(PROMPT)["input_ids"][-len(encoded.prompt_ids) :] == encoded.prompt_ids


def test_a_text_field_loses_tokens_from_its_end(ten):
    encoder = RowEncoder(ten, 6, text_field="text")
    # a b | c d e f | g h + i: three tokens too many, so d e f go.
    assert encoder.encode(row("a b c d e f g h", " i", text="c d e f")) == Encoded([3, 4, 5, 9, 10], [11])


def test_after_its_text_field_a_row_loses_the_start_of_its_prompt(ten):
    encoder = RowEncoder(ten, 4, text_field="text")
    # a b | c d e f | g h + i: five too many, so c d e f go, then a.
    assert encoder.encode(row("a b c d e f g h", " i", text="c d e f")) == Encoded([4, 9, 10], [11])


def test_after_its_text_field_a_row_still_keeps_its_beginning_of_sequence_token(ten):
    encoder = RowEncoder(with_template(ten, "<s> $A"), 4, text_field="text")
    assert encoder.encode(row("a b c d e f g h", " i", text="c d e f")) == Encoded([1, 9, 10], [11])


def test_a_text_field_in_a_row_that_fits_changes_nothing(ten):
    encoder = RowEncoder(ten, 9, text_field="text")
    assert encoder.encode(row("a b c d e f g h", " i", text="c d e f")).prompt_ids == [3, 4, 5, 6, 7, 8, 9, 10]


def test_a_token_that_lies_partly_outside_the_text_field_stays(tokenizer):
    text = "good film about jane"
    prompt = f"### text: {text}\n### sentiment:"
    whole = tokenizer.tokenize(prompt)
    assert whole[3:8] == [":", "Ġgood", "Ġfilm", "Ġabout", "Ġjane"]  # "Ġgood" begins before the text
    for max_length, left in ((14, 3), (13, 2), (12, 1), (11, 0), (10, 0)):
        encoded = RowEncoder(tokenizer, max_length, text_field="text").encode(row(prompt, " positive", text=text))
        expected = (whole[: 5 + left] + whole[8:])[-(max_length - 1) :]
        assert tokenizer.convert_ids_to_tokens(encoded.prompt_ids) == expected


def test_an_empty_text_field_leaves_only_the_prompt_to_cut(ten):
    encoder = RowEncoder(ten, 3, text_field="text")
    assert encoder.encode(row("a b c", " d", text="")) == Encoded([4, 5], [6])


def test_a_text_field_with_a_tokenizer_that_ends_every_text(ten):
    encoder = RowEncoder(with_template(ten, "<s> $A </s>"), 5, text_field="text")
    assert encoder.encode(row("a b c d", " i", text="b c d")) == Encoded([1, 3, 4, 5], [11])


# ---- one beginning of the sequence ----


def test_a_prompt_that_begins_with_the_beginning_of_sequence_token_gets_no_second_one(ten):
    tokenizer = with_template(ten, "<s> $A")
    assert tokenizer("<s> a b")["input_ids"] == [1, 1, 3, 4]  # the trap
    assert RowEncoder(tokenizer, 8).encode(row("<s> a b", " c")) == Encoded([1, 3, 4], [5])
    assert RowEncoder(tokenizer, 8).encode(row("a <s> b", " c")) == Encoded([1, 3, 1, 4], [5])
    assert RowEncoder(word_level(*"abc"), 8).encode(row("<s> a b", " c")) == Encoded([1, 3, 4], [5])


def test_a_text_field_is_found_after_the_one_beginning_of_sequence_token(ten):
    encoder = RowEncoder(with_template(ten, "<s> $A </s>"), 5, text_field="text")
    assert encoder.encode(row("<s> a b c d", " i", text="b c d")) == Encoded([1, 3, 4, 5], [11])


# ---- tokenized rows ----


def test_tokenized_rows_are_split_by_their_mask(ten):
    tokenized = {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1]}
    assert RowEncoder(ten, 8).encode(tokenized) == Encoded([3, 4], [5, 6])
    assert RowEncoder(ten, 8).encode(tokenized, " j") == Encoded([3, 4], [12])


def test_tokenized_rows_that_are_too_long_are_cut_as_others(ten):
    tokenized = {"input_ids": [1, 4, 5, 6, 7], "completion_mask": [0, 0, 0, 1, 1]}
    assert RowEncoder(ten, 4).encode(tokenized) == Encoded([1, 5], [6, 7])


def test_token_ids_count_where_a_row_has_text_as_well(ten):
    both = {**row("a", " b"), "input_ids": [5, 6], "completion_mask": [0, 1]}
    assert RowEncoder(ten, 8).encode(both) == Encoded([5], [6])


@pytest.mark.parametrize("mask", [None, [0, 1]])
def test_token_ids_without_a_mask_of_their_length_are_refused(ten, mask):
    tokenized = {"input_ids": [3, 4, 5]} | ({} if mask is None else {"completion_mask": mask})
    with pytest.raises(ValueError, match=r"a completion_mask of the same length.*remove_unused_columns=False"):
        RowEncoder(ten, 8).encode(tokenized)


def test_a_mask_with_a_prompt_token_after_the_completion_is_refused(ten):
    with pytest.raises(ValueError, match=r"0 for the prompt, then 1 for the completion; got \[0, 1, 0\]"):
        RowEncoder(ten, 8).encode({"input_ids": [3, 4, 5], "completion_mask": [0, 1, 0]})


@pytest.mark.parametrize(("mask", "what"), [([1, 1], "the prompt"), ([0, 0], "the completion")])
def test_a_mask_that_leaves_nothing_is_refused(ten, mask, what):
    with pytest.raises(ValueError, match=f"{what} of a row has no tokens"):
        RowEncoder(ten, 8).encode({"input_ids": [3, 4], "completion_mask": mask})


# ---- what is refused ----


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_length_without_room_for_prompt_and_completion_is_refused(ten, max_length):
    with pytest.raises(ValueError, match=f"max_length={max_length}; expected at least 2"):
        RowEncoder(ten, max_length)


def test_a_completion_that_fills_the_whole_row_is_refused(ten):
    with pytest.raises(ValueError, match=r"has 3 tokens and max_length=3 leaves no room .* to more than 3"):
        RowEncoder(ten, 3).encode(row("a", " b c d"))
    assert RowEncoder(ten, 4).encode(row("a", " b c d")) == Encoded([3], [4, 5, 6])


def test_missing_columns_are_named_with_the_trainers_option(ten):
    with pytest.raises(ValueError, match=r"columns \['labels', 'prompt'\].*remove_unused_columns=False"):
        RowEncoder(ten, 8).encode({"prompt": "a", "labels": 1})


@pytest.mark.parametrize("completion", ["", "  ", None])
def test_an_empty_completion_is_refused(ten, completion):
    with pytest.raises(ValueError, match=r"a row has an empty completion: .*'prompt': 'a'"):
        RowEncoder(ten, 8).encode({"prompt": "a", "completion": completion})


def test_a_prompt_without_tokens_is_refused(ten):
    with pytest.raises(ValueError, match=r"the prompt of a row has no tokens: .*'completion': ' b'"):
        RowEncoder(ten, 8).encode(row("", " b"))
    assert RowEncoder(with_template(ten, "<s> $A"), 8).encode(row("", " b")) == Encoded([1], [4])


def test_append_eos_without_an_eos_token_is_refused(ten):
    ten.eos_token = None
    with pytest.raises(ValueError, match="append_eos=True, but the tokenizer has no eos_token"):
        RowEncoder(ten, 8, append_eos=True)


def test_a_text_field_needs_a_fast_tokenizer(ten, monkeypatch):
    monkeypatch.setattr(type(ten), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match="text_field='text' needs a fast tokenizer"):
        RowEncoder(ten, 8, text_field="text")


def test_a_text_field_that_a_row_lacks_is_refused_with_its_columns(ten):
    with pytest.raises(ValueError, match=r"text_field='text', but a row has only the columns \['completion', 'prom"):
        RowEncoder(ten, 8, text_field="text").encode(row("a", " b"))


def test_a_text_field_that_is_not_in_the_prompt_is_refused(ten):
    with pytest.raises(ValueError, match="the text of column 'text' is not part of the prompt of its row"):
        RowEncoder(ten, 8, text_field="text").encode(row("a", " b", text="c"))


def test_a_tokenizer_that_grows_and_an_end_that_is_switched_off_reach_what_was_cached():
    encoder = RowEncoder(make_tokenizer(), 64, append_eos=True)
    before = encoder.completion_ids(" positive")
    assert before[-1] == encoder.tokenizer.eos_token_id
    encoder.append_eos = False
    assert encoder.completion_ids(" positive") == before[:-1]
    encoder.tokenizer.add_tokens([" positive"])
    assert encoder.completion_ids(" positive") == [len(encoder.tokenizer) - 1]
