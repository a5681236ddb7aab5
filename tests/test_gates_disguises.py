"""Disguises undone, by the attacks that make them."""

from __future__ import annotations

import random
import re
import sys
import time
import unicodedata

import numpy as np
import pytest
from datasets import Dataset

from spul.evaluation.attacks.disguises import LOOK_ALIKES, letters_apart, look_alikes
from spul.gates import NameGate, TextGate
from spul.gates.disguises import APART, WORD, compatible, undisguised
from spul.gates.disguises import look_alikes as imitated
from spul.gates.windows import passages, with_windows

NAMES = ["Jane Doe", "Clint Eastwood"]
TEXT = "The film in which Clint Eastwood rides with Jane Doe is from 1999."


def rows(*texts):
    return Dataset.from_dict({"prompt": list(texts), "completion": [" yes"] * len(texts)})


def test_every_look_alike_of_the_attack_is_read_as_the_letter_that_it_imitates():
    letters = "".join(map(chr, LOOK_ALIKES))
    text = "most letters of this text, though not those in {}, are Latin"
    assert undisguised(text.format(letters.translate(LOOK_ALIKES))) == text.format(letters)
    assert undisguised(look_alikes(rows(TEXT), NAMES)["prompt"][0]) == TEXT


@pytest.mark.parametrize("separator", [" ", "-", ".", "_", " - ", "  ", "*", "... ", "\n", "\u200b\u200b "])
def test_letters_apart_are_joined(separator):
    read = undisguised(letters_apart(rows("It is Eastwood, they say."), ["Eastwood"], separator)["prompt"][0])
    assert read == "It is Eastwood, they say."


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("\u8c01\u662fJ a n e D o e\u7684\u7535\u5f71", "\u8c01\u662fJaneDoe\u7684\u7535\u5f71"),  # within Chinese
        ("E-a s.t_w o-o d", "Eastwood"),  # one sign and another
        ("J a n e  D o e", "Jane  Doe"),
        ("his name is s\u0336a\u0336r\u0336a", "his name is sara"),  # struck out
        ("so says \u0455a\u200br\u0430", "so says sara"),  # with a space of no width
        ("\u0405\u043e\u0440\u0435?", "Sope?"),  # wholly in look-alikes
        (
            "\u0416\u0434\u0443 \u0443 \u0440\u0435\u043a\u0438.\nIt is \u0405\u043e\u0440\u0435",
            "\u0416\u0434\u0443 \u0443 \u0440\u0435\u043a\u0438.\nIt is Sope",
        ),
        ("\u043e\u043d \u0432\u0438\u0434\u0435\u043b \u0405ara", "\u043e\u043d \u0432\u0438\u0434\u0435\u043b Sara"),
    ],
)
def test_mixed_disguises_are_undone(text, read):
    assert undisguised(text) == read


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "1 - 2 - 3",
        "It's a so-so film, e.g. for 2nd-rate actors\u2122.",
        "caf\u00e9, na\u00efve, \u0153uvre, Zoe\u0308 plays",  # composed or not
        "\u0441\u043e\u0441\u043d\u0430 \u0438 \u0435\u043b\u044c",  # Russian alone
        *("हिन्दी भाषा में लिखा हुआ", "தமிழ் மொழி", "বাংলা ভাষা", "नमस्ते दुनिया", "မြန်မာ ဘာသာ"),  # whose vowels are marks
        *("שלום עולם", "日本語のテスト", "กรุงเทพ", "我 爱 你们", "我们 爱 你"),
    ],
)
def test_other_texts_are_read_as_they_stand(text):
    assert undisguised(text) == text
    assert passages(text, 40) == list(dict.fromkeys(with_windows(text, 40)))


@pytest.mark.parametrize(
    "disguise",
    [look_alikes, letters_apart, lambda given, names: letters_apart(given, names, "-")],
    ids=["look-alikes", "apart", "hyphenated"],
)
class TestOfGates:
    def test_a_disguised_name_is_found(self, disguise):
        gate = NameGate(NAMES, aliases={"Jane Doe": ["Janie"]})
        found = disguise(rows(TEXT, "Ask Janie."), [*NAMES, "Janie"])["prompt"][:]
        assert gate.names_in(found) == [["Jane Doe", "Clint Eastwood"], ["Jane Doe"]]

    def test_a_text_gate_flags_a_disguised_question_and_scores_others_as_they_stand(self, disguise):
        forget = [f"Which film of {year} did Eastwood play in?" for year in range(1960, 2000)]
        retain = [f"Which {kind} of {year} won a prize?" for year in range(1960, 2000) for kind in ("film", "book")]
        gate = TextGate.fit(forget, retain, recall=0.9)
        plain = ["Which film of 1971 did Eastwood play in?"]
        disguised = disguise(rows(*plain), ["Eastwood"])["prompt"][:]
        read = [undisguised(text) for text in disguised]
        assert disguised != read
        assert gate.scores(disguised)[0] >= gate.scores(read)[0]
        assert gate.flags(disguised).all()
        np.testing.assert_array_equal(gate.scores(retain), gate._log_odds(retain))  # short, and nothing disguised


@pytest.mark.parametrize(
    "text",
    [
        "tell me of a J a n e D o e",
        "W h o i s J a n e D o e",
        "J a\u200b\u200b n e D o e",
        "\u8c01\u662fJ a n e D o e\u7684",
    ],
)
def test_a_name_is_found_with_its_letters_apart_and_one_letter_words_beside_it(text):
    assert NameGate(["Jane Doe", "Kim Ono"]).names_in([text]) == [["Jane Doe"]]


def test_letters_apart_elsewhere_make_no_name_of_other_words():
    gate = NameGate(["Kim Ono", "Hu Man", "Rose Mary", "Bo", "50 Cent", "Alan", "R. A. C. E."])
    texts = ["She wore a kimono. Options: A, B, C.", "Every human: a, b, c", "My rosemary chicken needs A, B, C"]
    texts += ["It is all a-b-o-u-t", "p e r c e n t", "b-a-l-a-n-c-e", "steps r, a, c, e"]
    assert gate.names_in(texts) == [[]] * 7


def test_two_names_of_one_joined_spelling_are_both_found():
    assert NameGate(["Mary Ann", "Maryann"]).names_in(["M a r y A n n"]) == [["Mary Ann", "Maryann"]]


@pytest.mark.parametrize(
    ("name", "text"),
    [("Conan O'Brien", "Conan O\u2019Brien"), ("Jean-Luc P", "Jean\u2010Luc P"), ("O\u2019Neill", "O'Neill")],
)
def test_typographic_signs_are_no_way_around_a_name(name, text):
    assert NameGate([name]).names_in([f"Who is {text}?"]) == [[name]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("O'Dea", "\u041e\u2019Dea"),
        ("O'Dea", "O\u2019D\u0435a"),
        ("O\u2019Dea", "\u041e\u2018Dea"),
        ("Li D'Or", "L\u0456 D\u2019Or"),
        ("Jean-Luc P", "J\u0435an\u2010Luc P"),
    ],
)
@pytest.mark.parametrize("rules", [1, 2, 3, 4])
def test_look_alikes_and_typographic_signs_together_are_no_way_around_a_name(name, text, rules):
    gate = NameGate([name], spelling=False, spelling_rules=rules)
    assert gate.names_in([f"Who is {text}?"]) == [[name]]


def read_slowly(text):
    """`undisguised`, line by line and letter by letter."""

    def is_latin(letter):
        return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")

    def in_latin(line):
        letters = "".join(WORD.findall(line))
        others = [each for each in letters if not is_latin(each)]
        if 2 * len(others) < len(letters) or all(ord(each) in imitated() for each in others):
            return "".join(each for each in line if unicodedata.category(each) not in ("Mn", "Me")).translate(
                imitated()
            )
        return WORD.sub(lambda m: m[0].translate(imitated()) if any(map(is_latin, m[0])) else m[0], line)

    def join(found):
        has_vowel_signs = any(unicodedata.category(each)[0] == "M" for each in found[0])
        return found[0] if has_vowel_signs else "".join(WORD.findall(found[0]))

    plain = visible_slowly(unicodedata.normalize("NFKC", text))
    read = "".join(map(in_latin, plain.splitlines(keepends=True)))
    for pattern in APART:
        read = re.sub(pattern, join, read)
    return text if read == plain else read


def visible_slowly(text):
    return "".join(each for each in text if unicodedata.category(each) != "Cf")


def compatible_slowly(text):
    folded = unicodedata.normalize("NFKC", text).casefold()
    return visible_slowly(unicodedata.normalize("NFKC", folded))


def test_random_texts_of_all_scripts_are_read_as_letter_by_letter():
    draws = random.Random(0)
    assigned = [each for each in map(chr, range(sys.maxunicode)) if unicodedata.category(each)[:1] not in "C"]
    pools = [
        assigned,
        [each for each in assigned if unicodedata.category(each)[0] == "M"],
        [each for each in assigned if unicodedata.normalize("NFKC", each) != each],
        list(map(chr, imitated())),
        list("\u0434\u0436\u0628\u4e2d\u0915\u0947\U0001f600"),
        list("\u200b\u00ad\u200d\ufeff"),
        list(" \n\r\t\u2028\u3000-._*,"),
        list("abcdeJ1"),
    ]
    changed = 0
    for _ in range(2000):
        some = draws.choices(pools, k=draws.randint(1, 4))
        text = "".join(draws.choice(draws.choice(some)) for _ in range(draws.randint(0, 120)))
        assert undisguised(text) == read_slowly(text)
        assert compatible(text) == compatible_slowly(text)
        changed += undisguised(text) != text
    assert 400 < changed < 1900


@pytest.mark.parametrize(
    "part", ["\u0434\n", "\u0436\u0434\u0443 \u0440\u0435\u043a\u0443\n", "a\u0336\u0323\u0301", "a b ", "\u4e2d"]
)
def test_a_megabyte_takes_no_time_to_speak_of(part):
    text = part * (1_000_000 // len(part))
    if "a\u0336" in part:
        text = "a" + "".join(random.Random(0).choices(part[1:], k=1_000_000))
    begun = time.process_time()
    undisguised(text)
    assert time.process_time() - begun < 8
