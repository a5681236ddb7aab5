"""Clusters of texts that assign further texts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from spul.data.clusters import TextClustering

TOPICS = {
    "food": ["pizza", "crust", "cheese", "sauce", "pasta", "bread", "soup", "salad"],
    "hotel": ["room", "bed", "pillow", "lobby", "pool", "stay", "towel", "suite"],
    "car": ["engine", "tyre", "wheel", "brake", "garage", "oil", "mechanic", "motor"],
}


def make_texts(num: int = 40, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=6)) for words in TOPICS.values() for _ in range(num)]


def fit(texts: list[str] | None = None, num_clusters: int = 3, **kwargs) -> TextClustering:
    return TextClustering.fit(texts or make_texts(), num_clusters, **{"dim": 10, "progress": False, **kwargs})


def test_topics_become_clusters_and_new_texts_join_theirs():
    clustering = fit()
    numbers = clustering.assign(make_texts(20, seed=1)).reshape(3, 20)
    assert sorted({int(row[0]) for row in numbers}) == [0, 1, 2]
    assert (numbers == numbers[:, :1]).all()
    assert sorted(clustering.sizes) == [40, 40, 40]


def test_centers_and_embeddings_have_unit_length():
    clustering = fit()
    assert clustering.centers.shape == (3, 10)
    np.testing.assert_allclose(np.linalg.norm(clustering.centers, axis=1), 1)
    vectors = clustering.embed(make_texts(5, seed=2))
    assert vectors.shape == (15, 10)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)


def test_embeddings_are_those_of_a_scikit_learn_pipeline():
    texts, new = make_texts(), make_texts(5, seed=3)
    vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True)
    pipe = make_pipeline(vectorizer, TruncatedSVD(10, random_state=0), Normalizer()).fit(texts)
    np.testing.assert_allclose(fit(texts).embed(new), pipe.transform(new), atol=1e-9)


def test_a_text_goes_to_the_center_with_the_largest_cosine():
    # One tight cluster among scattered texts: plain k-means labels several of them otherwise.
    rng = random.Random(0)
    words = [word for topic in TOPICS.values() for word in topic]
    texts = ["pizza crust"] * 60 + [" ".join(rng.choices(words, k=rng.choice((1, 2, 9)))) for _ in range(200)]
    clustering = fit(texts, 5, dim=20)
    labels = KMeans(5, n_init=10, random_state=0).fit(clustering.embed(texts)).labels_
    assert np.bincount(labels).tolist() != clustering.sizes
    numbers = clustering.assign(texts)
    assert (numbers == (clustering.embed(texts) @ clustering.centers.T).argmax(axis=1)).all()
    assert clustering.sizes == np.bincount(numbers, minlength=5).tolist()


def test_embedding_one_text_or_many_is_the_same():
    clustering, texts = fit(), make_texts(3, seed=4)
    np.testing.assert_allclose(
        np.concatenate([clustering.embed([text]) for text in texts]), clustering.embed(texts), atol=1e-12
    )
    assert clustering.embed([]).shape == (0, 10)
    assert clustering.assign([]).shape == (0,)


def test_the_same_seed_gives_the_same_clusters():
    np.testing.assert_array_equal(fit(seed=3).centers, fit(seed=3).centers)
    assert not np.array_equal(fit(seed=3).centers, fit(seed=4).centers)


def test_top_terms_tell_the_clusters():
    # A word of all texts tells nothing.
    for terms in fit(["place " * 20 + text for text in make_texts()]).top_terms(5):
        assert len(terms) == 5
        assert any(set(terms) <= set(words) for words in TOPICS.values())


def test_a_saved_clustering_assigns_the_same_in_a_fresh_process(tmp_path):
    clustering, texts = fit(), [*make_texts(20, seed=7), "pizza room engine", "nothing known"]
    clustering.save(tmp_path / "saved")
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json; from spul.data.clusters import TextClustering as T; c = T.load('saved');"
        "texts = json.load(open('texts.json')); "
        "print(json.dumps([c.assign(texts).tolist(), c.embed(texts).tolist(), c.sizes, c.top_terms(3)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    numbers, vectors, sizes, terms = json.loads(done.stdout.splitlines()[-1])
    assert numbers == clustering.assign(texts).tolist()
    np.testing.assert_allclose(vectors, clustering.embed(texts), atol=1e-12)
    assert sizes == clustering.sizes
    assert terms == clustering.top_terms(3)
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}


def test_what_is_not_a_saved_clustering_is_not_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"TextClustering\.save"):
        TextClustering.load(tmp_path)
    fit().save(tmp_path / "three")
    fit(num_clusters=2).save(tmp_path / "two")
    (tmp_path / "two/clustering.json").replace(tmp_path / "three/clustering.json")
    with pytest.raises(ValueError, match="do not belong to one clustering"):
        TextClustering.load(tmp_path / "three")
    fit().save(tmp_path / "three")
    fit([*make_texts(), "spark plug"]).save(tmp_path / "more")
    (tmp_path / "more/clustering.json").replace(tmp_path / "three/clustering.json")
    with pytest.raises(ValueError, match="differ in size"):
        TextClustering.load(tmp_path / "three")


def test_texts_without_a_known_word_go_to_the_middle_cluster(caplog):
    clustering = fit([*make_texts(), "the of and"])
    unknown = ["", "zebra giraffe", "the and of"]
    assert not clustering.embed(unknown).any()
    middle = (clustering.centers @ clustering.centers.mean(axis=0)).argmax()
    assert clustering.assign(unknown).tolist() == [middle] * 3
    assert "3 of 3 texts have no known word" in caplog.text
    assert sum(clustering.sizes) == 121
    # Whatever the order of the clusters: not simply the first.
    clustering.centers = np.array([[1.0, 0, 0], [0, 1, 0], [0.6, 0.64, 0.48]]) @ np.eye(3, 10)
    assert clustering.assign(unknown).tolist() == [2] * 3


def test_texts_without_a_known_word_do_not_draw_a_center():
    stop_words = [f"the {word} of" for word in ["and", "to", "in", "is", "it"] * 40]
    clustering = fit([*make_texts(), *stop_words], 4)
    np.testing.assert_allclose(np.linalg.norm(clustering.centers, axis=1), 1)
    assert len(set(clustering.assign(make_texts()))) == 4


def test_dimensions_are_lowered_where_words_or_texts_are_too_few(caplog):
    clustering = fit(["pizza crust", "room bed", "engine oil", "room pool"], 2, dim=100)
    assert clustering.centers.shape == (2, 4)
    assert "dim=100 is lowered to 4: 4 texts, 7 words" in caplog.text


def test_what_cannot_be_clustered_is_rejected():
    with pytest.raises(ValueError, match="num_clusters=1"):
        fit(num_clusters=1)
    with pytest.raises(ValueError, match="dim=0"):
        fit(dim=0)
    with pytest.raises(ValueError, match="2 different texts for num_clusters=3"):
        fit(["pizza", "room"] * 10)
    with pytest.raises(ValueError, match="no words to cluster by"):
        fit(["the", "of", "and"])
    with pytest.raises(ValueError, match="do not fill 3 clusters"):
        fit(["pizza", "room", "the", "of"])
    with pytest.raises(TypeError, match="one string"):
        fit("pizza room")
    with pytest.raises(TypeError, match="text 1: None"):
        fit(["pizza", None, "room"])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_different_texts_with_one_embedding_do_not_make_empty_clusters():
    with pytest.raises(ValueError, match="do not fill 3 clusters"):
        fit(["pizza", "a pizza", "pizza pizza", "room"])


def test_another_embedder_is_a_sentence_transformers_model(monkeypatch, tmp_path):
    names = []

    class SentenceTransformer:
        def __init__(self, name):
            names.append(name)

        def encode(self, texts, normalize_embeddings, show_progress_bar):
            assert normalize_embeddings
            return np.array([[text.count("a"), text.count("e") + 0.1] for text in texts], dtype=np.float32)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=SentenceTransformer))
    texts = ["aa", "aaa", "aae", "eee", "ee", "eea"]
    clustering = fit(texts, 2, embedder="some/model")
    assert [len(set(part)) for part in np.split(clustering.assign(texts), 2)] == [1, 1]
    assert clustering.sizes == [3, 3]
    clustering.save(tmp_path)
    loaded = TextClustering.load(tmp_path)
    assert loaded.assign(texts).tolist() == clustering.assign(texts).tolist()
    assert names == ["some/model", "some/model"]
    with pytest.raises(ValueError, match="top_terms needs embedder='tfidf'"):
        loaded.top_terms()


def test_a_missing_sentence_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        fit(embedder="some/model")
