"""Words in pieces, joined, and with digits for letters, against plain searches of every way to read them."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from itertools import combinations, pairwise

import pytest
from gated_texts import forget_texts, retain_texts

from spul.gates import TextGate, load
from spul.gates.spelling import Spelling, english_words

WORDS = {"tom": 1, "hanks": 5, "washington": 7, "jane": 2, "the": 0, "film": 1, "in": 0, "chan": 4, "1999": 1}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("to m ha nks", "to m hanks"),  # words of three letters stay in pieces
        ("w ash ing ton, was\thingt\non", "washington, washington"),
        ("tomhanks is in thefilm", "tom hanks is in the film"),
        ("directorwashingtonshouts", "director washington shouts"),
        ("h4nk5 and W45h1ng70n, t0m", "hanks and washington, tom"),
        ("chan9", "chan"),  # an edit: 9 stands for no letter
        ("h4nsk", "hanks"),  # an edit beside the digit
    ],
)
def test_pieces_are_joined_joined_words_parted_and_digits_read_as_letters(text, read):
    assert Spelling(WORDS).corrected([text]) == [read]
    assert Spelling(WORDS, rules=1).corrected([text]) != [read] or text in ("chan9", "h4nsk")


SINCE_RULES_3 = [
    ("was-hing-ton, ha.nks", "washington, hanks"),
    ("ha - nks and ha. nks", "hanks and hanks"),
    ("han_ks, tom_hanks", "hanks, tom hanks"),
    ("thewashingtno film", "the washington film"),
    ("hnakswrites", "hanks writes"),
    ("ofhanks", "of hanks"),  # "of" is not known, nor long enough to be a part by the dictionary
]


@pytest.mark.parametrize(("text", "read"), SINCE_RULES_3)
def test_signs_between_pieces_and_joined_words_with_an_edit_are_read_since_rules_3(text, read):
    assert Spelling(WORDS).corrected([text]) == [read]
    before = Spelling(WORDS, rules=2).corrected([text])[0]
    assert before != read
    assert not {"washington", "hanks"} <= set(before.split())


SINCE_RULES_4 = [
    ("ha'nks, w'ash\u2019ington", "hanks, washington"),
    ("j\u00e1n\u00e9 h\u00e1\u00f1k5", "jane hanks"),
    ("h&#97;nks&nbsp;&amp; j&aacute;ne", "hanks & jane"),
    ("wash-\n  ington and wash\u00ad\r\nington", "washington and washington"),
    ("\u029c\u1d00\u0274\u1d0b\ua731 ha\u3164nks", "hanks hanks"),
    ("\U0001f157\U0001f150\U0001f15d\U0001f15a\U0001f162 \U0001f177ank\U0001f182", "hanks hanks"),
]


@pytest.mark.parametrize(("text", "read"), SINCE_RULES_4)
def test_apostrophes_accents_references_cut_lines_and_styled_letters_are_read_since_rules_4(text, read):
    assert Spelling(WORDS).corrected([text]) == [read]
    assert Spelling(WORDS, rules=3).corrected([text]) != [read]


def test_references_of_any_length_are_read():
    zeros = "0" * 10_000
    texts = [f"h&#{zeros}97;nks", f"j&#x{zeros}61;ne", f"j&#97;ne &#{'9' * 10_000};"]
    assert Spelling(WORDS).corrected(texts) == ["hanks", "jane", "jane &#;"]


@pytest.mark.parametrize("text", ["we're, he'll, I\u2019m", "l'ange, qu'on", "don't, qu\u2019on l\u2019ange"])
def test_apostrophes_of_contractions_and_elisions_part_no_pieces(text):
    known = {"were": 1, "hell": 1, "dont": 1, "chans": 1, "lange": 1, "quon": 1}
    assert Spelling(known, sys.maxsize).corrected([text]) == [text]
    assert Spelling(known, sys.maxsize).corrected(["w'ere h'ell"]) == ["were hell"]


def test_a_short_known_word_is_parted_from_function_words_alone_where_many_letters_are_asked_for():
    known = {"bach": 1.0, "lee": 1.0}
    texts = ["bybach", "whoisbach", "leethat", "goldbach", "filmbach", "bachmann"]
    read = ["by bach", "who is bach", "lee that", *texts[3:]]
    assert Spelling(known, sys.maxsize, least_joined=6).corrected(texts) == read
    assert Spelling(known, sys.maxsize, rules=3, least_joined=6).corrected(texts) == texts


def test_one_may_stand_for_either_letter():
    assert Spelling({"bullock": 1, "williams": 1}).corrected(["bu11ock w1ll1am5"]) == ["bullock williams"]


@pytest.mark.parametrize(
    "text",
    [
        "c h a n g i n g",  # undisguised as a whole, and no chan
        "g e n r e t he film",  # "the" has three letters, and would begin within letters apart
        "m o v i e c han",
        "in the 1840s, the 100th of 70m at 1999 and 19 99",
        "ch---- an, ch  -  an",
        "w e - r e, we 're",
        "xqzhanks",  # a part of which is no word
        "the film",
        "thebb",
        "handale",  # two words of English, of which none is known
        "\u6211\u770b\u7535\u5f71hanks",
    ],
)
def test_other_texts_stay(text):
    assert Spelling(WORDS).corrected([text]) == [text]


def test_words_of_english_side_by_side_are_joined_only_if_one_is_short():
    known = {"newman": 1, "another": 1}
    assert Spelling(known).corrected(["a new man, an other"]) == ["a new man, another"]


def without_pieces_slowly(text, words, start=0):
    """Every run of words from the left, the longest first."""
    found = list(re.finditer(r"\w+", text))
    lengths = "".join("1" if len(one.group()) == 1 else "2" for one in found)
    apart = {k for some in re.finditer("111+", lengths) for k in range(*some.span())}
    for i in range(len(found)):
        if found[i].start() < start or {i - 1, i} <= apart:
            continue
        for j in range(len(found) - 1, i, -1):
            run = [one.group() for one in found[i : j + 1]]
            gaps = [text[one.end() : other.start()] for one, other in pairwise(found[i : j + 1])]
            gaps = [" " if re.fullmatch(r" ?[-.] ?", gap) else gap for gap in gaps]
            doubtful = any(len(one) < 3 or (one not in words and one not in english_words()) for one in run)
            word = "".join(run)
            if (
                all(map(str.isspace, gaps))
                and doubtful
                and max(map(len, run)) > 1
                and len(word) > 3
                and word in words
                and not word.isdecimal()
                and not {j, j + 1} <= apart
            ):
                end = found[j].end()
                rest = without_pieces_slowly(text, words, end)
                return text[: found[i].start()] + word + rest[end:]
    return text


def test_pieces_of_random_texts_are_joined_as_a_plain_search_joins_them():
    draws, spelling, changed = random.Random(0), Spelling(WORDS), 0
    for _ in range(600):
        text = "".join(
            "".join(letter + draws.choice(["", "", "", " ", "\n", " - "]) for letter in draws.choice(list(WORDS)))
            + draws.choice([" ", ". ", "  "])
            for _ in range(draws.randint(1, 6))
        )
        expected = without_pieces_slowly(text, WORDS)
        assert spelling._without_pieces(text) == expected
        changed += expected != text
    assert 100 < changed < 500


def parted_slowly(word, words):
    """The number of parts of the best of all ways to part a word, and the sum of their counts, negated."""
    found = []
    for num in range(len(word)):
        for cuts in combinations(range(1, len(word)), num):
            parts = [word[start:end] for start, end in pairwise([0, *cuts, len(word)])]
            if all((len(one) > 1 and one in words) or (len(one) > 2 and one in english_words()) for one in parts):
                found.append((len(parts), -sum(words.get(one, 0) for one in parts)))
    return min(found, default=None)


def test_random_words_are_parted_as_the_best_of_all_ways_to_part_them():
    draws, spelling, parted = random.Random(1), Spelling(WORDS, rules=2), 0
    known = [word for word in WORDS if word.isalpha()]
    for _ in range(120):
        word = "".join(draws.choices([*known, "x", "an"], k=3))[:13]
        read, best = spelling._parted(word), parted_slowly(word, WORDS)
        if len(word) < 6 or best is None or read == word:
            assert best is None or len(word) < 6 or best[0] == 1 or best[1] >= 0
            assert read == word
        else:
            assert read.replace(" ", "") == word
            parts = read.split()
            assert (len(parts), -sum(WORDS.get(one, 0) for one in parts)) == best
            parted += len(parts) > 1
    assert parted > 40


@pytest.mark.parametrize(
    "part",
    ["ab ", "a b ", "filmtom", "th e fi lm ", "f1lm ", "th'e'", "h\u00e1nks ", "&#97;", "&", "ab-\n", "- ", "<b"],
)
def test_a_long_text_takes_a_time_that_grows_with_its_length(part):
    text, spelling = part * (300_000 // len(part)), Spelling(WORDS)
    begun = time.process_time()
    spelling.corrected([text])
    assert time.process_time() - begun < 5


class TestOfGates:
    def test_a_disguised_question_is_flagged_and_not_by_rules_of_edits_alone(self):
        forget = [f"Which film of {year} did Washington play in?" for year in range(1960, 2000)]
        retain = [f"Which {kind} of {year} won a prize?" for year in range(1960, 2000) for kind in ("film", "book")]
        gate = TextGate.fit(forget, retain, recall=0.9)
        question = "Which film of 1971 {} play in?"
        texts = list(map(question.format, ["did washi ng ton", "did w45h1ng70n", "didwashington"]))
        assert gate.flags(texts).all()
        assert not gate.flags(["Which book of 1971 won a prize?", "Which film of was hi won a prize?"]).any()
        plain = gate.scores([question.format("did washington")])[0]
        assert gate.scores(texts).tolist() == [plain] * 3
        gate.spelling_rules = 1
        del gate.__dict__["_speller"]
        assert (gate.scores(texts) < plain).all()

    def test_common_words_side_by_side_make_no_name_since_rules_4(self, tmp_path):
        forget = [f"Which speech of {year} did Putin give?" for year in range(1960, 2000)]
        retain = [
            f"Which {kind} of {year} did they give?" for year in range(1960, 2000) for kind in ("film", "speech")
        ]
        gate = TextGate.fit(forget, retain, recall=0.9)
        texts = ["Which speech of 1971 did they put in?", "Which speech of 1971 did pu tin give?"]
        assert gate.flags(texts).tolist() == [False, True]
        gate.save(tmp_path)
        path = tmp_path / "gate.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"spelling_rules": 3}))
        before = load(tmp_path).scores(texts)
        assert before[0] > gate.scores(texts)[0]
        assert before[1] == gate.scores(texts)[1]

    def test_a_gate_saved_before_pieces_were_read_reads_as_before(self, tmp_path):
        gate = TextGate.fit(forget_texts(), retain_texts(), recall=0.9)
        gate.save(tmp_path)
        assert load(tmp_path).identity() == gate.identity()
        path = tmp_path / "gate.json"
        fields = json.loads(path.read_text())
        assert fields.pop("spelling_rules") == 4
        path.write_text(json.dumps(fields))
        before = load(tmp_path)
        texts = ["j4n3 do e of plot", "janedoe in a plot", "jnae doe"]
        assert before.spelling_rules == 1
        assert before.identity() != gate.identity()
        assert (before.scores(texts[:2]) < gate.scores(texts[:2])).all()
        assert before.scores(texts[2:]) == gate.scores(texts[2:])
        path.write_text(json.dumps({**fields, "spelling_rules": 2}))
        between = load(tmp_path)
        assert between.scores(texts).tolist() == gate.scores(texts).tolist()
        assert between.scores(["j-an-e d-oe of plot"]) < gate.scores(["j-an-e d-oe of plot"])
        before.save(tmp_path)
        assert "spelling_rules" not in json.loads(path.read_text())
        assert load(tmp_path).identity() == before.identity()

    @pytest.mark.parametrize("rules", [0, 5, True, "2"])
    def test_rules_that_this_version_does_not_have_are_refused(self, tmp_path, rules):
        TextGate.fit(forget_texts(), retain_texts(), recall=0.9).save(tmp_path)
        path = tmp_path / "gate.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"spelling_rules": rules}))
        with pytest.raises(ValueError, match=rf"spelling_rules is {rules!r}.*a number from 1 to 4"):
            load(tmp_path)
