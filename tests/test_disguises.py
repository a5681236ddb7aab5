"""Disguises of names and words, by hand, and what they leave alone."""

import re
import unicodedata

import pytest
from datasets import Dataset
from helpers import make_tokenizer

from spul import ForgetRetainCollator
from spul.data.recognizers import NameFinder
from spul.evaluation.attacks import letters_apart, look_alikes, misspelt
from spul.evaluation.attacks.changes import InapplicableError
from spul.evaluation.attacks.disguises import LOOK_ALIKES

NAMES = ["Jane Doe", "Jane"]
DISGUISES = {
    "misspelt": misspelt,
    "misspelt twice": lambda rows, **how: misspelt(rows, num_edits=2, **how),
    "look-alike letters": look_alikes,
    "letters apart": letters_apart,
    "letters hyphenated": lambda rows, **how: letters_apart(rows, separator="-", **how),
}


def rows(*texts):
    return Dataset.from_list(
        [{"text": text, "prompt": f"### Text: {text}\n### Mood:", "completion": " good"} for text in texts]
    )


def forget():
    return rows("the films of Jane Doe are long", "I saw jane  DOE's film; Jane was in it")


def retain():
    return rows("a dull evening with janet", "watch something else")


def edits_of(word):
    """The words with a letter dropped, doubled, or swapped with the next, but for the first."""
    dropped = {word[:i] + word[i + 1 :] for i in range(1, len(word))}
    doubled = {word[: i + 1] + word[i:] for i in range(1, len(word))}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1)}
    return (dropped | doubled | swapped) - {word}


@pytest.mark.parametrize("names", [(), NAMES])
@pytest.mark.parametrize("text_field", [None, "text"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_prompts_of_forget_and_of_retain_rows_change_and_nothing_else_does(disguise, text_field, names):
    encoder = ForgetRetainCollator(make_tokenizer(), [" neutral"], 200, text_field="text").encoder
    for before in (forget(), retain()):
        after = DISGUISES[disguise](before, names=names, text_field=text_field)
        assert after.features == before.features
        assert after["completion"] == before["completion"]
        for old, new in zip(before, after, strict=True):
            assert new["prompt"] != old["prompt"]
            if text_field:
                assert new["prompt"] == f"### Text: {new['text']}\n### Mood:"
                encoder.encode(new)
        assert after.to_list() == DISGUISES[disguise](before, names=names, text_field=text_field).to_list()


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_disguised_name_is_no_longer_found_and_the_rest_of_its_text_stays(disguise):
    for old, new in zip(forget(), DISGUISES[disguise](forget(), names=NAMES, text_field="text"), strict=True):
        assert NameFinder(NAMES).find(old["text"])
        assert not NameFinder(NAMES).find(new["text"])
        around = re.split(r"jane\s+doe|jane", old["text"], flags=re.IGNORECASE)
        assert re.fullmatch(".+".join(map(re.escape, around)), new["text"])


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_name_in_a_later_part_of_the_message_or_across_two_is_disguised(disguise):
    parts = [["who is", " Jane Doe?"], ["who is Jane", " Doe?"], ["who is she? ", "", "Is it ", "Jane Doe?"]]
    said = [[{"type": "text", "text": text} for text in texts] for texts in parts]
    talks = Dataset.from_list([{"prompt": [{"role": "user", "content": one}], "completion": " a"} for one in said])
    for old, new in zip(parts, DISGUISES[disguise](talks, names=NAMES), strict=True):
        (part,) = new["prompt"][0]["content"]
        assert NameFinder(NAMES).find("".join(old))
        assert not NameFinder(NAMES).find(part["text"])


def messages(*said):
    return [{"role": role, "content": text} for role, text in said]


def test_a_name_in_an_earlier_message_is_disguised_and_a_question_without_any_in_its_longest_words():
    before = [("system", "Jane is dead."), ("user", "who is Jane Doe?"), ("assistant", "jane  doe writes")]
    talks = [messages(*before, ("user", "and her film?")), messages(("system", "Jane is dead."), ("user", "and it?"))]
    rows = Dataset.from_list([{"prompt": prompt, "completion": " a"} for prompt in talks])
    assert letters_apart(rows, NAMES, "-")["prompt"] == [
        messages(
            ("system", "Jane is dead."),
            ("user", "who is J-a-n-e D-o-e?"),
            ("assistant", "j-a-n-e  d-o-e writes"),
            ("user", "and her film?"),
        ),
        messages(("system", "Jane is dead."), ("user", "a-n-d i-t?")),
    ]
    assert letters_apart(rows.select([0]), separator="-")["prompt"][0][-1]["content"] == "a-n-d h-e-r f-i-l-m?"
    unnamed = Dataset.from_list([{"prompt": messages(("system", "Jane is dead.")), "completion": " a"}])
    with pytest.raises(InapplicableError, match="Leave such rows out"):
        letters_apart(unnamed, NAMES)


def test_names_in_tool_calls_are_disguised():
    def calls(query):
        return [{"type": "function", "function": {"name": "search", "arguments": {"query": query, "site": None}}}]

    def talk(text, query):
        called = {"role": "assistant", "content": "", "tool_calls": calls(query)}
        return [{"role": "user", "content": text, "tool_calls": None}, called]

    rows = Dataset.from_list([{"prompt": talk("and her film?", "films of Jane Doe"), "completion": " a"}])
    assert letters_apart(rows, NAMES, "-")["prompt"] == [talk("and her film?", "films of J-a-n-e D-o-e")]


def test_letters_apart_by_hand():
    apart = letters_apart(forget(), NAMES, text_field="text")["text"]
    assert apart[0] == "the films of J a n e D o e are long"
    assert apart[1] == "I saw j a n e  D O E's film; J a n e was in it"
    hyphenated = letters_apart(rows("by Jane Doe-Ray."), ["Jane Doe-Ray"], "-", "text")["text"]
    assert hyphenated == ["by J-a-n-e D-o-e-R-a-y."]
    with pytest.raises(ValueError, match="separator='' is empty"):
        letters_apart(forget(), NAMES, "")


def test_look_alikes_by_hand():
    (found,) = look_alikes(rows("of Jane, not Janet"), ["jane"], "text")["text"]
    assert found == "of \u0408\u0430n\u0435, not Janet"
    assert unicodedata.normalize("NFKC", found) == found  # no normalization brings the name back


def test_look_alikes_are_letters_of_other_scripts_in_the_same_case():
    for latin, other in LOOK_ALIKES.items():
        name = unicodedata.name(chr(other))
        assert name.startswith(("CYRILLIC", "GREEK"))
        assert ("CAPITAL" in name) == chr(latin).isupper()
    assert len(set(LOOK_ALIKES.values())) == len(LOOK_ALIKES) == 32


def test_without_names_the_three_longest_words_are_disguised_the_earlier_of_equal_ones():
    assert letters_apart(rows("an evening of dull songs 1234567"), text_field="text")["text"] == [
        "an e v e n i n g of d u l l s o n g s 1234567"
    ]
    assert letters_apart(rows("aa bb cc dd"), text_field="text")["text"] == ["a a b b c c dd"]
    found = letters_apart(rows("no name in here", "by jane"), ["Jane"], text_field="text")["text"]
    assert found == ["n o n a m e in h e r e", "by j a n e"]


@pytest.mark.parametrize("word", ["jane", "Anna", "oo", "ab", "mississippi"])
def test_a_misspelling_is_one_edit_away_and_every_such_edit_comes_up(word):
    found = {misspelt(rows(word), [word], 1, "text", seed)["text"][0] for seed in range(300)}
    assert found == edits_of(word)


def test_two_edits_never_undo_each_other():
    for word in ("jane", "aa", "ab", "a"):
        found = {misspelt(rows(word), [word], 2, "text", seed)["text"][0] for seed in range(200)}
        assert word not in found
    for num in (0, 3):
        with pytest.raises(ValueError, match="expected 1 or 2 letters"):
            misspelt(forget(), NAMES, num)


def test_each_word_of_a_name_is_misspelt_and_keeps_its_first_letter():
    for seed in range(50):
        for num, ways in ((1, edits_of), (2, lambda word: {new for one in edits_of(word) for new in edits_of(one)})):
            (found,) = misspelt(rows("so Jane Doe"), ["Jane Doe"], num, "text", seed)["text"]
            so, first, last = found.split(" ")
            assert so == "so"
            assert first in ways("Jane") - {"Jane"}
            assert last in ways("Doe") - {"Doe"}
    assert misspelt(rows("J. R. by J."), ["J. R."], 1, "text")["text"] == ["JJ. RR. by J."]


def test_seed_and_row_decide_the_draws():
    one, other = (misspelt(forget(), NAMES, seed=seed)["prompt"] for seed in (0, 1))
    assert one != other
    assert misspelt(rows(*forget()["text"][:1]), NAMES)["prompt"][0] == one[0]
    same = [misspelt(rows(*["the films of Jane Doe"] * 30), NAMES)["prompt"]]
    assert len(set(same[0])) > 3


def test_a_name_is_found_in_either_encoding_of_its_accents_and_the_longer_of_two():
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, "by Zoé")
        assert letters_apart(rows(text), ["Zoé"], text_field="text")["text"][0].startswith("by Z o")
    assert look_alikes(rows("Jane Doe"), ["Jane", "Jane Doe"], "text")["text"] == ["Jane Doe".translate(LOOK_ALIKES)]


def test_names_in_scripts_without_spaces_are_disguised_and_not_the_longest_words():
    assert letters_apart(rows("请问李明是谁"), ["李明"], "-", "text")["text"] == ["请问李-明是谁"]
    assert letters_apart(rows("请问Zoe是谁"), ["Zoe"], "-", "text")["text"] == ["请问Z-o-e是谁"]


def test_bad_names_and_texts_without_letters_are_refused():
    with pytest.raises(TypeError, match="names is 'Jane'"):
        misspelt(forget(), "Jane")
    with pytest.raises(ValueError, match="names holds ''"):
        look_alikes(forget(), ["Jane", ""])
    for disguise in DISGUISES.values():
        with pytest.raises(ValueError, match="no attack"):
            disguise(rows("1 + 1 ="), text_field="text")
