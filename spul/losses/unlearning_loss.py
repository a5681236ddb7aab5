"""UnlearningLoss: the objective, a weighted sum of terms."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import terms
from .terms import (
    IGNORE_INDEX,
    NPO,
    CrossEntropy,
    GradientAscent,
    KLAscent,
    KLDivergence,
    LossTerm,
    Reduction,
    SimNPO,
    as_float,
)

TERM_NAMES = ("forget", "retain", "kl", "lm")
REDUCTIONS: dict[str, Reduction] = {"forget": "sum", "retain": "auto", "kl": "auto", "lm": "sum"}  # unless given


@dataclass
class LossOutput:
    """The unlearning loss and its parts, all scalars; `loss = forget + alpha * retain + beta * kl + gamma * lm`."""

    loss: Tensor
    forget_loss: Tensor
    retain_loss: Tensor
    kl_loss: Tensor
    lm_loss: Tensor


@dataclass(frozen=True)
class UnlearningLoss:
    """L = L_f + alpha * L_r + beta * L_kl (SPUL, eq. 5), + gamma * L_lm (EUL), for any trained model.

    Each term is a mean over the rows of its own group: `forget` and `lm` over forget rows, `retain` and `kl` over
    retain rows. A group without rows contributes exactly 0. A term of weight 0 is not computed and contributes
    exactly 0.

    A row's loss is the sum over its response tokens; that of retain rows (`retain`, `kl`) with more than three tokens
    is three times their mean, so that long answers do not outweigh the generic ones of forget rows. A `reduction` of
    the term decides otherwise, see `LossTerm`.

    Args:
        alpha: weight of the retain term, at least 0. The paper tries 0.1, 0.5 and 1.
        beta: weight of the KL term, at least 0. The paper tries 0, 0.1, 0.5 and 1.
        forget: the term on forget rows.
        retain: the term on retain rows.
        kl: the term that keeps retain rows close to the base model.
        gamma: weight of the LM term, at least 0; 0 (default) in all methods but EUL, whose paper uses 0.2.
        lm: the term on the *prompt text* of forget rows, where the others see responses; it cannot compare with the
            base model.
        retain_budget: how far the retain loss may be above the base model's own on the same rows, in nats per token,
            above 0; a small one is 0.02. Alpha is then a multiplier, which starts at `alpha` and moves after every
            step, see `RetainMultiplier`. None (default) leaves alpha as it is.

    Raises:
        ValueError: if a weight is negative or not finite, `lm` compares with the base model, or `retain_budget` is not
            above 0 or given with `alpha=0`, without a retain term.
        TypeError: if a term is not a `LossTerm`.
    """

    alpha: float = 1.0
    beta: float = 0.5
    forget: LossTerm = field(default_factory=CrossEntropy)
    retain: LossTerm = field(default_factory=CrossEntropy)
    kl: LossTerm = field(default_factory=KLDivergence)
    gamma: float = 0.0
    lm: LossTerm = field(default_factory=lambda: GradientAscent(reduction="mean"))
    retain_budget: float | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            weight = getattr(self, name)
            if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name}={weight!r}: expected a finite number of at least 0.")
        budget = self.retain_budget
        if budget is not None:
            is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
            if not (is_number and math.isfinite(budget) and budget > 0):
                raise ValueError(
                    f"retain_budget={budget!r}: expected a finite number of nats per token above 0, such as 0.02, or "
                    "None for a fixed alpha."
                )
            if self.alpha == 0:
                raise ValueError(
                    f"retain_budget={budget!r} with alpha=0: there is no retain term to hold to it. Pass an alpha "
                    "above 0, where the multiplier starts, such as 1.0."
                )
        for name in TERM_NAMES:
            term = getattr(self, name)
            if not isinstance(term, LossTerm):
                raise TypeError(
                    f"{name}={term!r} is not a LossTerm; pass an instance such as CrossEntropy() "
                    "or of your own subclass of spul.losses.LossTerm."
                )
            if term.reduction is None:
                term = copy.copy(term)
                object.__setattr__(term, "reduction", REDUCTIONS[name])
                object.__setattr__(self, name, term)
        if self.lm.needs_reference:
            raise ValueError(
                f"lm={self.lm!r} compares with the base model, whose logits at prompt texts are not computed."
            )

    @property
    def uses_retain_rows(self) -> bool:
        """Whether the loss depends on retain rows."""
        return self.alpha > 0 or self.beta > 0

    @property
    def averages_long_rows(self) -> bool:
        """Whether retain rows of more than three tokens are averaged by default, by `reduction="auto"`."""
        terms_in_use = [term for weight, term in ((self.alpha, self.retain), (self.beta, self.kl)) if weight > 0]
        return any(term.reduction == "auto" for term in terms_in_use)

    @property
    def needs_reference(self) -> bool:
        """Whether any row is compared with the base model."""
        return bool(self.rows_needing_reference(torch.tensor([False, True])).any())

    def rows_needing_reference(self, is_forget: Tensor) -> Tensor:
        """Return (rows,) bool: whether a row's loss needs the base model's logits."""
        retain = (self.alpha > 0 and self.retain.needs_reference) or (self.beta > 0 and self.kl.needs_reference)
        needed = torch.zeros_like(is_forget, dtype=torch.bool)
        if retain or self.retain_budget is not None:
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
        text_logits: Tensor | None = None,
        text_labels: Tensor | None = None,
        alpha: Tensor | float | None = None,
    ) -> LossOutput:
        """Return the loss of a batch.

        Args:
            logits: (rows, K, V), aligned with `labels`.
            labels: (rows, K), response tokens, -100 in unused slots.
            is_forget: (rows,) bool.
            reference_logits: (R, K, V), of the base model, for the R rows of `rows_needing_reference`, in their
                order.
            num_forget: the divisor of the sum over forget rows; their number in this batch unless given. With
                gradient accumulation or several processes: their number in the whole step, divided by the number of
                processes.
            num_retain: the same for retain rows.
            text_logits: (F, n, V), at the prompt text of the F forget rows, in their order; with `gamma` only.
            text_labels: (F, n), the tokens of these texts, -100 in unused slots.
            alpha: the multiplier's value, with `retain_budget` only; where it starts unless given.

        Raises:
            ValueError: if `reference_logits` or `text_logits` are not those of the rows that need them, or `alpha` is
                given without a budget.
        """
        if alpha is not None and self.retain_budget is None:
            raise ValueError(f"alpha={alpha!r}: this loss has the fixed alpha={self.alpha} and no retain_budget.")
        alpha = self.alpha if alpha is None else alpha
        num_forget = is_forget.sum() if num_forget is None else num_forget
        num_retain = (~is_forget).sum() if num_retain is None else num_retain
        needed = self.rows_needing_reference(is_forget)
        if reference_logits is not None and len(reference_logits) != int(needed.sum()):
            raise ValueError(
                f"reference_logits have {len(reference_logits)} rows, and {int(needed.sum())} of {len(is_forget)} "
                "rows have a term that compares with the base model; pass those of these rows only, in their order."
            )

        if self.gamma > 0 and (text_logits is None or text_labels is None or len(text_logits) != int(is_forget.sum())):
            raise ValueError(
                f"gamma={self.gamma} needs the prompt texts of {int(is_forget.sum())} forget rows; pass their "
                "text_logits and text_labels, in their order."
            )

        def rows_of(group: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            reference = None if reference_logits is None else reference_logits[group[needed]]
            return logits[group], labels[group], reference

        def mean(term: LossTerm, rows: tuple[Tensor, Tensor, Tensor | None], count: Tensor | float) -> Tensor:
            some_logits, some_labels, reference = rows
            if len(some_logits) == 0:
                return zero
            return term(some_logits, some_labels, reference if term.needs_reference else None).sum() / count

        zero = as_float(logits).new_zeros(())
        retain = rows_of(~is_forget) if self.uses_retain_rows else (logits[:0], labels[:0], None)
        forget_loss = mean(self.forget, rows_of(is_forget), num_forget)
        retain_loss = mean(self.retain, retain, num_retain) if self.alpha > 0 else zero
        kl_loss = mean(self.kl, retain, num_retain) if self.beta > 0 else zero
        lm_loss = zero
        if self.gamma > 0:
            assert text_logits is not None
            assert text_labels is not None
            lm_loss = mean(self.lm, (text_logits, text_labels, None), num_forget)
        loss = forget_loss + alpha * retain_loss + self.beta * kl_loss + self.gamma * lm_loss
        return LossOutput(loss, forget_loss, retain_loss, kl_loss, lm_loss)

    @torch.no_grad()
    def retain_excess(
        self,
        logits: Tensor,
        labels: Tensor,
        is_forget: Tensor,
        reference_logits: Tensor | None,
        num_retain: Tensor | float,
    ) -> Tensor:
        """How far the retain loss is above the base model's own, in nats per token: what `retain_budget` bounds.

        Args:
            logits: this and the others as in a call. The excess of a row is the mean over its response tokens of the
                retain term's loss less that of the base's logits; no `reduction` changes that.

        Returns:
            Scalar: the sum over retain rows divided by `num_retain`, so that batches of a step add up; 0 without
            retain rows.

        Raises:
            ValueError: if there are retain rows and `reference_logits` is None.
        """
        if not (~is_forget).any():
            return as_float(logits).new_zeros(())
        if reference_logits is None:
            raise ValueError("retain_budget compares with the base model: pass reference_logits of the retain rows.")
        rows, labels = logits[~is_forget], labels[~is_forget]
        base = reference_logits[~is_forget[self.rows_needing_reference(is_forget)]]
        tokens = self.retain.token_losses(rows, labels, base) - self.retain.token_losses(base, labels, base)
        used = labels != IGNORE_INDEX
        means = tokens.masked_fill(~used, 0.0).sum(dim=1) / used.sum(dim=1).clamp(min=1)
        return means.sum() / num_retain

    def to_dict(self) -> dict[str, Any]:
        """Return the weights and terms as plain data, for `spul_config.json`."""

        def term(t: LossTerm) -> dict[str, Any]:
            kind = type(t)
            name = kind.__name__ if kind.__module__ == terms.__name__ else f"{kind.__module__}.{kind.__qualname__}"
            return {"type": name, **dataclasses.asdict(t)}

        weights = {name: getattr(self, name) for name in ("alpha", "beta", "gamma")}
        if self.retain_budget is not None:
            weights["retain_budget"] = self.retain_budget
        return {**weights, **{name: term(getattr(self, name)) for name in TERM_NAMES}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UnlearningLoss:
        """Rebuild a loss from `to_dict`; only terms of spul itself are known.

        Raises:
            ValueError: if it has another term: build the loss yourself then.
        """
        terms_here: tuple[type[LossTerm], ...] = (CrossEntropy, GradientAscent, KLAscent, KLDivergence, NPO, SimNPO)
        known = {kind.__name__: kind for kind in terms_here}

        def term(entry: dict[str, Any]) -> LossTerm:
            options = {key: value for key, value in entry.items() if key != "type"}
            if entry["type"] not in known:
                raise ValueError(
                    f"the saved loss uses the term {entry['type']!r}, which spul does not know (it knows "
                    f"{', '.join(known)}); pass the loss yourself: from_pretrained(..., loss=UnlearningLoss(...))."
                )
            return known[entry["type"]](**options)

        saved = {name: term(data[name]) for name in TERM_NAMES if name in data}  # older records have no lm
        budget = data.get("retain_budget")
        return cls(data["alpha"], data["beta"], gamma=data.get("gamma", 0.0), retain_budget=budget, **saved)
