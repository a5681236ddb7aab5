"""Where a completion meets its prompt: what does not fit is warned of, once."""

from __future__ import annotations

import pytest
from encoded import row, sentencepiece_like, with_template, word_level

from spul.data import RowEncoder


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("sentiment: ", "positive", "as one text they end in the tokens [':', 'Ġpositive'], but are used as [':', 'Ġ"),
        ("the fil", "m", "as one text they end in the tokens ['Ġfilm'], but are used as"),
        ("sentiment:", "positive", "has no space before it, and follows 'sentiment:': its tokens are ["),
    ],
)
def test_a_completion_that_does_not_fit_its_prompt_is_warned_of_once_with_the_tokens(
    tokenizer, caplog, prompt, completion, tokens
):
    encoder = RowEncoder(tokenizer, 64)
    for _ in range(3):
        encoder.encode(row(prompt, completion))
        encoder.encode(row("the review is ", "bad"))
    assert len(caplog.records) == 1
    assert tokens.split("[")[0] in caplog.text


def test_the_tokens_of_a_completion_with_and_without_its_space_are_those_of_the_tokenizer(tokenizer, caplog):
    RowEncoder(tokenizer, 64).encode(row("sentiment:", "positive"))
    without, with_space = (tokenizer.tokenize(text) for text in ("positive", " positive"))
    assert with_space == ["Ġpositive"] != without
    assert f"its tokens are {without}, with a space {with_space}" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("sentiment:", " positive"),
        ("sentiment:\n", "positive"),
        ("sentiment:", "\npositive"),
        ("the film", "."),
        ("a film (", "good"),
        ("<s>user\nfilm</s>", "good"),
        ("x:", "\u597d"),
    ],
)
@pytest.mark.parametrize("append_eos", [False, True])
def test_a_completion_that_fits_its_prompt_is_not_warned_of(tokenizer, caplog, prompt, completion, append_eos):
    for given in (tokenizer, with_template(tokenizer, "<s> $A </s>")):
        RowEncoder(given, 64, append_eos=append_eos).encode(row(prompt, completion))
    assert not caplog.records


def test_a_tokenizer_to_which_spaces_make_no_difference_is_not_warned_of(caplog):
    tokenizer = word_level("film:", "positive", ":")
    RowEncoder(tokenizer, 8).encode(row("film: ", "positive"))
    RowEncoder(sentencepiece_like(), 64).encode(row("sentiment:", " positive"))
    assert not caplog.records


def test_a_generic_completion_without_the_space_is_warned_of_too(tokenizer, caplog):
    encoder = RowEncoder(tokenizer, 64)
    encoder.encode(row("sentiment:", " positive"))
    encoder.encode(row("sentiment:", " positive"), "unknown")
    assert "the completion 'unknown' has no space before it" in caplog.text
