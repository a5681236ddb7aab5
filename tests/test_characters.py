"""Unicode's normal forms, against those of `unicodedata`."""

from __future__ import annotations

import random
import re
import sys
import time
import unicodedata

import pytest

from spul.data.characters import MOST_SIGNS, is_latin, normal_form, whole_words, words

ASSIGNED = [each for each in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(each) not in ("Cn", "Co")]
SIGNS = [each for each in ASSIGNED if unicodedata.category(each)[0] == "M"]
DECOMPOSED = [each for each in ASSIGNED if unicodedata.normalize("NFKD", each) != each]
# Signs that are several signs, that are so in one form alone, or whose order counts.
SEVERAL = [*"\u0344\u0f73\u0f75\u0f81\uff9e\uff9f\u0323\u0301\u0300\u093c", "e\u0323"]


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_normal_forms_are_those_of_the_standard_library(form):
    draws = random.Random(0)
    many = 0
    for _ in range(1500):
        pools = draws.choices([ASSIGNED, SIGNS, SIGNS, DECOMPOSED, SEVERAL, list("ae ")], k=draws.randint(1, 3))
        text = "".join(draws.choice(draws.choice(pools)) for _ in range(draws.randint(0, 4 * MOST_SIGNS)))
        many += pools[0] is SIGNS and len(text) > MOST_SIGNS
        assert normal_form(form, text) == unicodedata.normalize(form, text)
    assert many > 50


def test_many_signs_on_one_letter_take_no_time_to_speak_of():
    text = "a" + "".join(random.Random(0).choices("\u0336\u0323\u0301", k=300_000))  # two minutes by unicodedata
    begun = time.process_time()
    found = normal_form("NFKC", text)
    assert time.process_time() - begun < 20
    assert found[:2] == "\u1ea1\u0336"
    assert found.count("\u0336") == text.count("\u0336")


@pytest.mark.parametrize(
    ("name", "found", "not_found"),
    [
        ("Jane  Doe", ["jane doe", "请问JANE\nDOE是", "アジjane doeア"], ["janes doe", "jane does", "jane_doe"]),
        ("李明", ["李明", "请问李明是谁", "a李明b"], ["李 明"]),
        ("アン", ["アンは", "はアン", "xアンx"], ["アンテナ", "ジアン"]),
        ("C++", ["c++", "アC++是"], ["C++x", "xC++", "C++ア"]),
    ],
)
def test_whole_words_in_scripts_with_and_without_spaces(name, found, not_found):
    pattern = re.compile(whole_words(["zoe", name]), re.IGNORECASE)
    assert all(map(pattern.search, found))
    assert not any(map(pattern.search, not_found))


def test_names_of_one_script_share_what_may_not_stand_around_them():
    pattern = whole_words([*(f"jane doe{i}" for i in range(300)), "李明", "jane roe"])
    assert pattern.count("(?<!") == pattern.count("(?!") == 2
    found = re.compile(pattern, re.IGNORECASE).findall("Jane Doe299李明, jane doe2990, JANE  ROE")
    assert found == ["Jane Doe299", "李明", "JANE  ROE"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" José's cat, 2nd!", ["José", "s", "cat", "2nd"]),
        ("e\u0301te\u0301 a", ["e\u0301te\u0301", "a"]),
        ("प्रिया दिल्ली", ["प्रिया", "दिल्ली"]),
        ("กรุงเทพ x", ["ก", "รุ", "ง", "เ", "ท", "พ", "x"]),
        ("ジェーンは猫ABC", ["ジェーン", "は", "猫", "ABC"]),
        ("서울에서", ["서", "울", "에", "서"]),
        ("Анна.Ёлкина", ["Анна", "Ёлкина"]),
    ],
)
def test_words_are_whole_with_their_signs_and_characters_where_there_are_no_spaces(text, expected):
    assert words(text) == expected


def test_only_letters_and_digits_of_another_script_make_a_text_no_latin_one():
    assert all(map(is_latin, ["", "a 1 ?", "José, Łódź, ﬁ", "½ µm² — “x” £", "\u02bcO", "e\u0301", "。"]))
    assert not any(map(is_latin, ["a я", "中", "ก", "ω", "١٩", "한", "\u0915\u093f"]))
