"""The gate by names: at least what `split_by_entity` finds, in any spelling that Unicode calls compatible."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from datasets import Dataset

from spul.data.splits import split_by_entity
from spul.gates import NameGate, load

NAMES = ["Jane Doe", "chan", "O'Neill", "Zoë", "李小龍", "J. R. Ewing"]
TEXTS = [
    "JANE\n  DOE acts",
    "janedoe",
    "Jane Does",
    "Jackie Chan",
    "channel",
    "O'Neill's play",
    "ONeill",
    "Zoe\u0308 sings",
    "zoe sings",
    "chan\u2122",
    "chan\u00b2",
    "film 李小龍 2",
    "J. R. Ewing!",
    "j.r.ewing",
    "",
    " ",
]


def test_all_that_split_by_entity_finds_is_flagged():
    rows = Dataset.from_dict({"text": [*TEXTS, "nobody"]})
    split = split_by_entity(rows, NAMES)
    assert len(split.forget) == 7
    exact, gate = NameGate(NAMES, spelling=False, spelling_rules=1), NameGate(NAMES)
    for each, others in ((exact, []), (gate, ["janedoe", "ONeill", "zoe sings", "j.r.ewing"])):
        found = dict(zip(TEXTS, each.flags(TEXTS).tolist(), strict=True))
        assert found == {text: text in split.forget["text"][:] or text in others for text in TEXTS}


@pytest.mark.parametrize(
    "text",
    [
        "\uff4a\uff41\uff4e\uff45 \uff44\uff4f\uff45",  # full width
        "ja\u200bne doe",  # a space of no width
        "ja\u00adne\u00a0doe",  # a soft hyphen, a space that does not break
        "\U0001d4d9\U0001d4ea\U0001d4f7\U0001d4ee \U0001d4d3\U0001d4f8\U0001d4ee",  # mathematical letters
        "ask Ja\ufeffne\u2003\u2003DOE now",
    ],
)
def test_compatible_and_invisible_characters_are_no_way_around(text):
    assert not split_matches(text)
    assert NameGate(["Jane Doe"]).names_in([text]) == [["Jane Doe"]]


def split_matches(text):
    rows = Dataset.from_dict({"text": [text, "jane doe", "other"]})
    return text in split_by_entity(rows, ["Jane Doe"]).forget["text"][:]


def test_a_name_given_in_compatible_characters_is_found_in_plain_ones():
    assert NameGate(["\uff4a\uff41\uff4e\uff45"]).flags(["Jane", "\uff4a\uff41\uff4e\uff45", "June"]).tolist() == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "people"),
    [
        ("李明是谁?", ["李明"]),
        ("李 明", []),
        ("请问Jane Doe是谁?", ["Jane Doe"]),
        ("请问Jane Does是谁?", []),
        ("김철수는 누구인가요?", ["김철수"]),
        ("田中さんはどこ", ["田中"]),
        ("ジョン・スミスさんはどこ", ["ジョン・スミス"]),
        ("アンは誰", ["アン"]),
        ("アンテナが壊れた", []),  # katakana is read as words
        ("คุณสมชายเกิดที่ไหน", ["สมชาย"]),
        ("สมชายี", []),  # another last syllable
    ],
)
@pytest.mark.parametrize("spelling", [False, True])
def test_names_are_found_in_scripts_without_spaces_and_latin_ones_among_them(text, people, spelling):
    gate = NameGate(["李明", "Jane Doe", "김철수", "田中", "ジョン・スミス", "アン", "สมชาย"], spelling=spelling)
    assert gate.names_in([text]) == [people]


def test_a_misspelled_latin_name_is_found_in_a_script_without_spaces():
    assert NameGate(["Jane Smith"], spelling=True).flags(["请问Jnae Smith是谁?"]).all()


def test_scores_count_people_not_spellings():
    gate = NameGate(["Jane Doe", "Bob"], aliases={"Jane Doe": ["J. Doe", "Janie"]})
    texts = ["Janie, that is J. Doe, Jane Doe", "bob and janie", "bobby", "j. doe"]
    assert gate.names_in(texts) == [["Jane Doe"], ["Jane Doe", "Bob"], [], ["Jane Doe"]]
    assert gate.scores(texts).tolist() == [1.0, 2.0, 0.0, 1.0]
    assert gate.scores(texts).dtype == np.float64
    assert gate.scores([]).shape == (0,)
    assert NameGate(["jane", "Bob", "JANE", "ja\u00adne"]).names == ["jane", "Bob"]
    assert gate.flags(["x " * 100_000 + "janie"]).tolist() == [True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "names is empty"),
        (("jane",), TypeError, r"names is 'jane'; expected a list"),
        ((["jane", " "],), ValueError, r"names holds ' '; expected names as text"),
        ((["jane", 5],), ValueError, r"names holds 5"),
        ((["\u200b"],), ValueError, "no visible character"),
        ((["jane"], ["j"]), TypeError, "aliases is a list; expected a dict"),
        ((["jane"], {"bob": ["b"]}), ValueError, "aliases are given for 'bob', which is not among the names jane"),
        ((["jane"], {"jane": "j"}), TypeError, r"aliases\['jane'\] is 'j'; expected a list"),
        ((["jane"], {"jane": []}), ValueError, r"aliases\['jane'\] is empty"),
        ((["jane", "bob"], {"bob": ["JANE"]}), ValueError, "'JANE' is given for 'jane' and for 'bob'"),
    ],
)
def test_names_that_no_gate_can_be_made_of_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        NameGate(*arguments)


def test_a_saved_gate_comes_back(tmp_path):
    gate = NameGate(NAMES, {"chan": ["陳港生"]})
    assert gate.report is None
    gate.report = gate.measure(["jackie chan"], ["a film"])
    gate.save(tmp_path)
    again = load(tmp_path)
    assert (again.names, again.aliases, again.report) == (gate.names, gate.aliases, gate.report)
    assert again.flags([*TEXTS, "陳港生"]).tolist() == [*gate.flags(TEXTS), True]


MISSPELLED = [
    ("who is Jnae Doe?", ["Jane Doe"]),
    ("who is jaine doe", ["Jane Doe"]),
    ("Jane does", []),  # short words have no edits
    ("June and Doe", []),
    ("that schwarzneger", ["Schwarzenegger"]),
    ("Schwarznegger's", ["Schwarzenegger"]),
    ("Reesess", ["Reeses"]),
    ("Maria Rossi", ["Mario Rossi"]),
    ("shear", []),  # a word
    ("Ceh", []),  # of four letters alone
    ("J.K. Rowlling", ["J.K. Rowling"]),
    ("J.K. Rawlinng", []),  # two edits in seven letters
    ("nobody", []),
]


@pytest.mark.parametrize(("text", "people"), MISSPELLED)
def test_misspelled_names_match_unless_told_otherwise_as_aliases_do(text, people, tmp_path):
    names = ["Jane Doe", "Schwarzenegger", "Reeses", "J.K. Rowling", "Mario Rossi", "Cher", "Shears"]
    gate = NameGate(names, {"Jane Doe": ["Janet Dorothy"]}, spelling=True)
    assert gate.names_in([text, "jannet doroth"]) == [people, ["Jane Doe"]]
    plain = NameGate(names, {"Jane Doe": ["Janet Dorothy"]}, spelling=False)
    assert plain.names_in([text, "jannet doroth"]) == [[], []]
    right = ["Jane Doe", "reeses", "j.k. rowling"]
    assert gate.names_in(right) == plain.names_in(right)
    assert gate.identity() != plain.identity()
    gate.save(tmp_path)
    again = load(tmp_path)
    assert again.spelling is True
    assert again.names_in([text]) == [people]


@pytest.mark.parametrize("name", ["Anne-Marie O'Neill", "Anne\u2010Marie O\u2019Neill"])
def test_misspelled_names_match_with_the_signs_of_phones_and_typesetters(name):
    texts = ["Anne-Maire O'Neil", "anne\u2010maire o\u2019nneill", "Anne-Marie O`Niell", "Anne Marie O'Neilll"]
    assert NameGate([name], spelling=True).flags(texts).all()


def test_other_names_do_not_hide_a_misspelled_one():
    names = ["John Smith", "Joan Baker", "Jon Poe", "Jane Doe", "Janet Roe", "Davis Jr.", "Zo\u00eblle-Mae Brown"]
    gate = NameGate(names, spelling=True)
    texts = [
        "is jon smith here",
        "Joan Smth",
        "janet doe",
        "Davsi Jr. sings",
        "zoelle-mae browm",
        "Zoelle Mae Brown",
        "jonh\n smiht and jane deo",
        "john. smith",
    ]
    found = [["John Smith"], ["John Smith"], ["Jane Doe"], ["Davis Jr."], [names[-1]], [names[-1]]]
    people = [*found, ["John Smith"], []]
    assert gate.names_in(texts) == people


def test_a_gate_of_names_saved_before_it_read_as_gates_of_wording_do_reads_as_it_did(tmp_path):
    texts = ["Jane Doe", "Jnae Doe", "jane-doe", "janedoe", "j4ne doe"]
    gate = NameGate(["Jane Doe"])
    assert gate.flags(texts).all()
    gate.save(tmp_path)
    assert load(tmp_path).identity() == gate.identity()
    path = tmp_path / "gate.json"
    fields = json.loads(path.read_text())
    assert fields.pop("spelling_rules") == 4
    path.write_text(json.dumps(fields))
    assert load(tmp_path).flags(texts).tolist() == [True, True, False, False, True]
    path.write_text(json.dumps({**fields, "spelling": False}))
    load(tmp_path).save(tmp_path / "again")
    assert load(tmp_path / "again").flags(texts).tolist() == [True, False, False, False, False]
    assert "spelling_rules" not in (tmp_path / "again" / "gate.json").read_text()
    del fields["spelling"]
    path.write_text(json.dumps(fields))
    assert load(tmp_path).flags(texts).tolist() == [True, False, False, False, False]
    path.write_text(json.dumps({**fields, "spelling": "yes"}))
    with pytest.raises(ValueError, match="true or false"):
        load(tmp_path)
    with pytest.raises(TypeError, match=r"spelling='yes'; expected True or False"):
        NameGate(["Jane Doe"], spelling="yes")


DISGUISED = [
    "br-ad pi-tt",
    "b.r.a.d p.i.t.t",
    "brad_pitt",
    "Brad-Pitt's",
    "BRAD. - is this brad/pitt?",
    "b\nrad p itt",
    "br - ad pi, tt",
    "br\u200bad\u00adpi\u00adtt",
    "bradpitt",
    "whoisbradpitt",
    "br4d p1tt",
]


@pytest.mark.parametrize("text", DISGUISED)
@pytest.mark.parametrize("spelling", [False, True])
def test_names_in_pieces_joined_and_with_digits_are_found(text, spelling):
    gate = NameGate(["Tom Hanks", "Brad Pitt"], spelling=spelling)
    assert gate.names_in([f"so {text} plays"]) == [["Brad Pitt"]]


@pytest.mark.parametrize(
    "text",
    [
        "zoe o'con nell",
        "zo\u00e9 o'connell",
        "ZOE O\u2019CONNELL",
        "zo'e oco'nnell",
        "zoe'o'connell",
        "Zo&euml; O&#39;Connell",
        "zoe&nbsp;o&rsquo;connell",
        "**Zoe** O'Connell",
        "Zoe <b>O'Con</b>nell",
        'Zoe "O\'Connell"',
        "(Zoe) O'Connell",
        "zoe o'con-\nnell",
        "z\u1d0f\u1d07 o'connell",
    ],
)
@pytest.mark.parametrize("spelling", [False, True])
def test_names_with_apostrophes_accents_and_markup_are_found(text, spelling):
    names = ["Zo\u00eb O'Connell", "Ros\u00e9"]
    assert NameGate(names, spelling=spelling).names_in([f"so {text} plays"]) == [names[:1]]
    assert NameGate(names, spelling=False, spelling_rules=3).names_in([text]) == [[]]


def test_names_without_their_accents_are_found_with_letters_apart():
    gate = NameGate(["Zo\u00eb Li", "Ros\u00e9"], spelling=False)
    assert gate.names_in(["Z o e L i", "z.o.\u00eb l.i", "r o s e"]) == [["Zo\u00eb Li"], ["Zo\u00eb Li"], []]


@pytest.mark.parametrize("spelling", [False, True])
@pytest.mark.parametrize("text", ["<jane_doe@example.com>", "<a href='/jane-doe'>", "1<j-ane doe>", "<j&#97;ne_doe>"])
def test_names_in_what_looks_like_a_tag_are_found(text, spelling):
    assert NameGate(["Jane Doe"], spelling=spelling).names_in([text]) == [["Jane Doe"]]
    assert NameGate(["Jane Doe"]).names_in([text.replace("doe", "deo")]) == [[]]
    assert NameGate(["Jane Doyle"]).names_in([text.replace("doe", "doile")]) == [["Jane Doyle"]]


@pytest.mark.parametrize("text", ["a rose", "the roses we're, l'ange", "WE'RE, L'Ange", "5 * 3 (a) 'b'"])
def test_apostrophes_accents_and_markup_make_no_other_names(text):
    names = ["Rosalyn Ros\u00e9", "Ros\u00e9", "Lange", "Were", "Zo\u00eb O'Connell"]
    assert NameGate(names, spelling=False).names_in([text]) == [[]]


def test_names_of_one_spelling_but_for_accents_are_told_apart_where_the_accents_stand_in_names():
    assert NameGate(["Jos\u00e9 Ruiz", "Jose Ruiz"], spelling=False).names_in(["Jose Ruiz"]) == [["Jose Ruiz"]]


def test_names_both_joined_and_misspelled_are_found():
    names = ["Johnny Depp", "Brad Pitt", "Oscar Wilde"]
    texts = ["jonnydepp", "a bradpit film", "johnydep", "oscarwild's"]
    assert NameGate(names).names_in(texts) == [["Johnny Depp"], ["Brad Pitt"], ["Johnny Depp"], ["Oscar Wilde"]]
    assert NameGate(names, spelling=False).names_in(texts) == [[]] * 4


@pytest.mark.parametrize("text", ["rosemary", "a new man", "She wore a kimono", "the art. deco", "human-kind", "pitt"])
def test_words_of_english_are_no_names_joined_or_in_pieces(text):
    assert NameGate(["Rose Mary", "Newman", "Kim Ono", "Art Deco", "Hu Man", "Brad Pitt"]).names_in([text]) == [[]]


COMMON = [
    "Ask Tom for help",
    "John will come",
    "James says no",
    "A table of dark wood",
    "I put in a word",
    "read and re-read",
]


@pytest.mark.parametrize("text", COMMON)
def test_common_words_of_english_are_no_misspelled_names_and_no_pieces_of_one(text):
    names = ["Tom Ford", "John Wills", "James Hays", "Mark Wood", "Putin", "Andre"]
    gate = NameGate(names)
    assert gate.names_in([text]) == [[]]
    assert NameGate(names, spelling_rules=1).flags(COMMON).tolist() == [True] * 4 + [False] * 2
    assert gate.flags(["ask tom fodr", "ask Tom Ford", "Jon Wills", "mrak wodo", "pu tin", "an dre"]).all()


@pytest.mark.parametrize("text", ["bachmann", "goldstein's", "a wildean play", "the summerlee case", "chanels"])
def test_short_names_of_one_word_are_not_found_within_longer_words(text):
    gate = NameGate(["Bach", "Stein", "Wilde", "Lee", "Chan", "Bruce Willis"])
    assert gate.names_in([text]) == [[]]
    assert gate.flags(["ba-ch", "B4ch", "bach_mann", "brucewillisfilms"]).all()


def test_full_names_of_short_words_are_found_joined_with_others():
    assert NameGate(["Brad Pitt", "Al Gore"]).flags(["whoisbradpitt", "algorefilms", "a bradpittfilm"]).all()
    assert NameGate(["Pitt"]).names_in(["bradpitt"]) == [[]]


@pytest.mark.parametrize("part", ["ab ", "br-ad_", "bradpi ", "f1lm ", "tt\n", "(", "x(", "' ", "<b", "br\u00e1d'"])
def test_a_long_text_takes_a_time_that_grows_with_its_length(part):
    text, gate = part * (300_000 // len(part)), NameGate(["Brad Pitt", "Tom Hanks"])
    begun = time.process_time()
    gate.flags([text])
    assert time.process_time() - begun < 5
