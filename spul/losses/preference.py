"""Terms of preference optimization: a response is dispreferred (NPO, SimNPO), or another one preferred to it (DPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .terms import LossTerm, Reduction, check_above_zero, check_not_negative, token_nll


@dataclass(frozen=True)
class _LogRatio(LossTerm):
    """Base of NPO and DPO: token losses are -log(pi / pi_ref)."""

    inverse_temperature: float = 0.1

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("inverse_temperature", self.inverse_temperature)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        assert reference_logits is not None
        return token_nll(logits, labels) - token_nll(reference_logits, labels)


@dataclass(frozen=True)
class NPO(_LogRatio):
    """Negative preference optimization: -(2 / b) log sigmoid(-b log(pi / pi_ref)) of a row's response.

    Bounded below, unlike gradient ascent, its limit as b goes to 0 (arXiv 2404.05868, eq. 3). The ratio is that of
    whole responses, so `reduction` is `"sum"` in the published loss.

    Args:
        inverse_temperature: b, above 0; 0.1 as published.
        reduction: see `LossTerm`.

    Raises:
        ValueError: if `inverse_temperature` is not above 0.
    """

    makes_unlikely: ClassVar[bool] = True

    def row_losses(self, reduced: Tensor) -> Tensor:
        return -2 / self.inverse_temperature * F.logsigmoid(self.inverse_temperature * reduced)


@dataclass(frozen=True)
class SimNPO(LossTerm):
    """NPO without a reference: -(2 / b) log sigmoid(-b / |y| log pi - margin), |y| the response's length in tokens.

    As printed in arXiv 2410.07163 (eq. 4). The authors' program subtracts the margin before it multiplies by b; with
    the published margin of 0 that is the same.

    Args:
        inverse_temperature: b, above 0; 2.5 as published for TOFU.
        margin: gamma, at least 0; 0 as published for TOFU.
        reduction: `"mean"` (default) divides by the response's length, as published.

    Raises:
        ValueError: if `inverse_temperature` is not above 0 or `margin` is negative.
    """

    reduction: Reduction | None = "mean"
    inverse_temperature: float = 2.5
    margin: float = 0.0

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("inverse_temperature", self.inverse_temperature)
        check_not_negative("margin", self.margin)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return token_nll(logits, labels)

    def row_losses(self, reduced: Tensor) -> Tensor:
        log_sigmoid = F.logsigmoid(self.inverse_temperature * reduced - self.margin)
        return -2 / self.inverse_temperature * log_sigmoid


@dataclass(frozen=True)
class DPO(_LogRatio):
    """Direct preference optimization: a chosen response is preferred to the row's own, the rejected one.

    -(2 / b) log sigmoid(b (log(pi / pi_ref)(chosen) - log(pi / pi_ref)(rejected))): the loss of arXiv 2305.18290
    (eq. 7), which TOFU's program (2401.06121) has as it is, times the factor 2 / b of the programs of NPO (2404.05868,
    whose eq. 2 prints 1 / b), of AltPO (2409.13474) and of open-unlearning (IdkDPO). With a chosen response whose
    ratio stays 1 it is `NPO`. Ratios are those of whole responses, so `reduction` is `"sum"` in the published losses.

    The rows are the chosen ones, then the rejected ones in the same order: `UnlearningLoss` puts them so. The loss of
    a pair is that of its chosen row; a rejected row's is 0.

    Args:
        inverse_temperature: b, above 0; 0.1 as published.
        reduction: see `LossTerm`.

    Raises:
        ValueError: if `inverse_temperature` is not above 0.
    """

    needs_pairs: ClassVar[bool] = True

    def row_losses(self, reduced: Tensor) -> Tensor:
        if len(reduced) % 2:
            raise ValueError(f"DPO got {len(reduced)} rows; expected the chosen rows, then as many rejected ones.")
        chosen, rejected = reduced.tensor_split(2)
        losses = -2 / self.inverse_temperature * F.logsigmoid(self.inverse_temperature * (rejected - chosen))
        return torch.cat([losses, torch.zeros_like(losses)])
