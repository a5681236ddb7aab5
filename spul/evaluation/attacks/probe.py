"""Linear probes: an attacker who reads the completion from hidden states.

Run it on a control too, a model that never saw the forget rows: it may know the task all the same.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from ...data.encoder import RowEncoder
from ...data.rows import column_values, completion_text
from ...records.fields import is_count
from ..metrics.embeddings import response_embeddings
from .relearning import check_disjoint


def linear_probe(
    model: nn.Module,
    train_rows: Dataset,
    test_rows: Dataset,
    encoder: RowEncoder,
    num_shuffles: int = 5,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
) -> dict[str, float]:
    """Accuracy of reading the true completion from the last hidden state before the answer, whatever is answered.

    Logistic regression (scikit-learn, L2, C = 1) on standardized `response_embeddings`. A model that never saw the
    rows may know the task all the same: compare with its probe.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul.
        train_rows: `prompt` and `completion`; the different completions are the classes.
        test_rows: other rows.
        encoder: turns rows into token ids.
        num_shuffles: number of probes trained on shuffled completions.
        seed: seed of the shuffles.
        batch_size: rows per forward pass.
        progress: label of a progress bar; None shows none.

    Returns:
        Accuracies on `test_rows`, in 0..1: `accuracy` of the probe, lower is better on forget rows, down to that of
        the retrained model; `majority`, of always predicting the most frequent training completion; `shuffled`, the
        mean of probes trained on shuffled completions: the effect of fitting alone.

    Raises:
        ValueError: if the training rows have one completion only, or test rows share prompts with them.

    Source: Alain and Bengio, https://arxiv.org/abs/1610.01644; the control, Hewitt and Liang,
    https://arxiv.org/abs/1909.03368
    """
    check_disjoint(train_rows, test_rows)
    train, test = (
        np.array([completion_text(c) for c in column_values(rows, "completion")]) for rows in (train_rows, test_rows)
    )
    classes, counts = np.unique(train, return_counts=True)
    if len(classes) < 2 or not is_count(num_shuffles, 1):
        raise ValueError(
            f"train_rows have the completions {classes.tolist()}, num_shuffles={num_shuffles!r}; expected at least "
            "two different completions, and one shuffle."
        )
    states, held_out = (
        response_embeddings(model, rows, encoder, batch_size, progress) for rows in (train_rows, test_rows)
    )
    draws = np.random.default_rng(seed)

    def accuracy(labels: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(states, labels)
        return float(probe.score(held_out, test))

    return {
        "accuracy": accuracy(train),
        "majority": float(np.mean(test == classes[counts.argmax()])),
        "shuffled": float(np.mean([accuracy(draws.permutation(train)) for _ in range(num_shuffles)])),
    }
