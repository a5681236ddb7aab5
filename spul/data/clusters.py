"""Clusters of texts: spherical k-means over TF-IDF or sentence embeddings, which also assigns new texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from ..records.files import atomic_folder, write_text
from .checks import checked_texts

logger = logging.getLogger(__name__)


SETTINGS_NAME = "clustering.json"
ARRAYS_NAME = "clustering.safetensors"
TFIDF: dict[str, Any] = {"stop_words": "english", "sublinear_tf": True, "max_features": 20_000}
KMEANS_RUNS = 10
# An embedding shorter than this is a rounding error and has no direction.
NO_LENGTH = 1e-9


class TextClustering:
    """Clustering of texts by k-means with cosine distance over embeddings, made by `fit` or `load`.

    A text belongs to the cluster whose center has the largest cosine with it. A text whose embedding is zero (TF-IDF:
    one with no word of the vocabulary) belongs to the cluster whose center is nearest to the mean of all centers.

    Attributes:
        embedder: `"tfidf"`, or the name or folder of a sentence-transformers model.
        centers: (clusters, dimensions), of unit length.
        sizes: number of fitted texts in each cluster.
    """

    def __init__(
        self,
        embedder: str,
        centers: np.ndarray,
        sizes: list[int],
        vocabulary: list[str] | None = None,
        idf: np.ndarray | None = None,
        components: np.ndarray | None = None,
        progress: bool = True,
    ) -> None:
        self.embedder, self.centers, self.sizes = embedder, centers, sizes
        self.vocabulary, self.idf, self.components = vocabulary, idf, components
        self.progress = progress
        self._model: Any = None

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        num_clusters: int,
        embedder: str = "tfidf",
        dim: int = 128,
        seed: int = 0,
        progress: bool = True,
    ) -> TextClustering:
        """Cluster texts.

        Args:
            texts: texts to cluster.
            num_clusters: number of clusters, at least 2.
            embedder: `"tfidf"`, TF-IDF of English words without stop words, reduced by a truncated SVD; or the name
                or folder of a sentence-transformers model.
            dim: dimensions of the TF-IDF embeddings; lowered, with a warning, if there are fewer words or texts.
            seed: seed of the SVD and of k-means.
            progress: whether to show progress bars.

        Raises:
            ImportError: if a sentence-transformers model is named and the library is not installed.
            TypeError: if the texts are no strings.
            ValueError: if `num_clusters` or `dim` is too low, no text has a word, or the texts do not fill the
                clusters.
        """
        from sklearn.cluster import KMeans

        texts = checked_texts(texts)
        if num_clusters < 2:
            raise ValueError(f"num_clusters={num_clusters}; expected at least 2.")
        if dim < 1:
            raise ValueError(f"dim={dim}; expected at least 1.")
        if (different := len(set(texts))) < num_clusters:
            raise ValueError(
                f"there are {different} different texts for num_clusters={num_clusters}; expected at least as many."
            )
        with tqdm(total=3, desc="clustering", disable=not progress) as bar:
            clustering = cls(embedder, np.empty((0, 0)), [], progress=progress)
            if embedder == "tfidf":
                clustering._fit_tfidf(texts, dim, seed)
            bar.update()
            vectors = clustering.embed(texts)
            bar.update()
            directed = vectors[vectors.any(axis=1)]
            if len(directed) >= num_clusters:
                means = KMeans(num_clusters, n_init=KMEANS_RUNS, random_state=seed).fit(directed).cluster_centers_
                clustering.centers = _unit(means)
                clustering.sizes = np.bincount(clustering._nearest(vectors), minlength=num_clusters).tolist()
            bar.update()
        # Different texts can have the same embedding, which leaves clusters empty.
        if not clustering.sizes or 0 in clustering.sizes:
            raise ValueError(
                f"the {different} different texts do not fill {num_clusters} clusters ({len(directed)} texts have an "
                f"embedding; cluster sizes: {clustering.sizes}). Lower num_clusters."
            )
        return clustering

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (texts, dimensions), each of unit length, or zero for a text without known words."""
        texts = checked_texts(texts)
        if not texts:
            return np.empty((0, self.centers.shape[1]))
        if self.vocabulary is not None and self.components is not None:
            from sklearn.feature_extraction.text import TfidfVectorizer

            vectorizer = TfidfVectorizer(**TFIDF, vocabulary=self.vocabulary)
            vectorizer.idf_ = self.idf
            return _unit(vectorizer.transform(texts) @ self.components.T)
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ImportError(
                    f"embedder={self.embedder!r} needs sentence-transformers: pip install sentence-transformers. "
                    'Or take embedder="tfidf".'
                ) from error
            self._model = SentenceTransformer(self.embedder)
        vectors = self._model.encode(texts, normalize_embeddings=True, show_progress_bar=self.progress)
        return _unit(np.asarray(vectors, dtype=np.float64))

    def assign(self, texts: Sequence[str]) -> np.ndarray:
        """The cluster of each text: integers (texts,), from 0."""
        return self._nearest(self.embed(texts))

    def top_terms(self, n: int = 8) -> list[list[str]]:
        """The `n` words of each cluster that distinguish its center most from the other centers, best first.

        Raises:
            ValueError: if the embeddings are not TF-IDF.
        """
        if self.vocabulary is None or self.components is None:
            raise ValueError(f"top_terms needs embedder='tfidf'; this clustering has {self.embedder!r}.")
        weights = (self.centers - self.centers.mean(axis=0)) @ self.components
        return [[self.vocabulary[i] for i in np.argsort(-row, kind="stable")[:n]] for row in weights]

    def save(self, folder: str | Path) -> None:
        """Write settings and vocabulary as JSON, and arrays as safetensors, to a folder."""
        settings = {"embedder": self.embedder, "sizes": self.sizes, "vocabulary": self.vocabulary}
        arrays = {"centers": self.centers, "idf": self.idf, "components": self.components}
        present = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        with atomic_folder(folder) as scratch:
            write_text(scratch / SETTINGS_NAME, json.dumps(settings, ensure_ascii=False))
            save_file(present, str(scratch / ARRAYS_NAME))

    @classmethod
    def load(cls, folder: str | Path) -> TextClustering:
        """Read a clustering from a folder that `save` wrote.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the files do not belong to one clustering.
        """
        folder = Path(folder)
        if missing := [name for name in (SETTINGS_NAME, ARRAYS_NAME) if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder} lacks {missing}; expected a folder that TextClustering.save wrote.")
        settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
        arrays: dict[str, Any] = load_file(str(folder / ARRAYS_NAME))
        if "centers" not in arrays:
            raise ValueError(
                f"{folder / ARRAYS_NAME} has no centers, only {sorted(arrays)}: it was written by another version of "
                "spul; fit and save the clustering again."
            )
        clustering = cls(**settings, **arrays)
        if len(clustering.sizes) != len(clustering.centers) or (
            (clustering.vocabulary is None) == (clustering.embedder == "tfidf")
        ):
            raise ValueError(
                f"{SETTINGS_NAME} and {ARRAYS_NAME} in {folder} do not belong to one clustering; save it again."
            )
        if clustering.vocabulary is not None and (
            clustering.idf is None
            or clustering.components is None
            or clustering.idf.shape != (len(clustering.vocabulary),)
            or clustering.components.shape != (clustering.centers.shape[1], len(clustering.vocabulary))
        ):
            raise ValueError(
                f"the vocabulary in {SETTINGS_NAME} and the arrays in {ARRAYS_NAME} differ in size; save it again."
            )
        return clustering

    def _fit_tfidf(self, texts: list[str], dim: int, seed: int) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(**TFIDF)
        try:
            counts = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(
                f"no words to cluster by in {len(texts)} texts (stop words and single letters do not count); the "
                f"first is {texts[0][:80]!r}."
            ) from error
        if (most := min(counts.shape)) < dim:
            logger.warning("dim=%d is lowered to %d: %d texts, %d words.", dim, most, *counts.shape)
        svd = TruncatedSVD(min(dim, most), random_state=seed).fit(counts)
        self.vocabulary = vectorizer.get_feature_names_out().tolist()
        self.idf, self.components = vectorizer.idf_, svd.components_

    def _nearest(self, vectors: np.ndarray) -> np.ndarray:
        directed = vectors.any(axis=1)
        if num_lost := int((~directed).sum()):
            message = "%d of %d texts have no known word; they join the cluster nearest to the mean of all centers."
            logger.warning(message, num_lost, len(vectors))
        middle = (self.centers @ self.centers.mean(axis=0)).argmax()
        return np.where(directed, (vectors @ self.centers.T).argmax(axis=1), middle)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Each vector divided by its length, or zero if it has no direction."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(lengths > NO_LENGTH, vectors / np.maximum(lengths, NO_LENGTH), 0.0)
