"""UnlearningLoss: the objective, a weighted sum of terms."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .preference import DPO, NPO, SimNPO
from .reweighted import WGA, SatImp
from .states import RMU, StateDistance
from .suppressed import CEU, UNDIAL
from .terms import (
    IGNORE_INDEX,
    CrossEntropy,
    GradientAscent,
    KLAscent,
    KLDivergence,
    LossTerm,
    Reduction,
    as_float,
    check_not_negative,
    is_finite_number,
)

TERM_NAMES = ("forget", "retain", "kl", "lm")
RESPONSE_TERMS = TERM_NAMES[:3]  # those of response tokens
# The terms that a saved loss is rebuilt from, by name.
KNOWN_TERMS: dict[str, type[LossTerm]] = {
    kind.__name__: kind
    for kind in (
        *(CrossEntropy, GradientAscent, KLAscent, KLDivergence),
        *(NPO, SimNPO, DPO, WGA, SatImp, CEU, UNDIAL, RMU, StateDistance),
    )
}


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

    A row's loss is the sum over its response tokens; that of retain rows (`retain`, `kl`) and that of a generic answer
    (`CrossEntropy` on forget rows) with more than three tokens is their mean, so that neither outweighs the other by
    its length. A `reduction` of the term decides otherwise, see `LossTerm` and `default_reduction`.

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
        ValueError: if a weight is negative or not finite, `lm` compares with the base model, terms other than `forget`
            need pairs, terms with a weight read different things (logits, or states of one layer), or `retain_budget`
            is not above 0, given with `alpha=0`, or for a retain term of states.
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
            check_not_negative(name, getattr(self, name))
        budget = self.retain_budget
        if budget is not None:
            if not is_finite_number(budget) or budget <= 0:
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
                object.__setattr__(self, name, with_reduction(term, default_reduction(name, term)))
        if self.lm.needs_reference:
            raise ValueError(
                f"lm={self.lm!r} compares with the base model, whose logits at prompt texts are not computed."
            )
        for name in TERM_NAMES[1:]:
            if getattr(self, name).needs_pairs:
                raise ValueError(f"{name}={getattr(self, name)!r} needs pairs of responses, which forget rows have.")
        if self.gamma > 0 and (self.forget.needs_pairs or self.reads_layer is not None):
            raise ValueError(f"gamma={self.gamma} with forget={self.forget!r}: expected gamma=0, as in its paper.")
        if budget is not None and self.retain.reads_layer is not None:
            raise ValueError(
                f"retain_budget={budget!r} is in nats per token, and retain={self.retain!r} compares hidden states; "
                "leave the budget out."
            )
        terms = list(self._terms_in_use().values())
        if len({term.reads_layer for term in terms}) > 1:
            raise ValueError(
                f"terms read different things: {terms}; expected logits alone, or the states of one "
                "layer alone (RMU and StateDistance of the same layer)."
            )

    def _terms_in_use(self) -> dict[str, LossTerm]:
        """The forget term, and the others of a weight above 0, by name."""
        weights = {"forget": 1.0, "retain": self.alpha, "kl": self.beta, "lm": self.gamma}
        return {name: getattr(self, name) for name in TERM_NAMES if weights[name] > 0}

    @property
    def reads_layer(self) -> int | None:
        """Number of the decoder layer whose states take the place of logits; None where the terms read logits."""
        return self.forget.reads_layer

    @property
    def uses_retain_rows(self) -> bool:
        """Whether the loss depends on retain rows."""
        return self.alpha > 0 or self.beta > 0

    @property
    def averaged_terms(self) -> dict[str, LossTerm]:
        """Terms in use that average rows of more than three response tokens and sum shorter ones, by name."""
        used = self._terms_in_use()
        return {name: used[name] for name in RESPONSE_TERMS if name in used and used[name].reduction == "auto"}

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
        is_rejected: Tensor | None = None,
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
            is_rejected: (rows,) bool, for a forget term that needs pairs: whether a forget row has the rejected
                response of its pair. The k-th chosen and the k-th rejected row are a pair, which counts as one row.
            alpha: the multiplier's value, with `retain_budget` only; where it starts unless given.

        Raises:
            ValueError: if `reference_logits` or `text_logits` are not those of the rows that need them, `is_rejected`
                does not fit the forget term, or `alpha` is given without a budget.
        """
        if alpha is not None and self.retain_budget is None:
            raise ValueError(f"alpha={alpha!r}: this loss has the fixed alpha={self.alpha} and no retain_budget.")
        alpha = self.alpha if alpha is None else alpha
        forget_rows = self._forget_rows(is_forget, is_rejected)
        num_forget = num_forget_rows(is_forget, is_rejected) if num_forget is None else num_forget
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

        zero = as_float(logits).new_zeros(())

        def rows_of(group: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            found = None
            if reference_logits is not None:
                places = needed.cumsum(dim=0) - 1
                found = reference_logits[places[group[needed[group]]]]
            return logits[group], labels[group], found

        def mean(term: LossTerm, rows: tuple[Tensor, Tensor, Tensor | None], count: Tensor | float) -> Tensor:
            some_logits, some_labels, reference = rows
            if len(some_logits) == 0:
                return zero
            return term(some_logits, some_labels, reference if term.needs_reference else None).sum() / count

        retain = rows_of((~is_forget).nonzero().flatten()) if self.uses_retain_rows else (logits[:0], labels[:0], None)
        forget_loss = mean(self.forget, rows_of(forget_rows), num_forget)
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
        """Excess of the retain loss over the base model's own, in nats per token, which `retain_budget` bounds.

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

    def _forget_rows(self, is_forget: Tensor, is_rejected: Tensor | None) -> Tensor:
        """Indices of the forget rows; of pairs, those of the chosen ones first."""
        if not self.forget.needs_pairs and is_rejected is None:
            return is_forget.nonzero().flatten()
        if not self.forget.needs_pairs or is_rejected is None:
            given = "no is_rejected" if is_rejected is None else "is_rejected"
            raise ValueError(
                f"forget={self.forget!r} got {given}: the collator must make pairs for a term that compares two "
                "responses, such as DPO, and for no other: ForgetRetainCollator(..., pairs=True)."
            )
        chosen, rejected = ((is_forget & flags).nonzero().flatten() for flags in (~is_rejected, is_rejected))
        if len(chosen) != len(rejected) or bool((is_rejected & ~is_forget).any()):
            raise ValueError(
                f"{len(chosen)} chosen and {len(rejected)} rejected forget rows, {int(is_rejected.sum())} rejected in "
                "all; expected as many of each, and no retain row among them."
            )
        return torch.cat([chosen, rejected])

    def to_dict(self) -> dict[str, Any]:
        """Return the weights and terms as plain data, for `spul_config.json`."""

        def term(t: LossTerm) -> dict[str, Any]:
            kind = type(t)
            is_known = KNOWN_TERMS.get(kind.__name__) is kind
            name = kind.__name__ if is_known else f"{kind.__module__}.{kind.__qualname__}"
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

        def term(entry: dict[str, Any]) -> LossTerm:
            options = {key: value for key, value in entry.items() if key != "type"}
            if entry["type"] not in KNOWN_TERMS:
                raise ValueError(
                    f"the saved loss uses the term {entry['type']!r}, which spul does not know (it knows "
                    f"{', '.join(KNOWN_TERMS)}); pass the loss yourself: from_pretrained(..., "
                    "loss=UnlearningLoss(...))."
                )
            return KNOWN_TERMS[entry["type"]](**options)

        saved = {name: term(data[name]) for name in TERM_NAMES if name in data}  # older records have no lm
        budget = data.get("retain_budget")
        return cls(data["alpha"], data["beta"], gamma=data.get("gamma", 0.0), retain_budget=budget, **saved)


def num_forget_rows(is_forget: Tensor, is_rejected: Tensor | None = None) -> Tensor:
    """The number of forget rows, a scalar; a pair counts once."""
    return is_forget.sum() if is_rejected is None else (is_forget & ~is_rejected).sum()


def default_reduction(name: str, term: LossTerm) -> Reduction:
    """The reduction of a term that sets none: `"auto"` where an answer is taught or kept, the sum elsewhere.

    Args:
        name: the term's place in the loss, such as `"forget"`.
        term: the term. On forget rows, `CrossEntropy` and its subclasses teach an answer, unless they make it unlikely
            as `GradientAscent` does; the other published losses there are sums.
    """
    teaches = isinstance(term, CrossEntropy) and not term.makes_unlikely
    return "auto" if name in ("retain", "kl") or (name == "forget" and teaches) else "sum"


def with_reduction(term: LossTerm, reduction: Reduction) -> LossTerm:
    """A copy of a term with another reduction, also of a class that is no dataclass itself."""
    term = copy.copy(term)
    object.__setattr__(term, "reduction", reduction)
    return term
