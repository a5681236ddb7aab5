"""What a prompt is trained for: the terms of the unlearning loss and their composition.

Pure tensors in, scalars out; nothing here knows a model. Every term sees logits *aligned with their targets*: slot `k`
of row `b` holds the distribution that predicts the `k`-th response token of that row, and unused slots carry the
label -100.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
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


def _float(logits: Tensor) -> Tensor:
    """16-bit logits are compared in float32; wider ones stay as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, (rows, K), 0 where the label is -100."""
    flat = F.cross_entropy(_float(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view(labels.shape)


@dataclass(frozen=True)
class CrossEntropy(LossTerm):
    """Cross-entropy to the labels given: L_f on generic responses, L_r on true ones (SPUL, eq. 2 and 3)."""

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return token_nll(logits, labels)


@dataclass(frozen=True)
class GradientAscent(LossTerm):
    """Negated cross-entropy: the true response of a forget row is made unlikely (GA).

    It has no lower bound. Use it with `ForgetRetainCollator(generic_completions=None)`, which keeps the true
    responses; ascending on generic responses would teach the model never to give them.
    """

    makes_unlikely: ClassVar[bool] = True

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return -token_nll(logits, labels)


@dataclass(frozen=True)
class NPO(LossTerm):
    """Negative preference optimisation: -(2 / b) log sigmoid(-b log(pi / pi_ref)) of a row's response.

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


class _TokenKL(torch.autograd.Function):
    """KL between two sets of logits, (..., V) each, over the last dimension.

    Written out because a vocabulary is large: autograd would keep four tensors of its size where one, the gradient,
    is enough. No gradient goes to the reference.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference_logits: Tensor, reverse: bool) -> Tensor:
        prompted = F.log_softmax(_float(logits), dim=-1)
        frozen = F.log_softmax(_float(reference_logits), dim=-1).to(prompted.dtype)
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


@dataclass
class LossOutput:
    """The unlearning loss and its parts, all scalars; `loss = forget + alpha * retain + beta * kl`."""

    loss: Tensor
    forget_loss: Tensor
    retain_loss: Tensor
    kl_loss: Tensor


@dataclass(frozen=True)
class UnlearningLoss:
    """L = L_f + alpha * L_r + beta * L_kl (SPUL, eq. 5): what is asked of the model, whatever learns it.

    Each term is a mean over the rows of its own group: `forget` over forget rows, `retain` and `kl` over retain
    rows. A group without rows contributes exactly 0, and so does a term of weight 0, for which nothing is computed.

    Args:
        alpha: weight of the retain term, at least 0. The paper tries 0.1, 0.5 and 1.
        beta: weight of the KL term, at least 0. The paper tries 0, 0.1, 0.5 and 1.
        forget: the term on forget rows.
        retain: the term on retain rows.
        kl: the term that holds retain rows to the frozen model.

    Raises:
        ValueError: if a weight is negative or not finite.
        TypeError: if a term is not a `LossTerm`.
    """

    alpha: float = 1.0
    beta: float = 0.5
    forget: LossTerm = field(default_factory=CrossEntropy)
    retain: LossTerm = field(default_factory=CrossEntropy)
    kl: LossTerm = field(default_factory=KLDivergence)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            weight = getattr(self, name)
            if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name}={weight!r}: expected a finite number of at least 0.")
        for name in ("forget", "retain", "kl"):
            term = getattr(self, name)
            if not isinstance(term, LossTerm):
                raise TypeError(
                    f"{name}={term!r} is not a LossTerm; pass an instance such as CrossEntropy() "
                    "or of your own subclass of spul.losses.LossTerm."
                )

    @property
    def uses_retain_rows(self) -> bool:
        """Whether retain rows matter to the loss at all."""
        return self.alpha > 0 or self.beta > 0

    @property
    def needs_reference(self) -> bool:
        """Whether any row is compared with the frozen model."""
        return bool(self.rows_needing_reference(torch.tensor([False, True])).any())

    def rows_needing_reference(self, is_forget: Tensor) -> Tensor:
        """Which rows need the frozen model's logits: (rows,) bool."""
        retain = (self.alpha > 0 and self.retain.needs_reference) or (self.beta > 0 and self.kl.needs_reference)
        needed = torch.zeros_like(is_forget, dtype=torch.bool)
        if retain:
            needed |= ~is_forget
        if self.forget.needs_reference:
            needed |= is_forget
        return needed

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        is_forget: Tensor,
        reference_logits: Tensor | None = None,
        num_forget: Tensor | float | None = None,
        num_retain: Tensor | float | None = None,
    ) -> LossOutput:
        """Compute the loss of a batch.

        Args:
            logits: (rows, K, V), aligned with `labels`.
            labels: (rows, K), response tokens, -100 where a slot is unused.
            is_forget: (rows,) bool.
            reference_logits: (R, K, V), the frozen model's, for the R rows of `rows_needing_reference` and in their
                order.
            num_forget: what the sum over forget rows is divided by; the number of forget rows here unless told.
                Under accumulation or several processes: their number in the whole step, over the processes.
            num_retain: the same for retain rows.
        """
        num_forget = is_forget.sum() if num_forget is None else num_forget
        num_retain = (~is_forget).sum() if num_retain is None else num_retain
        needed = self.rows_needing_reference(is_forget)
        if reference_logits is not None and len(reference_logits) != int(needed.sum()):
            raise ValueError(
                f"reference_logits have {len(reference_logits)} rows, and {int(needed.sum())} of {len(is_forget)} "
                "rows have a term that compares with the frozen model; pass those rows' only, in their order."
            )

        def rows_of(group: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            reference = None if reference_logits is None else reference_logits[group[needed]]
            return logits[group], labels[group], reference

        def mean(term: LossTerm, rows: tuple[Tensor, Tensor, Tensor | None], count: Tensor | float) -> Tensor:
            some_logits, some_labels, reference = rows
            if len(some_logits) == 0:
                return zero
            return term(some_logits, some_labels, reference if term.needs_reference else None).sum() / count

        zero = _float(logits).new_zeros(())
        retain = rows_of(~is_forget) if self.uses_retain_rows else (logits[:0], labels[:0], None)
        forget_loss = mean(self.forget, rows_of(is_forget), num_forget)
        retain_loss = mean(self.retain, retain, num_retain) if self.alpha > 0 else zero
        kl_loss = mean(self.kl, retain, num_retain) if self.beta > 0 else zero
        loss = forget_loss + self.alpha * retain_loss + self.beta * kl_loss
        return LossOutput(loss, forget_loss, retain_loss, kl_loss)

    def to_dict(self) -> dict[str, Any]:
        """The weights and terms as plain data, for `spul_config.json`."""

        def term(t: LossTerm) -> dict[str, Any]:
            kind = type(t)
            name = kind.__name__ if kind.__module__ == __name__ else f"{kind.__module__}.{kind.__qualname__}"
            return {"type": name, **dataclasses.asdict(t)}

        terms = {name: term(getattr(self, name)) for name in ("forget", "retain", "kl")}
        return {"alpha": self.alpha, "beta": self.beta, **terms}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UnlearningLoss:
        """Rebuild a loss from `to_dict`; only terms of this module are known by name.

        Raises:
            ValueError: if a term is not one of this module's: build the loss yourself then.
        """
        terms_here: tuple[type[LossTerm], ...] = (CrossEntropy, GradientAscent, KLDivergence, NPO, SimNPO)
        known = {kind.__name__: kind for kind in terms_here}

        def term(entry: dict[str, Any]) -> LossTerm:
            options = {key: value for key, value in entry.items() if key != "type"}
            if entry["type"] not in known:
                raise ValueError(
                    f"the saved loss uses the term {entry['type']!r}, which spul does not know (it knows "
                    f"{', '.join(known)}); pass the loss yourself: from_pretrained(..., loss=UnlearningLoss(...))."
                )
            return known[entry["type"]](**options)

        terms = {name: term(data[name]) for name in ("forget", "retain", "kl")}
        return cls(alpha=data["alpha"], beta=data["beta"], **terms)
