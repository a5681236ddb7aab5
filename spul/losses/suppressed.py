"""Cross-entropy to a distribution in which the label is suppressed: the model's own (CE-U) or the base's (UNDIAL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .terms import IGNORE_INDEX, LossTerm, Reduction, as_float, check_above_zero, check_whole, token_kl


@dataclass(frozen=True)
class CEU(LossTerm):
    """Cross-entropy unlearning: toward the model's own distribution without the label (CE-U, arXiv 2503.01224).

    The target is softmax of the current logits, the label's set to minus infinity; it has no gradient, as in the
    author's contribution to open-unlearning. Unlike ascent, the gradient stays bounded as the label becomes unlikely.
    It needs neither a reference nor retain rows.

    Args:
        skip: leading tokens of a response that are not trained, at least 0; 1 (default) as in the published training.
            The last token of a response is trained in any case, so that labels of one token are.
        reduction: `"mean"` (default) over the trained tokens of a row, as in the author's program, though that
            averages over the tokens of a batch.

    Raises:
        ValueError: if `skip` is no whole number of at least 0.
    """

    reduction: Reduction | None = "mean"
    skip: int = 1

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("skip", self.skip, "a whole number of tokens of at least 0")

    def trained(self, labels: Tensor) -> Tensor:
        """The labels (rows, K) that are trained, -100 in place of the others."""
        used = labels != IGNORE_INDEX
        place, total = used.cumsum(dim=1), used.sum(dim=1, keepdim=True)
        return labels.masked_fill(place <= (total - 1).clamp(max=self.skip), IGNORE_INDEX)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        target = as_float(logits).detach().scatter(2, labels.clamp(min=0)[..., None], -torch.inf)
        return _cross_entropy(logits, target)

    def __call__(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        """Reduce `token_losses` over each row's trained tokens: (rows,)."""
        return super().__call__(logits, self.trained(labels), reference_logits)


@dataclass(frozen=True)
class UNDIAL(LossTerm):
    """Self-distillation from adjusted logits: toward the base's distribution, the label's logit lowered.

    The target is softmax(base logits - strength * one-hot(label)), fixed throughout training (arXiv 2402.10052, as in
    its program). With strength 0 the base is the optimum. The authors' program averages over all tokens of a text,
    which is to be forgotten as a whole; so does their contribution to open-unlearning, over prompt and padding too.
    This one takes response tokens only.

    Args:
        strength: in logits, above 0; 10 (default) of the 3, 10 and 30 that the authors name in open-unlearning.
        reduction: `"mean"` (default) over a row's tokens; the authors' program averages over those of a batch.

    Raises:
        ValueError: if `strength` is not above 0.
    """

    reduction: Reduction | None = "mean"
    strength: float = 10.0

    needs_reference: ClassVar[bool] = True
    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("strength", self.strength)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        assert reference_logits is not None
        base, index = as_float(reference_logits), labels.clamp(min=0)[..., None]
        return _cross_entropy(logits, base.scatter(2, index, base.gather(2, index) - self.strength))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits (rows, K, V) to the softmax of a fixed target's (rows, K, V), in nats: (rows, K).

    The divergence, whose gradient is the same, and the target's entropy.
    """
    log_target = F.log_softmax(target, dim=-1)
    probability = log_target.exp()
    entropy = -(probability * log_target.masked_fill_(probability == 0, 0.0)).sum(dim=-1)
    return token_kl(logits, target, "forward") + entropy
