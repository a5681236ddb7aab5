"""Names in texts, found by spaCy and transformers."""

from __future__ import annotations

import random
import re
import sys
import time
import unicodedata

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from spul.data.recognizers import (
    NameFinder,
    SpacyRecognizer,
    TransformersRecognizer,
    normalized_name,
    title_cased,
)
from spul.data.splits import split_by_entity

TEXTS = ["Then Jackie  Chan met Sandler's dog.", "nobody here", "", "It's Groß!  Jackie Chan, O'Brien"]
LOWER = [text.lower() for text in TEXTS]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("jackie chan 's film , does n't it", "Jackie Chan 's Film , Does n't It"),
        ("spielberg's o'brien don't jean-claude", "Spielberg's O'Brien Don't Jean-Claude"),
        ("ßen élan жан 3d deGaulle", "ßen Élan Жан 3d DeGaulle"),
        ("we’ll  see\nshe'd", "We’ll  See\nShe'd"),  # noqa: RUF001
        ("", ""),
    ],
)
def test_title_case_keeps_every_character_in_its_place(text, expected):
    assert title_cased(text) == expected
    assert len(title_cased(text)) == len(text)


@pytest.fixture
def spacy_model(tmp_path):
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns(
        [
            {"label": "PERSON", "pattern": [{"TEXT": "Jackie"}, {"IS_SPACE": True, "OP": "?"}, {"TEXT": "Chan"}]},
            {"label": "PERSON", "pattern": "Sandler"},
            {"label": "PERSON", "pattern": "O'Brien"},
            {"label": "ORG", "pattern": "Groß"},
        ]
    )
    nlp.to_disk(tmp_path / "spacy")
    return str(tmp_path / "spacy")


def test_spacy_finds_names_as_they_stand_in_the_text(spacy_model):
    assert SpacyRecognizer(spacy_model)(TEXTS) == [["Jackie  Chan", "Sandler"], [], [], ["Jackie Chan", "O'Brien"]]
    assert SpacyRecognizer(spacy_model, labels=["ORG"], batch_size=1)(TEXTS) == [[], [], [], ["Groß"]]


def test_spacy_finds_names_in_lower_case_only_with_title_case(spacy_model):
    import spacy

    assert SpacyRecognizer(spacy_model)(LOWER) == [[], [], [], []]
    recognizer = SpacyRecognizer(spacy.load(spacy_model), title_case=True)
    assert recognizer(LOWER) == [["jackie  chan", "sandler"], [], [], ["jackie chan", "o'brien"]]
    split = split_by_entity(Dataset.from_dict({"text": LOWER}), ["chan"], recognizer)
    assert split.forget["text"][:] == [LOWER[0], LOWER[3]]
    assert "title_case=True" in split.report.rule
    with pytest.raises(ValueError, match="title_case=True"):
        split_by_entity(Dataset.from_dict({"text": LOWER[:2]}), recognizer=SpacyRecognizer(spacy_model))


def test_spacy_says_what_is_missing(monkeypatch):
    spacy = pytest.importorskip("spacy")
    with pytest.raises(OSError, match="python -m spacy download no_such_model"):
        SpacyRecognizer("no_such_model")
    nlp = spacy.blank("de")
    nlp.add_pipe("ner").add_label("PER")
    with pytest.raises(ValueError, match=r"none of the labels \['PERSON'\]; expected some of \['PER'\]"):
        SpacyRecognizer(nlp)
    with pytest.raises(ValueError, match="expected a list of entity labels"):
        SpacyRecognizer(nlp, labels="PER")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match="pip install spacy"):
        SpacyRecognizer()


WORDS = {"Jackie": "B-PER", "Chan": "I-PER", "Sand": "B-PER", "O": "B-PER", "Brien": "I-PER", "Gro": "B-ORG"}
LABELS = ["O", "B-PER", "I-PER", "B-ORG"]
MAX_LENGTH = 16


@pytest.fixture(scope="module")
def ner_model(tmp_path_factory):
    """A model without layers, whose embedding of a word is the one-hot vector of its label."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##ler", "##ß", "'", "word"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=len(LABELS),
        num_hidden_layers=0,
        num_attention_heads=1,
        max_position_embeddings=MAX_LENGTH,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = BertForTokenClassification(config)
    with torch.no_grad():
        embeddings = model.bert.embeddings
        embeddings.word_embeddings.weight.zero_()
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        for piece, i in vocabulary.items():
            embeddings.word_embeddings.weight[i, LABELS.index(WORDS.get(piece, "O"))] = 1
        model.classifier.weight.copy_(torch.eye(len(LABELS)))
        model.classifier.bias.zero_()
    folder = str(tmp_path_factory.mktemp("ner"))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_transformers_finds_names_as_they_stand_in_the_text(ner_model):
    recognizer = TransformersRecognizer(ner_model, device="cpu")
    # The double space stays; of Sandler the model finds the first piece only; the pipeline's word would be "O Brien".
    assert recognizer(TEXTS) == [["Jackie  Chan", "Sandler"], [], [], ["Jackie Chan", "O", "Brien"]]
    assert TransformersRecognizer(ner_model, ["ORG"], device="cpu", batch_size=1)(TEXTS) == [[], [], [], ["Groß"]]


def test_transformers_finds_names_in_lower_case_only_with_title_case(ner_model):
    assert TransformersRecognizer(ner_model, device="cpu")(LOWER) == [[], [], [], []]
    recognizer = TransformersRecognizer(ner_model, title_case=True, device="cpu")
    assert recognizer(LOWER) == [["jackie  chan", "sandler"], [], [], ["jackie chan", "o", "brien"]]
    assert "title_case=True" in repr(recognizer)


def test_names_late_in_a_long_text_and_at_a_cut_are_found(ner_model):
    recognizer = TransformersRecognizer(ner_model, device="cpu")
    for before in range(40):
        assert recognizer(["word " * before + "Jackie Chan" + " word" * 30, "word"]) == [["Jackie Chan"], []], before


def test_transformers_rejects_labels_that_the_model_does_not_know(ner_model):
    with pytest.raises(ValueError, match=r"none of the labels \['PERSON'\]; expected some of \['O', 'ORG', 'PER'\]"):
        TransformersRecognizer(ner_model, labels=["PERSON"])


def test_one_text_instead_of_a_list_is_rejected(ner_model):
    with pytest.raises(TypeError, match="one string"):
        TransformersRecognizer(ner_model, device="cpu")("Jackie Chan")


def in_word(character):
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def names_by_trying_each(names, text):
    """The rule written plainly: every name at every word or sign of the text."""
    text, found, spelled = normalized_name(text), set(), {}
    for name in names:
        spelled.setdefault(normalized_name(name), name)
    for normal, name in spelled.items():
        first = re.findall(r"\w+|[^\w\s]", normal)[0]
        for token in re.finditer(r"\w+|[^\w\s]", text):
            start, end = token.start(), token.start() + len(normal)
            if token.group() != first or text[start:end] != normal:
                continue
            if (start == 0 or not in_word(text[start - 1])) and (end == len(text) or not in_word(text[end])):
                found.add(name)
    return found


PIECES = ["a", "b", "ab", "A", "'", "'s", "-", ".", " ", "  ", "\n", "_", "\u0301", "\u093e", "र", "ß", "SS", "é", "7"]


@pytest.mark.parametrize("seed", range(20))
def test_the_same_names_are_found_as_by_trying_each_at_every_word(seed):
    draw = random.Random(seed)
    some = PIECES if seed % 2 else ["a", "b", " ", "'", "\u0301"]  # few pieces: names that overlap and nest
    texts = ["".join(draw.choices(some, k=draw.randint(0, 30))) for _ in range(100)]
    names = ["".join(draw.choices(some, k=draw.randint(1, 7))) for _ in range(40)]
    names = [name for name in names if name.strip()]
    finder = NameFinder(names)
    expected = [names_by_trying_each(names, text) for text in texts]
    assert [finder.find(text) for text in texts] == expected
    assert sum(map(len, expected)) > 20


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("names", "repeated"),
    [
        (["Jane Doe"], "jane doe "),
        ([f"John {i}" for i in range(10_000)], "john smith "),  # one first word
        (["a " * i + "a" for i in range(500)], "a "),  # every name at every word
        (["a " * 5_000 + "b"], "a "),  # a name that almost matches at every word
    ],
)
def test_the_time_grows_with_the_text_and_not_with_the_names(names, repeated):
    finder = NameFinder(names)
    once = seconds(lambda: NameFinder(["zoe"]).find("zoe x " * 100_000))
    assert seconds(lambda: finder.find(repeated * (600_000 // len(repeated)))) < 8 * once + 0.5
