"""Neighbors against cases by hand; losses of running text against slow twins, one text at a time, without pads."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import build, build_unlearner, make_tokenizer, stirred, tokenizer_with
from peft import LoraConfig, PeftModel, get_peft_model
from plain import row_logits
from sklearn.feature_extraction.text import TfidfVectorizer

from spul import ForgetRetainCollator
from spul.data import SENTIMENT, RowEncoder, TextClustering
from spul.evaluation import cluster_neighbors, name_neighbors, topic_neighbors
from spul.evaluation.metrics import perplexity, text_losses
from spul.evaluation.metrics.scoring import score_completions


def rows_of(*texts: str) -> Dataset:
    return SENTIMENT.apply(Dataset.from_dict({"text": list(texts), "label_text": ["positive"] * len(texts)}))


# ---- neighbors by name ----

NAMED = rows_of(
    "Michael CHAN is good",
    "jackie\tchan and Charlie Chan",
    "channel and chanted",
    "a film by chan",
    "Adam West in a film",
    "a film",
)
PEOPLE = ["Jackie Chan", "Adam Sandler"]


def test_the_surname_is_shared_and_the_person_is_not_named():
    found = name_neighbors(NAMED, PEOPLE)
    assert found["text"] == ["Michael CHAN is good", "a film by chan"]
    assert found.column_names == NAMED.column_names


def test_first_names_count_where_they_are_asked_for():
    words = [word for name in PEOPLE for word in name.split()]
    assert name_neighbors(NAMED, PEOPLE, words)["text"] == [
        "Michael CHAN is good",
        "a film by chan",
        "Adam West in a film",
    ]
    assert name_neighbors(NAMED, PEOPLE, ["west"])["text"] == ["Adam West in a film"]


def test_with_a_recognizer_a_surname_by_itself_is_nobody_else():
    people = {
        "Michael CHAN is good": ["Michael CHAN"],
        "jackie\tchan and Charlie Chan": ["jackie\tchan", "Charlie Chan"],
        "a film by chan": ["chan"],
        "Adam West in a film": ["Adam West"],
    }
    found = name_neighbors(NAMED, PEOPLE, recognizer=lambda texts: [people.get(text, []) for text in texts])
    assert found["text"] == ["Michael CHAN is good"]


def test_a_name_of_one_word_leaves_nobody_else():
    with pytest.raises(ValueError, match=r"none of 6 candidates .* \['chan'\]: 3 do, .* Pass full names"):
        name_neighbors(NAMED, ["chan"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((NAMED, "Jackie Chan"), TypeError, r"expected a list: \['Jackie Chan'\]"),
        ((NAMED, []), ValueError, "names is empty; expected at least one"),
        ((NAMED, [" "]), ValueError, "expected names as text"),
        ((NAMED, PEOPLE, "chan"), TypeError, "words is 'chan'"),
        ((list(NAMED), PEOPLE), TypeError, r"candidates is a list; expected a datasets\.Dataset"),
        ((NAMED.select([]), PEOPLE), ValueError, "candidates is empty"),
    ],
)
def test_bad_names_and_rows_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        name_neighbors(*arguments)


# ---- neighbors by topic and by cluster ----

FORGET = rows_of("pasta with tomato and basil", "a violin sonata")
OTHERS = rows_of(
    "the rain in november",
    "violin concerto by a soloist",
    "pasta with tomato and basil",
    "tomato soup",
    "tomato and basil, pasta too",
    "with and a",
)


def test_topic_neighbors_are_the_nearest_to_any_one_forget_row():
    vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True)
    others = [text for text in OTHERS["text"] if text != FORGET["text"][0]]
    vectors = vectorizer.fit_transform([*FORGET["text"], *others]).toarray()
    similarity = (vectors[2:] @ vectors[:2].T).max(axis=1)
    expected = [others[i] for i in np.argsort(-similarity)[:3]]
    found = topic_neighbors(FORGET, OTHERS, 3)
    assert found["text"] == expected
    assert set(expected) == {"tomato and basil, pasta too", "violin concerto by a soloist", "tomato soup"}
    assert topic_neighbors(FORGET, OTHERS, 1)["text"] == ["tomato and basil, pasta too"]
    assert found.column_names == OTHERS.column_names


def test_rows_without_a_shared_word_are_no_neighbors():
    with pytest.raises(ValueError, match="num=4, but only 3 of 5 candidates"):
        topic_neighbors(FORGET, OTHERS, 4)
    with pytest.raises(ValueError, match="no words to compare by in 1 forget rows and 1 candidates"):
        topic_neighbors(rows_of("with"), rows_of("and a"), 1)
    with pytest.raises(ValueError, match="num=0"):
        topic_neighbors(FORGET, OTHERS, 0)


def test_candidates_that_are_forget_rows_raise():
    with pytest.raises(ValueError, match="each of 2 candidates has the text of a forget row"):
        topic_neighbors(FORGET, FORGET, 1)
    with pytest.raises(ValueError, match=r"forget lacks the column\(s\) \['review'\]; it has \['prompt'"):
        topic_neighbors(FORGET, OTHERS, 1, text_field="review")


@pytest.fixture(scope="module")
def clustering():
    texts = ["pasta tomato", "tomato basil pasta", "basil pasta", "violin sonata", "violin concerto", "sonata violin"]
    return TextClustering.fit([*texts, "rain november", "november rain storm"], 3, dim=4, progress=False)


def test_cluster_neighbors_share_a_cluster_with_a_forget_row(clustering):
    assert cluster_neighbors(FORGET.select([0]), OTHERS, clustering)["text"] == [
        "tomato soup",
        "tomato and basil, pasta too",
    ]
    both = cluster_neighbors(FORGET, OTHERS.select([0, 1, 2, 3]), clustering)
    assert both["text"] == ["violin concerto by a soloist", "tomato soup"]
    assert both.column_names == OTHERS.column_names


def test_clusters_without_candidates_or_without_a_difference_raise(clustering):
    with pytest.raises(ValueError, match=r"none of 1 candidates lies in .* of 0 to 2\. Pass unseen rows"):
        cluster_neighbors(FORGET, OTHERS.select([0]), clustering)
    with pytest.raises(ValueError, match="the 3 forget rows lie in all 3 clusters"):
        cluster_neighbors(rows_of(*FORGET["text"], "rain"), OTHERS, clustering)
    with pytest.raises(TypeError, match="clustering is a int"):
        cluster_neighbors(FORGET, OTHERS, 3)


def test_neighbors_are_rows_to_score():
    collator = ForgetRetainCollator(make_tokenizer(), [" neutral"], max_length=96, text_field="text")
    scores = score_completions(build("llama"), topic_neighbors(FORGET, OTHERS, 2), collator)
    assert np.isfinite(scores["loss"])


# ---- running text ----

TEXTS = [
    "the film is good, the plot about jane doe is bad.",
    "of",
    "jane doe",
    "the review of the film is positive, and unknown is the text about it",
    "a",
    "plot : 0123",
]


def plain_losses(tokenizer, loss_of, max_length=1024):
    """One text at a time, no pads: (nats, predicted tokens) of each."""
    found = []
    for text in TEXTS:
        ids = torch.tensor(tokenizer(text)["input_ids"])[:max_length]
        found.append((loss_of(ids) if len(ids) > 1 else 0.0, len(ids) - 1))
    return np.array(found).T


def own_loss(model):
    """The model's own loss, a mean over all tokens but the first."""

    def loss_of(ids):
        with torch.no_grad():
            return float(model(input_ids=ids[None], labels=ids[None]).loss) * (len(ids) - 1)

    return loss_of


def prompted_loss(model):
    """The same under a prompt that stands in front by hand; its last virtual token predicts nothing."""

    def loss_of(ids):
        with torch.no_grad():
            return float(F.cross_entropy(row_logits(model, ids)[:-1], ids[1:], reduction="sum"))

    return loss_of


def assert_like_twin(model, loss_of, bos=False, batch_sizes=(1, 3, 32), rtol=1e-5):
    tokenizer = tokenizer_with(bos)
    nats, num_tokens = plain_losses(tokenizer, loss_of)
    for batch_size, tokenizer.padding_side in zip(batch_sizes, ("left", "right", "left"), strict=False):
        found = text_losses(model, TEXTS, RowEncoder(tokenizer, 1024), batch_size=batch_size)
        np.testing.assert_allclose(found["nats"], nats, rtol=rtol)
        np.testing.assert_array_equal(found["tokens"], num_tokens)
        assert not found["tokens_lost"].any()
        assert perplexity(found) == pytest.approx(np.exp(nats.sum() / num_tokens.sum()), rel=1e-4)


@pytest.mark.parametrize("bos", [True, False])
def test_losses_of_a_bare_model_are_its_own(family, bos):
    model = build(family, torch.float64)
    assert_like_twin(model, own_loss(model), bos)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_losses_under_a_prompt_are_those_with_it_in_front(family, prompt_type, bos):
    model = build_unlearner(family, prompt_type).eval()
    assert_like_twin(model, prompted_loss(model), bos)
    with model.disable_adapter():
        assert_like_twin(model, own_loss(model.get_base_model()), bos, batch_sizes=(3,))


def test_losses_under_a_plain_peft_prompt(tmp_path, prompt_type):
    build_unlearner("llama", prompt_type, torch.float32).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(build("llama"), str(tmp_path))
    prompted = build_unlearner("llama", prompt_type, torch.float32).eval()
    assert_like_twin(model, prompted_loss(prompted), rtol=1e-4)
    with model.disable_adapter():
        assert_like_twin(model, own_loss(build("llama")), batch_sizes=(3,), rtol=1e-4)


def test_losses_under_lora_and_unlearning_layers():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    lora = get_peft_model(build("llama"), config).double().eval()
    layers = stirred(build("opt", torch.float64))
    bare = text_losses(build("opt", torch.float64), TEXTS, RowEncoder(make_tokenizer(), 1024))["nats"]
    assert np.abs(text_losses(layers, TEXTS, RowEncoder(make_tokenizer(), 1024))["nats"] - bare).max() > 1e-2
    for model in (lora, layers):
        assert_like_twin(model, own_loss(model), batch_sizes=(3,))


def test_what_is_beyond_max_length_is_cut_and_counted(caplog):
    model, tokenizer = build("llama", torch.float64), tokenizer_with(bos=True)
    whole = np.array([len(tokenizer(text)["input_ids"]) for text in TEXTS])
    with caplog.at_level(logging.WARNING):
        found = text_losses(model, TEXTS, RowEncoder(tokenizer, 8), batch_size=2)
    nats, num_tokens = plain_losses(tokenizer, own_loss(model), max_length=8)
    np.testing.assert_allclose(found["nats"], nats, rtol=1e-5)
    np.testing.assert_array_equal(found["tokens"], num_tokens)
    assert found["tokens"].max() == 7
    np.testing.assert_array_equal(found["tokens_lost"], whole - num_tokens - 1)
    lost = found["tokens_lost"].sum()
    assert f"cuts {(whole > 8).sum()} of 6 texts: {lost} of their tokens" in caplog.text


def test_a_text_of_one_token_has_nothing_to_predict_unless_a_token_begins_it():
    model = build("llama")
    assert text_losses(model, TEXTS, RowEncoder(tokenizer_with(bos=False), 1024))["tokens"][4] == 0
    found = text_losses(model, TEXTS, RowEncoder(tokenizer_with(bos=True), 1024))
    assert found["tokens"][4] == 1
    assert found["nats"][4] > 0
    with pytest.raises(ValueError, match="none of 2 texts has a token to predict"):
        text_losses(model, ["a", ""], RowEncoder(tokenizer_with(bos=False), 1024))


def test_perplexity_is_per_token_and_not_per_text():
    losses = {"nats": np.array([np.log(2.0), 3 * np.log(4.0)]), "tokens": np.array([1, 3])}
    assert perplexity(losses) == pytest.approx((2 * 4**3) ** 0.25)
    assert perplexity({"nats": np.array([1e6, 0.0]), "tokens": np.array([1, 0])}) == np.inf


def test_bad_texts_raise():
    model, tokenizer = build("llama"), make_tokenizer()
    with pytest.raises(TypeError, match="texts is one string"):
        text_losses(model, "the film", RowEncoder(tokenizer, 1024))
    with pytest.raises(TypeError, match="1 of 2 texts are not strings"):
        text_losses(model, ["the film", None], RowEncoder(tokenizer, 1024))
    with pytest.raises(ValueError, match="texts is empty"):
        text_losses(model, [], RowEncoder(tokenizer, 1024))
    with pytest.raises(ValueError, match="max_length=1"):
        text_losses(model, TEXTS, RowEncoder(tokenizer, 1))
