"""The loss of a whole optimizer step: group counts, terms and the multiplier of a retain budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.checks import check_is_forget
from ..losses.multiplier import RetainMultiplier
from ..losses.terms import IGNORE_INDEX, SUMMED_TOKENS
from ..losses.unlearning_loss import UnlearningLoss, with_reduction
from ..models.compat import is_without_batches
from .callbacks import EpochCallback, MultiplierCallback, TermSums
from .checks import check_base_is_frozen, check_trains, no_rows_in_words, trained_parameters, warn_of_one_side
from .evaluation import EvaluatingTrainer
from .forward import step_counts, unlearning_forward
from .memory import advised
from .options import is_stream
from .reference import ReferenceCache
from .resuming import IDENTITY
from .stopping import ENTRY

logger = logging.getLogger(__name__)

TERMS = ("forget_loss", "retain_loss", "kl_loss", "lm_loss")
IN_WORDS = {"forget": "forget", "retain": "retain", "kl": "KL"}


class SteppingTrainer(EvaluatingTrainer):
    """A `Trainer` whose loss is normalized over the forget and the retain rows of the whole step, its terms logged.

    Attributes:
        multiplier: moves alpha under `retain_budget`; None for a fixed alpha. Its `step_size` and `decay` may be set
            before training, and then hold for a new loss, and for every model of `model_init`.
    """

    # The loss is already divided by the counts of the whole step.
    loss_is_scaled_for_ga = True

    _loss: UnlearningLoss
    _reference: ReferenceCache | None
    multiplier: RetainMultiplier | None = None
    _settings_taken: dict[str, float] | None = None  # of the multiplier, before anyone set others
    _noted = False
    _trained: tuple[Any, list[nn.Parameter]] | None = None  # an optimizer, and what trained at its first step
    _is_checked = False  # whether this step trains something, since its batches were read
    _rows: Any
    _may_be_empty = False  # a pass, whose rows were all trained on before training was resumed
    _rows_read: Tensor | None = None  # of each side, by all processes; None before the first of a pass
    _passes_checked = False
    _left: list[dict[str, Any]]  # batches of a stream's pass that made no whole step

    def _take_multiplier(self) -> None:
        """Take the multiplier of the model's loss, with the settings that were set on the one before."""
        before, taken = self.multiplier, self._settings_taken
        self.multiplier = self.unlearner.multiplier
        if self.multiplier is None and self._loss.retain_budget is not None:
            self.multiplier = RetainMultiplier(self._loss)
        self._settings_taken = None if self.multiplier is None else self.multiplier.settings()
        if self.multiplier is None or before is None or taken is None:
            return
        for name, value in before.settings().items():
            if value != taken[name]:
                setattr(self.multiplier, name, value)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Read the batches of a step, and add the numbers of forget and retain rows of the whole step to each.

        Of a stream, whose end is not known before, the batches that make no whole step wait for the next pass.

        Raises:
            ValueError: if the first pass over a stream has no rows, or too few for a step, or the base would train.

        Warns:
            of a later pass without a step, with which training ends.
        """
        if self._trained is None or self._trained[0] is not self.optimizer:
            self._trained = (self.optimizer, trained_parameters(self.unlearner))
            check_base_is_frozen(self.unlearner)
        self._is_checked = False
        may_be_empty = self._may_be_empty or self._rows_read is not None
        waiting, self._left = self._left, []
        try:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches - len(waiting), device)
        except ValueError as error:
            if may_be_empty or not is_without_batches(error):
                raise
            batches, num_items = [], None
        batches = [*waiting, *batches]
        if len(batches) < num_batches and is_stream(self._rows):
            batches, self._left = [], batches  # Trainer would add their gradients to those of the next step
        for batch in batches:
            check_is_forget(batch, "a batch")
        if not batches and is_stream(self._rows) and not may_be_empty:
            said = no_rows_in_words(self._rows)
            if num := len(self._left) - len(waiting):
                said = (
                    f"train_dataset, a stream, gave {num} batch(es) in a pass over it, fewer than a step has "
                    f"(gradient_accumulation_steps={num_batches}). Lower that, or the batch size."
                )
            if not self.state.global_step:
                raise ValueError(said)
            # Trainer ends there, as at max_steps: what was trained is saved.
            logger.warning("%s Training ends after step %d.", said, self.state.global_step)
            self._may_be_empty = True  # said once
        if not batches:
            return batches, num_items
        self._note_long_rows(batches)
        counts = step_counts(batches).to(device)
        # DDP averages gradients over processes, so the counts are averages too.
        counts = self.accelerator.reduce(counts, reduction="mean") if self.accelerator.num_processes > 1 else counts
        read = counts * self.accelerator.num_processes
        self._rows_read = read if self._rows_read is None else self._rows_read + read
        for batch in batches:
            batch["group_counts"] = counts
            if self.multiplier is not None:
                batch["alpha"] = counts.new_tensor(self.multiplier.alpha)
        return batches, num_items

    def _note_long_rows(self, batches: list[dict[str, Any]]) -> None:
        """Say once, at the first row of many tokens whose loss is averaged for it, which terms do so."""
        terms = self._loss.averaged_terms
        if self._noted or not (terms and self.is_world_process_zero()):
            return
        sides = {name == "forget" for name in terms}
        tokens = [
            (batch["labels"][batch["is_forget"].bool() == side, 1:] != IGNORE_INDEX).sum(dim=1)
            for batch in batches
            for side in sides
        ]
        longest = int(torch.cat(tokens).max()) if any(map(len, tokens)) else 0
        if longest > SUMMED_TOKENS:
            self._noted = True
            names = [IN_WORDS[name] for name in terms]
            listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
            logger.warning(
                "responses have many tokens, here %d: the %s %s of a row with more than %d tokens are means "
                "over its tokens, not sums. To decide it yourself, pass a reduction, 'sum' or 'mean': "
                "UnlearningLoss(..., %s).",
                longest,
                listed,
                "losses" if len(names) > 1 else "loss",
                SUMMED_TOKENS,
                ", ".join(f"{name}={with_reduction(term, 'sum')!r}" for name, term in terms.items()),
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The unlearning loss of one batch, as its share of the whole step."""
        check_is_forget(inputs, "a batch")
        if self._reference is not None and model.training:
            with self.accelerator.autocast():
                inputs = {**inputs, "reference_logits": self._reference.logits(inputs)}
        if self.unlearner.computes_loss:
            outputs = model(**inputs)
        else:
            with self.accelerator.autocast():  # also around the base model, which accelerate does not wrap
                outputs = unlearning_forward(model, self._loss, **inputs)
        self._keep_company(inputs)
        if model.training:
            self._terms.add(outputs)
            if self.multiplier is not None:
                self.multiplier.add(outputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _keep_company(self, inputs: Mapping[str, Tensor]) -> None:
        """Run a sharded base where others do, who have rows that are compared with it: all gather its layers."""
        alone = self._shards_base and self._reference is None and self._loss.needs_reference
        if alone and not self._loss.rows_needing_reference(inputs["is_forget"].bool()).any():
            one = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                self.unlearner.base_logits(**one, positions=torch.zeros_like(one["input_ids"][:, :1]))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch, as in `Trainer`.

        The terms are checked after the backward pass. This waits for the device, as Trainer's NaN filter
        (off here) would.

        Raises:
            ValueError: if the step would train nothing; the first batch of a step is late enough for it, and after
                every callback that could delete or choose a prompt.
            FloatingPointError: if a term of the loss is NaN or infinite; the optimizer has not stepped.
            RuntimeError: if memory runs out, with what to lower; on a GPU it is a `torch.OutOfMemoryError`.
        """
        if not self._is_checked and self._trained is not None:
            self._is_checked = True
            check_trains(self.unlearner, *self._trained)
        with advised(inputs):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._terms.check_finite(self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss and its terms, averaged over the steps since the last log, and the multiplier as it is now."""
        means = self._terms.means(self.state.global_step) if "loss" in logs else None
        if means is not None:
            if self.accelerator.num_processes > 1:
                means = self.accelerator.reduce(means, reduction="mean")
            logs.update(zip(self._terms.names, means.tolist(), strict=True))
            if self.multiplier is not None:
                logs.update(self.multiplier.logs())
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer would take one step more of a checkpoint that has them all, within an epoch, beyond the schedule.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True  # of a stream it would begin passes for ever

    def begin_pass(self, may_be_empty: bool) -> None:
        """Begin a pass over the rows; `EpochCallback` calls it.

        Args:
            may_be_empty: whether all of its rows were trained on before training was resumed.
        """
        self._may_be_empty, self._rows_read = may_be_empty, None

    def end_pass(self) -> None:
        """Warn, after the first pass over a stream, where all of its rows were of one side."""
        if self._passes_checked or self._rows_read is None or not is_stream(self._rows):
            return
        self._passes_checked = True
        read = self._rows_read
        # With the batches that wait for the next pass; in every process, also one without any.
        waiting = step_counts(self._left).to(read.device) if self._left else torch.zeros_like(read)
        read = read + (self.accelerator.reduce(waiting) if self.accelerator.num_processes > 1 else waiting)
        num_forget, num_retain = map(round, read.tolist())
        if self.is_world_process_zero():
            warn_of_one_side(num_forget, num_retain, self._loss)

    def _load_callback_state(self) -> None:
        # Trainer takes every entry for a callback's, and would say of these that they are ignored.
        states: Any = self.state.stateful_callbacks
        names = (IDENTITY, ENTRY, MultiplierCallback.KEY, EpochCallback.KEY)
        own = {name: states.pop(name) for name in names if name in states}
        super()._load_callback_state()
        states.update(own)

    def restart_terms(self) -> None:
        """Forget batches without a step, and terms that are not logged; `EpochCallback` calls it at the start."""
        self._left = []
        names = TERMS if self._loss.gamma > 0 else TERMS[:-1]
        self._terms = TermSums(names, self.args.device, self.state.global_step)
