"""Terms over hidden states of one layer, in place of logits: RMU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .terms import LossTerm, Reduction, as_float, check_above_zero, check_whole


@dataclass(frozen=True)
class StateTerm(LossTerm):
    """A term that reads hidden states (rows, K, d) at all tokens of a row, prompt and response, in place of logits.

    The labels then are these tokens, -100 in unused slots. All terms of an `UnlearningLoss` read the same layer.

    Args:
        reduction: `"mean"` (default) over a row's tokens, as published.
        layer: number of the decoder layer whose output is read, from 0; 7 as published for models of 32 layers.

    Raises:
        ValueError: if `layer` is no whole number of at least 0.
    """

    reduction: Reduction | None = "mean"
    layer: int = 7

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("layer", self.layer, "the number of a decoder layer, from 0")

    @property
    def reads_layer(self) -> int:
        return self.layer


@dataclass(frozen=True)
class RMU(StateTerm):
    """Representation misdirection: squared distance of a forget row's states to a fixed random vector.

    |h - c u|^2 at each token, u a random vector of length 1, its entries uniform in [0, 1) before that (arXiv
    2403.03218). The authors' program averages over the d entries of a state where the paper sums, here and in
    `StateDistance`, which scales the whole loss alone.

    Args:
        coefficient: c, above 0; 6.5 as published for Zephyr-7B. States of other models have other lengths.
        seed: of u, which depends on it and on d alone; the loss's record keeps it.
        layer: see `StateTerm`.
        reduction: see `StateTerm`.

    Raises:
        ValueError: if `coefficient` is not above 0, or `seed` no whole number of at least 0.
    """

    coefficient: float = 6.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("coefficient", self.coefficient)
        check_whole("seed", self.seed, "a whole number of at least 0")

    def control_vector(self, width: int) -> Tensor:
        """The vector c u (d,) that forget rows are steered to, float32 on the CPU."""
        direction = torch.rand(width, generator=torch.Generator().manual_seed(self.seed))
        return self.coefficient * direction / direction.norm()

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        states = as_float(logits)
        return (states - self.control_vector(states.shape[-1]).to(states)).square().sum(dim=-1)


@dataclass(frozen=True)
class StateDistance(StateTerm):
    """Squared distance of a row's states to the base model's: RMU's term on retain rows (arXiv 2403.03218).

    Args:
        layer: see `StateTerm`.
        reduction: see `StateTerm`.
    """

    needs_reference: ClassVar[bool] = True
    makes_unlikely: ClassVar[bool] = False

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        assert reference_logits is not None
        return (as_float(logits) - as_float(reference_logits)).square().sum(dim=-1)
