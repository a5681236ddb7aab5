"""Attacks by someone with more than a keyboard: who trains, quantizes, or looks inside.

Each is to be run on a control too, a model that never saw the forget rows: what it gives up there, it never knew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from ...data.collator import ForgetRetainCollator
from ...data.rows import completion_text
from ..metrics.embeddings import response_embeddings
from .relearning import check_disjoint

# ---- a linear probe ----


@dataclass(frozen=True)
class Probe:
    """What a linear probe reads off hidden states, as accuracies on held-out rows.

    Attributes:
        accuracy: of the probe; on forget rows better low, as on the retrained model.
        majority: of always saying the most frequent completion of the training rows.
        shuffled: of probes trained on shuffled completions, the mean: what fitting alone gives.
    """

    accuracy: float
    majority: float
    shuffled: float


def linear_probe(
    model: nn.Module,
    train_rows: Dataset,
    test_rows: Dataset,
    collator: ForgetRetainCollator,
    num_shuffles: int = 5,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
) -> Probe:
    """Whether the true completion can be read off the last hidden state before the answer, whatever is answered.

    Logistic regression (scikit-learn, L2, C = 1) on standardized `response_embeddings`. A model that never saw the
    rows may know the task all the same: compare with its probe.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul.
        train_rows: `prompt` and `completion`, which are the classes.
        test_rows: other rows.
        collator: for tokenizing and padding.
        num_shuffles: how many probes are trained on shuffled completions.
        seed: of the shuffles.
        batch_size: rows per forward.
        progress: a name to show a progress bar under; none unless given.

    Raises:
        ValueError: if the training rows have one completion only, or test rows share prompts with them.

    Source: Alain and Bengio, https://arxiv.org/abs/1610.01644; the control, Hewitt and Liang,
    https://arxiv.org/abs/1909.03368
    """
    check_disjoint(train_rows, test_rows)
    train, test = (np.array([completion_text(c) for c in rows["completion"]]) for rows in (train_rows, test_rows))
    classes, counts = np.unique(train, return_counts=True)
    if len(classes) < 2 or num_shuffles < 1:
        raise ValueError(
            f"train_rows have the completions {classes.tolist()}, num_shuffles={num_shuffles}; expected at least two "
            "different completions, and one shuffle."
        )
    states, held_out = (
        response_embeddings(model, rows, collator, batch_size, progress) for rows in (train_rows, test_rows)
    )
    draws = np.random.default_rng(seed)

    def accuracy(labels: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(states, labels)
        return float(probe.score(held_out, test))

    return Probe(
        accuracy(train),
        float(np.mean(test == classes[counts.argmax()])),
        float(np.mean([accuracy(draws.permutation(train)) for _ in range(num_shuffles)])),
    )
