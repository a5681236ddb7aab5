"""Windows of texts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spul.gates.windows import (
    LONGEST_WORD,
    SHORTEST,
    highest_of,
    highest_scores,
    passages,
    window_size,
    window_sizes,
    with_windows,
)

LONG = " ".join(f"word{i}" for i in range(200))


def test_the_size_is_that_of_nearly_all_forget_texts():
    assert window_size(["x" * n for n in range(1, 101)]) == 96  # of the 99 steps between them, 95 % and up
    assert window_size(["x" * 50] * 100 + ["x" * 9000]) == 50
    assert window_size(["a", "b"]) == SHORTEST


def test_smaller_windows_are_a_half_a_quarter_and_an_eighth_of_it_and_no_shorter_than_the_shortest():
    assert window_sizes(["x" * 282] * 10) == [282, 141, 70, 35]
    assert window_sizes(["x" * 70] * 10) == [70, 35]
    assert window_sizes(["a", "b"]) == [SHORTEST]


def test_a_text_is_scored_by_the_windows_of_each_size_once_and_without_its_disguises():
    assert passages(LONG, 200, 100) == [*with_windows(LONG, 200), *with_windows(LONG, 100)[1:]]
    assert passages("short", 200, 100) == ["short"]
    assert passages("it is J-a-n-e", 200, 100) == ["it is J-a-n-e", "it is Jane"]


@pytest.mark.parametrize(
    "text",
    [
        "it is J\u200ban\u2060e",
        "it is \uff2a\uff41\uff4e\uff45",
        "it is \U0001d409ane",
        "it is J\u3164an\u115fe",  # Hangul fillers
        "it is J\u1d00\u0274\u1d07",  # small capitals
        "it is J\U0001f150\U0001f17d\U0001f154",  # black circles, a black square
    ],
)
def test_what_reads_by_character_also_reads_invisible_full_width_and_styled_ones_undone(text):
    assert passages(text, 200) == [text]
    assert passages(text, 200, by_character=True) == [text, "it is Jane"]
    for other in ("so-so\u2122 \ufb01lm, 2\u00b2, caf\u00e9 \uff11", "it is jane"):
        assert passages(other, 200, by_character=True) == [other]


@pytest.mark.parametrize("text", ["", "short", "x" * 40])
def test_a_text_of_one_window_is_itself(text):
    assert with_windows(text, 40) == [text]


@pytest.mark.parametrize("size", [32, 41, 100, len(LONG) - 1])
def test_every_passage_of_half_a_window_is_whole_in_one(size):
    whole, *windows = with_windows(LONG, size)
    assert whole == LONG
    for start in range(len(LONG) - size // 2 + 1):
        assert any(LONG[start : start + size // 2] in window for window in windows)


def test_windows_hold_whole_words_and_little_more_than_their_size():
    windows = with_windows(LONG, 40)[1:]
    words = set(LONG.split())
    assert all(set(window.split()) <= words for window in windows)
    assert all(40 <= len(window) <= 40 + 2 * len("word100") for window in windows)
    assert {window.strip() for window in with_windows(" " * 100 + "word", 40)[1:]} == {"word"}  # none of space alone
    without_spaces = with_windows("x" * 1000, 40)[1:]
    assert all(40 <= len(window) <= 40 + 64 for window in without_spaces)


def test_the_highest_score_of_a_text_and_its_windows_counts():
    def score(texts):
        return np.array([text.count("jane") / max(1, len(text)) for text in texts])

    texts = ["jane", "", LONG, LONG + " jane " + LONG]
    found = highest_scores(score, texts, 40)
    assert found.tolist() == [max(score(with_windows(text, 40))) for text in texts]
    assert found[3] > 5 * score(texts)[3]
    assert np.isnan(highest_of(np.array([1.0, np.nan, 2.0]), [["a", "b"], ["c"]])).tolist() == [True, False]
    assert highest_of(np.zeros(0), []).shape == (0,)


def widened_slowly(text, start, end):
    for _ in range(LONGEST_WORD):
        start -= start > 0 and not text[start - 1].isspace()
        end += end < len(text) and not text[end].isspace()
    return text[start:end]


@pytest.mark.parametrize("signs", ["ab ", "ab\n\x1c\x85\u2028\u3000\u200b", "a" * 60 + " ", "a"])
def test_windows_are_widened_as_step_by_step(signs):
    draws = random.Random(0)
    for _ in range(200):
        text, size = "".join(draws.choices(signs, k=draws.randint(0, 300))), draws.randint(1, 120)
        last = len(text) - size
        starts = [*range(0, last, max(1, size // 2)), last] if last > 0 else []
        windows = [widened_slowly(text, start, start + size) for start in starts]
        assert with_windows(text, size) == [text, *(window for window in windows if not window.isspace())]
