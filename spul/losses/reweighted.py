"""Gradient ascent whose tokens are weighted by their probabilities: WGA, SatImp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .terms import LossTerm, Reduction, check_not_negative, token_nll


@dataclass(frozen=True)
class SatImp(LossTerm):
    """Gradient ascent, a token of probability q weighted by q^saturation (1 - q)^importance (arXiv 2505.11953).

    The first factor spares tokens that are unlikely already, the second those that are likely in any case. The
    weights have no gradient. At importance 0 it is `WGA`, at 0 and 0 `GradientAscent`.

    Args:
        saturation: beta 1, at least 0; 5 as in the authors' program.
        importance: beta 2, at least 0; 1 as in the authors' contribution to open-unlearning, which calls it the
            paper's. The README of their own program recommends 0.1.
        reduction: `"mean"` (default), as in the authors' program, though that averages over the tokens of a batch and
            so weighs long rows more.

    Raises:
        ValueError: if an exponent is negative or not finite.
    """

    reduction: Reduction | None = "mean"
    saturation: float = 5.0
    importance: float = 1.0

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("saturation", self.saturation)
        check_not_negative("importance", self.importance)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        nll = token_nll(logits, labels)
        fixed = nll.detach()
        # 1 - q, exact where q is near 1
        return -torch.exp(-self.saturation * fixed) * (-torch.expm1(-fixed)) ** self.importance * nll


@dataclass(frozen=True)
class WGA(LossTerm):
    """Weighted gradient ascent: log q of a token of probability q, weighted by q^exponent (arXiv 2502.19301).

    The gradient of ascent grows as 1 / q; the weight, which has no gradient of its own, undoes that: at exponent 1 the
    gradient is that of q itself. At 0 it is `GradientAscent`.

    Args:
        exponent: alpha of the paper, beta of its program, at least 0; 1 (default) undoes the growth exactly.
        reduction: `"mean"` (default), as in the authors' program, though that averages over the tokens of a batch and
            so weighs long rows more; `"sum"`, over a response's tokens, as the paper writes it.

    Raises:
        ValueError: if `exponent` is negative or not finite.
    """

    reduction: Reduction | None = "mean"
    exponent: float = 1.0

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("exponent", self.exponent)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        nll = token_nll(logits, labels)
        return -torch.exp(-self.exponent * nll.detach()) * nll
