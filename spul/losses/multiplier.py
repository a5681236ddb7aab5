"""The multiplier of a retain budget: alpha, moved once per optimizer step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .terms import is_finite_number
from .unlearning_loss import UnlearningLoss

logger = logging.getLogger(__name__)

PASSES_BEFORE_WARNING = 100


class RetainMultiplier:
    """Alpha as the multiplier of the constraint *retain excess <= budget*, by projected dual ascent.

    A loss with `retain_budget=b` asks for the least forget loss (and `beta` times KL) with a retain excess of at most
    `b`. The model descends the loss with alpha in place; after optimizer step `t`, over all its retain rows,

        e_t       = mean over rows of the mean over a row's tokens of  l(trained) - l(base)
        m_t       = decay * m_(t-1) + (1 - decay) * e_t,    m_1 = e_1
        alpha_t+1 = max(0, alpha_t + step_size * clip((m_t - b) / b, -1, 1))

    with `l` the retain term's loss of a token, in nats. Alpha starts at the loss's own, rises while the running mean
    of the excess is above the budget, and falls to no less than 0 while it is below. A step without retain rows
    leaves it as it is.

    The primal-dual scheme is that of PDU (arXiv 2506.05314), whose program moves alpha by
    `step_size * (retain loss - epsilon)` after each batch. Here the loss of the base on the same rows is subtracted,
    so that the budget means the same for every data set; all batches and processes of a step count once; a running
    mean takes out the noise of small batches; and the move is relative to the budget and bounded by `step_size`, so
    that neither its unit nor a bad start matters. PDU's forget loss is not part of it.

    Args:
        loss: an `UnlearningLoss` with a `retain_budget`.
        step_size: the most that alpha moves in a step, above 0. A large one overshoots while a fresh prompt is still
            above the budget whatever the weight, and forgetting then waits for alpha to fall.
        decay: of the running mean, at least 0 and below 1; 0.9 averages about ten steps, 0 none.

    Attributes:
        alpha: the weight that the next step uses.
        excess: the running mean, in nats per token; None before the first step.

    Raises:
        ValueError: if `loss` has no budget, or a setting is out of range.

    Example:
        ```python
        multiplier = RetainMultiplier(loss)
        for batch in loader:
            out = unlearning_forward(model, loss, **batch, alpha=multiplier.alpha)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            multiplier.update(out)
        ```
    """

    def __init__(self, loss: UnlearningLoss, step_size: float = 0.01, decay: float = 0.9) -> None:
        if loss.retain_budget is None:
            raise ValueError(f"loss={loss!r} has no budget; pass UnlearningLoss(retain_budget=...), such as 0.02.")
        if not is_finite_number(step_size) or step_size <= 0:
            raise ValueError(f"step_size={step_size!r}: expected a finite number above 0, such as 0.01.")
        if not is_finite_number(decay) or not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r}: expected a number of at least 0 and below 1, such as 0.9.")
        self.loss, self.budget, self.step_size, self.decay = loss, float(loss.retain_budget), step_size, decay
        self.reset()

    def reset(self) -> None:
        """Start again, at the loss's own alpha."""
        self.alpha = float(self.loss.alpha)
        self.excess: float | None = None
        self._shares: list[Tensor] = []
        self._passes = 0

    def settings(self) -> dict[str, float]:
        """The step size and the decay, by name."""
        return {"step_size": self.step_size, "decay": self.decay}

    def __repr__(self) -> str:
        return f"RetainMultiplier(alpha={self.alpha:.4g}, excess={self.excess}, budget={self.budget:g})"

    def alpha_of_pass(self) -> float:
        """Alpha for a forward pass that trains; a log line says if it seems never to be updated."""
        self._passes += 1
        if self._passes == PASSES_BEFORE_WARNING:
            logger.warning(
                "%d batches under retain_budget=%g without an update: alpha is still %g. Call multiplier.update(out) "
                "after each optimizer step, or train with UnlearningTrainer, which does.",
                self._passes,
                self.budget,
                self.alpha,
            )
        return self.alpha

    def add(self, *outputs: Any) -> None:
        """Add batches of a step that is not over, as in gradient accumulation.

        Args:
            outputs: `UnlearnerOutput` of each, computed with the `group_counts` of the whole step.

        Raises:
            ValueError: if one is of a loss without a budget.
        """
        if any(getattr(out, "retain_excess", None) is None for out in outputs):
            raise ValueError(
                "an output has no retain_excess: pass the whole output of a forward under a loss with retain_budget, "
                "update(out), not its loss alone."
            )
        self._shares += [torch.stack([out.retain_excess, out.retain_share]) for out in outputs]

    def update(self, *outputs: Any, reduce: Callable[[Tensor], Tensor] | None = None) -> float:
        """Move alpha after an optimizer step. This waits for the device.

        Args:
            outputs: `UnlearnerOutput` of the step's batches, but for those that were added by `add`.
            reduce: on several processes, the mean of a tensor over them, such as
                `lambda tensor: accelerator.reduce(tensor, "mean")`; every process must call `update` then, and every
                process gets the same alpha.

        Returns:
            The new alpha.

        Raises:
            FloatingPointError: if the excess is NaN or infinite; alpha is as before.
            ValueError: without outputs, or if one is of a loss without a budget.
        """
        self.add(*outputs)
        if not self._shares:
            raise ValueError("update needs the outputs of the step's batches: update(out), or add(out) for each.")
        step = torch.stack(self._shares).sum(dim=0)
        self._shares, self._passes = [], 0
        total, share = (step if reduce is None else reduce(step)).tolist()
        if share == 0:
            return self.alpha
        excess = total / share
        if not math.isfinite(excess):
            raise FloatingPointError(
                f"the retain excess of this step is {excess}; expected a finite number of nats. Training has "
                "diverged, or a logit is infinite."
            )
        self.excess = excess if self.excess is None else self.decay * self.excess + (1 - self.decay) * excess
        move = min(max((self.excess - self.budget) / self.budget, -1.0), 1.0)
        self.alpha = max(0.0, self.alpha + self.step_size * move)
        return self.alpha

    def logs(self) -> dict[str, float]:
        """Alpha of the next step and the running mean of the excess, by the names of the log."""
        return {"alpha": self.alpha} | ({} if self.excess is None else {"retain_excess": self.excess})

    def state_dict(self) -> dict[str, float | None]:
        """Alpha and the running mean, as plain data that JSON keeps to the bit."""
        return {"alpha": self.alpha, "excess": self.excess}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: if it is none.
        """
        alpha, excess = state.get("alpha"), state.get("excess")
        if not is_finite_number(alpha) or alpha < 0:
            raise ValueError(f"alpha={alpha!r} in {state!r}: expected a finite number of at least 0.")
        if excess is not None and not is_finite_number(excess):
            raise ValueError(f"excess={excess!r} in {state!r}: expected a finite number, or None.")
        self.reset()
        self.alpha, self.excess = float(alpha), None if excess is None else float(excess)
