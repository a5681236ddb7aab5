"""Misspelled words, against a plain search by a table of edits."""

from __future__ import annotations

import json
import random
import string
from importlib.metadata import version

import numpy as np
import pytest
from gated_texts import forget_texts, retain_texts

from spul.gates import NameGate, TextGate, load
from spul.gates.spelling import Spelling, dictionary_digest, english_words

WORDS = {
    "sandler": 3.0,
    "handler": -1.0,
    "william": 1.0,
    "williams": 2.0,
    "jane": 1.0,
    "lane": 0.5,
    "doe": 1.0,
    "to": 0.1,
    "the": 0.0,
    "1999": 5.0,
    "schwarzenegger": 1.0,
}


def edits(one, other):
    """Drops, additions, changes and swaps of neighbors between two words: the plain recursion as a table."""
    table = [[i + j for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            ways = [table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (one[i - 1] != other[j - 1])]
            if i > 1 and j > 1 and one[i - 2 : i] == other[j - 1] + other[j - 2]:
                ways.append(table[i - 2][j - 2] + 1)
            table[i][j] = min(ways)
    return table[-1][-1]


def nearest(word, one_edit=3, two_edits=7, words=WORDS):
    if word in words or word in english_words() or sum(c.isalpha() for c in word) < one_edit - 1:
        return word
    found = []
    for known, counts in words.items():
        letters, distance = sum(c.isalpha() for c in known), edits(word, known)
        if letters >= one_edit and (distance <= 1 or (distance == 2 and letters >= two_edits)):
            found.append((distance, -counts, known))
    return min(found)[-1] if found else word


def misspelled_words(num=400, words=WORDS, signs="aelnrsz9"):
    draws = random.Random(0)
    for _ in range(num):
        word = draws.choice(list(words))
        for _ in range(draws.randrange(4)):
            i, sign = draws.randrange(len(word)), draws.choice(signs)
            word = draws.choice(
                [
                    word[:i] + word[i + 1 :],
                    word[:i] + sign + word[i:],
                    word[:i] + sign + word[i + 1 :],
                    word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :],
                ]
            )
            if not word:
                break
        if word:
            yield word


@pytest.mark.parametrize("letters", [(3, 7), (4, 9)])
def test_words_are_read_as_a_plain_search_reads_them(letters):
    spelling = Spelling(WORDS, *letters)
    words = [*misspelled_words(), *WORDS]
    expected = [nearest(word, *letters) for word in words]
    assert spelling.corrected(words) == expected
    assert 60 < sum(word != other for word, other in zip(words, expected, strict=True)) < 380


def many_words(signs, num):
    draws = random.Random(1)
    return {"".join(draws.choices(signs, k=draws.randint(2, 12))): draws.random() for _ in range(num)}


# The last two are of the same groups as the first two.
@pytest.mark.parametrize("signs", ["abcde\u0161\u00e1\u00e2", string.ascii_lowercase])
def test_among_many_words_the_nearest_is_the_one_of_a_plain_search(signs):
    known = many_words(signs, 300)
    words = list(misspelled_words(100, known, signs))
    assert Spelling(known, rules=1).corrected(words) == [nearest(word, words=known) for word in words]


def test_few_of_many_words_are_compared_letter_by_letter():
    known = many_words(string.ascii_lowercase, 5000)
    spelling = Spelling(known)
    assert np.mean([len(spelling._like(word, 2)) for word in misspelled_words(50, known)]) < 500


def test_of_equally_near_words_the_one_that_counts_most_is_taken():
    assert Spelling(WORDS).corrected(["qandler"]) == ["sandler"]
    assert Spelling({**WORDS, "handler": 9.0}).corrected(["qandler"]) == ["handler"]


def test_words_of_english_are_not_misspelled_ones():
    known = {"wilde": 1.0, "bond": 1.0, "williams": 1.0, "kissinger": 1.0}
    texts = ["wide", "bind", "Kissing William", "the wilder side"]
    assert Spelling(known).corrected(texts) == texts
    assert Spelling(known).corrected(["wlide", "bondd", "kisinger wiliams"]) == ["wilde", "bond", "kissinger williams"]
    assert {"wide", "don't", "william"} <= english_words()


def test_known_words_numbers_and_short_words_stay_and_a_text_of_them_is_returned_as_given():
    texts = ["To Jane \u2014 the HANDLER, in 1998 and 1998!", "a b", "", "\uff2a\uff41\uff4e\uff45"]
    assert Spelling(WORDS).corrected(texts) == texts


def test_letters_of_other_sizes_digits_and_accents_are_one_edit_each():
    found = Spelling(WORDS).corrected(["Was S4ndler s\u00e1ndler?", "S@ndler", "schwarzneger's"])
    assert found == ["was sandler sandler?", "s@sandler", "schwarzenegger's"]


@pytest.fixture
def other_dictionary(monkeypatch):
    monkeypatch.setattr("spul.gates.spelling.english_words", lambda: frozenset({"a", "the"}))
    dictionary_digest.cache_clear()
    yield
    dictionary_digest.cache_clear()


@pytest.mark.parametrize("kind", ["names", "text"])
def test_a_gate_that_reads_spelling_is_another_one_by_another_dictionary_and_says_so(tmp_path, caplog, request, kind):
    def make(spelling):
        if kind == "names":
            return NameGate(["Jane Doe"], spelling=spelling, spelling_rules=3 if spelling else 1)
        return TextGate.fit(forget_texts(), retain_texts(), recall=0.9, spelling=spelling)

    spelled, as_it_is = make(True), make(False)
    identities = [spelled.identity(), as_it_is.identity()]
    spelled.save(tmp_path / "spelled")
    as_it_is.save(tmp_path / "plain")
    load(tmp_path / "spelled")
    load(tmp_path / "plain")
    assert not caplog.records
    expected = json.loads((tmp_path / "spelled" / "gate.json").read_text())["dictionary_sha256"]
    assert "dictionary" not in (tmp_path / "plain" / "gate.json").read_text()

    request.getfixturevalue("other_dictionary")
    assert load(tmp_path / "plain").identity() == identities[1]
    assert not caplog.records
    again = load(tmp_path / "spelled")
    assert again.identity() != identities[0]
    (said,) = caplog.messages
    assert f"{tmp_path / 'spelled' / 'gate.json'} reads misspelled words by a dictionary" in said
    assert expected in said
    assert dictionary_digest() in said
    assert f"pyspellchecker {version('pyspellchecker')}" in said
    again.save(tmp_path / "spelled")
    assert load(tmp_path / "spelled").identity() == again.identity()
    assert len(caplog.records) == 1


def test_a_gate_saved_before_its_dictionary_was_noted_loads_and_a_damaged_digest_does_not(tmp_path, caplog):
    NameGate(["Jane Doe"], spelling=True).save(tmp_path)
    path = tmp_path / "gate.json"
    fields = json.loads(path.read_text())
    del fields["dictionary_sha256"]
    path.write_text(json.dumps(fields))
    assert load(tmp_path).flags(["jnae doe"]).tolist() == [True]
    assert not caplog.records
    path.write_text(json.dumps({**fields, "dictionary_sha256": 5}))
    with pytest.raises(ValueError, match="dictionary_sha256 is 5"):
        load(tmp_path)


def test_a_word_is_read_although_another_thread_empties_the_cache():
    class Emptied(dict):
        def __setitem__(self, word, known):
            super().__setitem__(word, known)
            self.clear()

    spelling = Spelling({"wilde": 1.0})
    spelling._cache = Emptied()
    assert spelling.near("wilds") == ["wilde"]
