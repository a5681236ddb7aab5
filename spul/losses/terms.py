"""The terms of an unlearning loss: each a number per row.

Pure tensors in, tensors out; nothing here knows a model. Every term sees logits *aligned with their targets*: slot `k`
of row `b` holds the distribution that predicts the `k`-th response token of that row, and unused slots carry the
label -100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class LossTerm:
    """One term of an unlearning loss: a number per row. Subclass it and define `token_losses` to write your own.

    Args:
        reduction: how a row's response tokens become the row's number: `"sum"` (default) or `"mean"`.

    Raises:
        ValueError: if `reduction` is neither.

    Example:
        ```python
        @dataclass(frozen=True)
        class FocalCrossEntropy(LossTerm):
            gamma: float = 2.0

            def token_losses(self, logits, labels, reference_logits=None):
                nll = token_nll(logits, labels)
                return (1 - torch.exp(-nll)) ** self.gamma * nll
        ```
    """

    reduction: Reduction = "sum"

    needs_reference: ClassVar[bool] = False
    """True if the term reads `reference_logits`, the frozen model's own logits at the same positions."""

    makes_unlikely: ClassVar[bool] = False
    """True if the term makes the labels unlikely, so that as a forget term it needs the rows' own completions."""

    def __post_init__(self) -> None:
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={self.reduction!r} is not known; pass 'sum' or 'mean'.")

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        """The loss of every response token.

        Args:
            logits: (rows, K, V), the prompted model's logits.
            labels: (rows, K), the response tokens; -100 where a slot is unused.
            reference_logits: (rows, K, V), the frozen model's logits; given if `needs_reference`.

        Returns:
            (rows, K). What stands in unused slots does not matter, so long as it is finite.
        """
        raise NotImplementedError(f"{type(self).__name__} must define token_losses(logits, labels, reference_logits)")

    def __call__(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        """Reduce `token_losses` over each row's response tokens: (rows,)."""
        if self.needs_reference and reference_logits is None:
            raise ValueError(f"{type(self).__name__} compares with the frozen model: pass reference_logits.")
        if labels.shape != logits.shape[:2]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not match logits of shape {tuple(logits.shape)}; "
                "expected labels (rows, K) and logits (rows, K, vocabulary)."
            )
        used = labels != IGNORE_INDEX
        per_token = self.token_losses(logits, labels, reference_logits).masked_fill(~used, 0.0)
        total = per_token.sum(dim=1)
        rows = self.row_losses(total / used.sum(dim=1).clamp(min=1) if self.reduction == "mean" else total)
        return rows.masked_fill(~used.any(dim=1), 0.0)  # NPO of nothing would be a constant

    def row_losses(self, reduced: Tensor) -> Tensor:
        """The rows' numbers, (rows,), from their reduced token losses: the same, unless a term bends them."""
        return reduced


def as_float(logits: Tensor) -> Tensor:
    """16-bit logits are compared in float32; wider ones stay as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, (rows, K), 0 where the label is -100."""
    flat = F.cross_entropy(
        as_float(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return flat.view(labels.shape)


@dataclass(frozen=True)
class CrossEntropy(LossTerm):
    """Cross-entropy to the labels given: L_f on generic responses, L_r on true ones (SPUL, eq. 2 and 3)."""

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return token_nll(logits, labels)


@dataclass(frozen=True)
class GradientAscent(LossTerm):
    """Negated cross-entropy: the true response of a forget row is made unlikely (GA).

    It has no lower bound unless `cap` gives it one. Use it with `ForgetRetainCollator(generic_completions=None)`,
    which keeps the true responses; ascending on generic responses would teach the model never to give them.

    Args:
        reduction: see `LossTerm`.
        cap: in nats per token, above 0; None (default) for none, as published. A token that costs more counts as the
            cap and gives no gradient: the loss is -min(cross-entropy, cap).

    Raises:
        ValueError: if `cap` is not above 0.
    """

    cap: float | None = None

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_cap(self.cap)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return -_capped(token_nll(logits, labels), self.cap)


@dataclass(frozen=True)
class NPO(LossTerm):
    """Negative preference optimization: -(2 / b) log sigmoid(-b log(pi / pi_ref)) of a row's response.

    Bounded below, unlike gradient ascent, which it becomes as b goes to 0 (arXiv 2404.05868, eq. 3). The ratio is that
    of whole responses, so `reduction` stays `"sum"` for the published loss.

    Args:
        inverse_temperature: b, above 0; 0.1 as published.
        reduction: see `LossTerm`.

    Raises:
        ValueError: if `inverse_temperature` is not above 0.
    """

    inverse_temperature: float = 0.1

    needs_reference: ClassVar[bool] = True
    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_inverse_temperature(self.inverse_temperature)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        assert reference_logits is not None
        return token_nll(logits, labels) - token_nll(reference_logits, labels)

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

    reduction: Reduction = "mean"
    inverse_temperature: float = 2.5
    margin: float = 0.0

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_inverse_temperature(self.inverse_temperature)
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"margin={self.margin!r}: expected a finite number of at least 0.")

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return token_nll(logits, labels)

    def row_losses(self, reduced: Tensor) -> Tensor:
        bent = F.logsigmoid(self.inverse_temperature * reduced - self.margin)
        return -2 / self.inverse_temperature * bent


def _capped(per_token: Tensor, cap: float | None) -> Tensor:
    return per_token if cap is None else per_token.clamp(max=cap)


def _check_cap(cap: float | None) -> None:
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, (int, float)) or not cap > 0):
        raise ValueError(f"cap={cap!r}: expected a number of nats above 0, or None for no cap.")


def _check_inverse_temperature(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"inverse_temperature={value!r}: expected a finite number above 0.")


@dataclass(frozen=True)
class KLDivergence(LossTerm):
    """Kullback-Leibler divergence between the prompted and the frozen model at the response tokens, in nats.

    Args:
        direction: `"reverse"` (default), KL(prompted || frozen), as the SPUL paper prints it (eq. 4);
            `"forward"`, KL(frozen || prompted), as its program computes it.
        reduction: see `LossTerm`.

    Raises:
        ValueError: if `direction` is neither.
    """

    direction: Literal["reverse", "forward"] = "reverse"

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("reverse", "forward"):
            raise ValueError(
                f"direction={self.direction!r} is not known; pass 'reverse' for KL(prompted || frozen) "
                "or 'forward' for KL(frozen || prompted)."
            )

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        assert reference_logits is not None
        return _TokenKL.apply(logits, reference_logits, self.direction == "reverse")


@dataclass(frozen=True)
class KLAscent(KLDivergence):
    """Negated KL: a forget row's answer is driven away from the frozen model's (EUL, arXiv 2310.20150).

    As with `GradientAscent`, the rows keep their own completions; only the places of these tokens matter here. The
    published term has no bound.

    Args:
        direction: `"forward"` (default), KL(frozen || updated), as published; or `"reverse"`.
        reduction: see `LossTerm`.
        cap: in nats per token, above 0; None (default) for none, as published. A token that is further away counts as
            the cap and gives no gradient: the loss is -min(KL, cap).

    Raises:
        ValueError: if `direction` is neither, or `cap` not above 0.
    """

    direction: Literal["reverse", "forward"] = "forward"
    cap: float | None = None

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_cap(self.cap)

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return -_capped(super().token_losses(logits, labels, reference_logits), self.cap)


class _TokenKL(torch.autograd.Function):
    """KL between two sets of logits, (..., V) each, over the last dimension.

    Written out because a vocabulary is large: autograd would keep four tensors of its size where one, the gradient,
    is enough. No gradient goes to the reference.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference_logits: Tensor, reverse: bool) -> Tensor:
        prompted = F.log_softmax(as_float(logits), dim=-1)
        frozen = F.log_softmax(as_float(reference_logits), dim=-1).to(prompted.dtype)
        target = prompted if reverse else frozen
        gap = prompted - frozen if reverse else frozen - prompted
        gap.masked_fill_(target == -torch.inf, 0.0)  # what cannot be said costs nothing
        weight = target.exp()
        with torch.autocast(logits.device.type, enabled=False):  # which would take the product in 16 bit
            kl = torch.linalg.vecdot(weight, gap)
        if ctx.needs_input_grad[0]:
            # d/dz of sum P (log P - log Q) is P (log P - log Q - KL); of sum Q (log Q - log P) it is P - Q.
            gradient = gap.sub_(kl[..., None]).mul_(weight) if reverse else prompted.exp_().sub_(weight)
            ctx.save_for_backward(gradient)
            ctx.dtype = logits.dtype
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output[..., None]).to(ctx.dtype), None, None
