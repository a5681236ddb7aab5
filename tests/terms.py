"""Logits, labels and plain formulas that tests of the loss's terms share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.distributions import Categorical, kl_divergence

from spul.losses import LossTerm

# Row 0 has three response tokens, row 1 one, row 2 two, row 3 two.
LABELS = torch.tensor([[2, 0, 4], [1, -100, -100], [3, 3, -100], [0, 2, -100]])
IS_FORGET = torch.tensor([True, False, False, True])
VOCABULARY = 5


def random_logits(seed: int, rows: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 2 * torch.randn(rows, 3, VOCABULARY, dtype=dtype, generator=torch.Generator().manual_seed(seed))


LOGITS, REFERENCE = random_logits(1), random_logits(2)
RETAIN_REFERENCE = REFERENCE[~IS_FORGET]


def plain_nll(logits: torch.Tensor, labels: torch.Tensor, row: int) -> list[float]:
    """-log p of each response token of a row, with nothing but `math`."""
    losses = []
    for scores, label in zip(logits[row].tolist(), labels[row].tolist(), strict=True):
        if label != -100:
            losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
    return losses


def plain_kl(p_logits: torch.Tensor, q_logits: torch.Tensor, labels: torch.Tensor, row: int) -> list[float]:
    """KL(p || q) at each response token of a row."""
    slots = [k for k, label in enumerate(labels[row].tolist()) if label != -100]
    return [
        float(kl_divergence(Categorical(logits=p_logits[row, k]), Categorical(logits=q_logits[row, k]))) for k in slots
    ]


def reduce(values: list[float], reduction: str) -> float:
    return sum(values) / (len(values) if reduction == "mean" else 1)


@dataclass(frozen=True)
class Brier(LossTerm):
    """A user's own term: squared distance to the one-hot target, times a weight."""

    weight: float = 1.0

    def token_losses(self, logits, labels, reference_logits=None):
        target = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1])
        return self.weight * (logits.softmax(dim=-1) - target).pow(2).sum(dim=-1)
