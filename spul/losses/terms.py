"""The terms of an unlearning loss; each returns one loss per row.

Logits are *aligned with their labels*: slot `k` of row `b` holds the distribution that predicts the `k`-th response
token of that row. Unused slots have the label -100.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

Reduction = Literal["sum", "mean", "auto"]
SUMMED_TOKENS = 3  # of a row under "auto": labels of classes have one to three


@dataclass(frozen=True)
class LossTerm:
    """One term of an unlearning loss, one loss per row. To write your own, subclass it and define `token_losses`.

    Args:
        reduction: of the losses of a row's response tokens: `"sum"`, `"mean"` or `"auto"`, which is the sum of at most
            three tokens and the mean of more: labels are summed and free answers averaged, row by row. None (default)
            leaves it to the place: `UnlearningLoss` takes `"auto"` for `retain` and `kl`, and for `forget` if that is
            a `CrossEntropy` that does not make its labels unlikely; the sum elsewhere, as does a term on its own.

    Raises:
        ValueError: if `reduction` is none of these.

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

    reduction: Reduction | None = None

    needs_reference: ClassVar[bool] = False
    """True if the term reads `reference_logits`, the base model's logits at the same positions."""

    makes_unlikely: ClassVar[bool] = False
    """True if the term makes the labels unlikely, so that as a forget term it needs the rows' own completions."""

    needs_pairs: ClassVar[bool] = False
    """True if the term compares two responses of a forget row, a chosen and a rejected one, which are rows each."""

    @property
    def reads_layer(self) -> int | None:
        """Number of the decoder layer whose output the term reads at all tokens; None (default) if it reads logits."""
        return None

    def __post_init__(self) -> None:
        if self.reduction not in (None, "sum", "mean", "auto"):
            raise ValueError(
                f"reduction={self.reduction!r} is not known; pass 'sum' or 'mean', 'auto' for the sum of up to "
                f"{SUMMED_TOKENS} tokens and averages of more, or None for the default of the term's place."
            )

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        """Return the loss of every response token.

        Args:
            logits: (rows, K, V), of the trained model.
            labels: (rows, K), the response tokens; -100 in unused slots.
            reference_logits: (rows, K, V), of the base model; given if `needs_reference`.

        Returns:
            (rows, K), in nats; values in unused slots are ignored, but must be finite.
        """
        raise NotImplementedError(f"{type(self).__name__} must define token_losses(logits, labels, reference_logits)")

    def __call__(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        """Reduce `token_losses` over each row's response tokens: (rows,)."""
        if self.needs_reference and reference_logits is None:
            raise ValueError(f"{type(self).__name__} compares with the base model: pass reference_logits.")
        if labels.shape != logits.shape[:2]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not match logits of shape {tuple(logits.shape)}; "
                "expected labels (rows, K) and logits (rows, K, vocabulary)."
            )
        used = labels != IGNORE_INDEX
        per_token = self.token_losses(logits, labels, reference_logits)
        self._check_shape("token_losses", per_token, labels.shape)
        reduced, length = per_token.masked_fill(~used, 0.0).sum(dim=1), used.sum(dim=1).clamp(min=1)
        if self.reduction in ("mean", "auto"):
            summed = SUMMED_TOKENS if self.reduction == "auto" else 0
            reduced = torch.where(length > summed, reduced / length, reduced)
        rows = self.row_losses(reduced)
        self._check_shape("row_losses", rows, labels.shape[:1])
        return rows.masked_fill(~used.any(dim=1), 0.0)  # NPO of nothing would be a constant

    def row_losses(self, reduced: Tensor) -> Tensor:
        """Row losses (rows,) from the reduced token losses; the identity, unless a term overrides it."""
        return reduced

    def _check_shape(self, method: str, losses: Tensor, expected: torch.Size) -> None:
        # Losses that are reduced already would be spread over the tokens again, and counted once for each.
        if losses.shape != expected:
            names = "(rows, K)" if len(expected) == 2 else "(rows,)"
            raise ValueError(
                f"{type(self).__name__}.{method} returned the shape {tuple(losses.shape)}; expected {names}, here "
                f"{tuple(expected)}: the loss of every response token from token_losses, that of every row from "
                "row_losses."
            )


def check_above_zero(name: str, value: Any) -> None:
    """Raise unless a setting of a term is a finite number above 0.

    Raises:
        ValueError: if it is not.
    """
    if not is_finite_number(value) or value <= 0:
        raise ValueError(f"{name}={value!r}: expected a finite number above 0.")


def check_not_negative(name: str, value: Any) -> None:
    """Raise unless a weight or setting is a finite number of at least 0.

    Raises:
        ValueError: if it is not.
    """
    if not is_finite_number(value) or value < 0:
        raise ValueError(f"{name}={value!r}: expected a finite number of at least 0.")


def check_whole(name: str, value: Any, expected: str) -> None:
    """Raise unless a setting of a term is a whole number of at least 0; the message says what is `expected`.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r}: expected {expected}.")


def is_finite_number(value: Any) -> TypeGuard[float]:
    """`spul.records.fields.is_finite_number`, for the losses, which import nothing of spul."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def as_float(logits: Tensor) -> Tensor:
    """16-bit logits as float32; wider ones unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, (rows, K), 0 where the label is -100."""
    flat = F.cross_entropy(
        as_float(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return flat.view(labels.shape)


@dataclass(frozen=True)
class CrossEntropy(LossTerm):
    """Cross-entropy to the labels: L_f with generic responses, L_r with true ones (SPUL, eq. 2 and 3)."""

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return token_nll(logits, labels)


@dataclass(frozen=True)
class _Ascent(LossTerm):
    """Mixin: the negated token losses of the next base class, -min(loss, cap)."""

    cap: float | None = None

    makes_unlikely: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        cap = self.cap
        if cap is not None and (not is_finite_number(cap) or cap <= 0):
            raise ValueError(f"cap={cap!r}: expected a number of nats above 0, or None for no cap.")

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        losses = super().token_losses(logits, labels, reference_logits)
        return -(losses if self.cap is None else losses.clamp(max=self.cap))


@dataclass(frozen=True)
class GradientAscent(_Ascent, CrossEntropy):
    """Negated cross-entropy: makes the true response of a forget row unlikely (GA, arXiv 2210.01504, eq. 1).

    It has no lower bound without `cap`. Use it with `ForgetRetainCollator(generic_completions=None)`, which keeps
    the true responses; ascent on generic responses would train the model never to generate them.

    Args:
        reduction: see `LossTerm`.
        cap: in nats per token, above 0; None (default) for none, as published. A token with a larger cross-entropy
            counts as the cap and has no gradient: the loss is -min(cross-entropy, cap).

    Raises:
        ValueError: if `cap` is not above 0.
    """


@dataclass(frozen=True)
class KLDivergence(LossTerm):
    """Kullback-Leibler divergence between the trained and the base model at the response tokens, in nats.

    Args:
        direction: `"reverse"` (default), KL(trained || base), as printed in the SPUL paper (eq. 4);
            `"forward"`, KL(base || trained), as its program computes it.
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
                f"direction={self.direction!r} is not known; pass 'reverse' for KL(trained || base) "
                "or 'forward' for KL(base || trained)."
            )

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        assert reference_logits is not None
        return token_kl(logits, reference_logits, self.direction)


@dataclass(frozen=True)
class KLAscent(_Ascent, KLDivergence):
    """Negated KL: drives the answers on forget rows away from the base model's (EUL, arXiv 2310.20150, eq. 2).

    As with `GradientAscent`, forget rows keep their own completions; only the positions of these tokens matter. The
    published term has no bound.

    Args:
        direction: `"forward"` (default), KL(base || trained), as we read the paper, which has no program; or
            `"reverse"`.
        reduction: see `LossTerm`.
        cap: in nats per token, above 0; None (default) for none, as published. A token with a larger KL counts as the
            cap and has no gradient: the loss is -min(KL, cap).

    Raises:
        ValueError: if `direction` is neither, or `cap` not above 0.
    """

    direction: Literal["reverse", "forward"] = "forward"


def token_kl(logits: Tensor, reference_logits: Tensor, direction: Literal["reverse", "forward"]) -> Tensor:
    """KL between two sets of logits (..., V) in nats, (...): `"reverse"` is KL(logits || reference).

    The reference has no gradient, and may have logits of minus infinity.
    """
    return _TokenKL.apply(logits, reference_logits, direction == "reverse")


class _TokenKL(torch.autograd.Function):
    """KL between two sets of logits, (..., V) each, over the last dimension.

    Written out because a vocabulary is large: autograd would store four tensors of its size where one, the gradient,
    is enough. The reference has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference_logits: Tensor, reverse: bool) -> Tensor:
        trained = F.log_softmax(as_float(logits), dim=-1)
        base = F.log_softmax(as_float(reference_logits), dim=-1).to(trained.dtype)
        target = trained if reverse else base
        gap = trained - base if reverse else base - trained
        gap.masked_fill_(target == -torch.inf, 0.0)  # tokens of probability 0 contribute 0
        weight = target.exp()
        with torch.autocast(logits.device.type, enabled=False):  # autocast would compute the product in 16 bit
            kl = torch.linalg.vecdot(weight, gap)
        if ctx.needs_input_grad[0]:
            # d/dz of sum P (log P - log Q) is P (log P - log Q - KL); of sum Q (log Q - log P) it is P - Q.
            gradient = gap.sub_(kl[..., None]).mul_(weight) if reverse else trained.exp_().sub_(weight)
            ctx.save_for_backward(gradient)
            ctx.dtype = logits.dtype
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output[..., None]).to(ctx.dtype), None, None
