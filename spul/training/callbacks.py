"""State of UnlearningTrainer beside Trainer's own: terms since the last log, the multiplier, epoch, noise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..data.collator import ForgetRetainCollator
from ..models.compat import has_length, reset_compiled

logger = logging.getLogger(__name__)


class TermSums:
    """Sums of the loss's terms since the last log.

    Args:
        names: names of the terms, as in `UnlearnerOutput`.
        device: where the sums are kept, so that adding does not wait.
        step: the optimizer step that they begin after.
    """

    def __init__(self, names: Sequence[str], device: torch.device, step: int = 0) -> None:
        self.names, self.since = names, step
        self._sums = torch.zeros(len(names), device=device)
        self._last = self._sums  # of the last batch

    def add(self, outputs: Any) -> None:
        """Add the terms of a batch."""
        self._last = torch.stack([outputs[name].detach().to(self._sums) for name in self.names])
        self._sums += self._last

    def check_finite(self, step: int) -> None:
        """Check the terms of the last batch. This waits for the device.

        Raises:
            FloatingPointError: if one is NaN or infinite.
        """
        if not self._last.isfinite().all():
            values = zip(self.names, self._last.tolist(), strict=True)
            raise FloatingPointError(
                f"step {step}: {', '.join(f'{name}={value:g}' for name, value in values)}; "
                "expected finite values. Training has diverged, or began with weights that are not finite: resume "
                "from an earlier checkpoint with a lower learning rate, or with bf16 or float32 in place of fp16."
            )

    def means(self, step: int) -> Tensor | None:
        """Means of the terms over the steps since the last call; None if there was no step."""
        steps, self.since = step - self.since, step
        if steps <= 0:
            return None
        means = self._sums / steps
        self._sums.zero_()
        return means


class MultiplierCallback(TrainerCallback):
    """Moves the multiplier of a retain budget after each optimizer step, and keeps it in the checkpoints' state.

    Alpha and the running mean stand in `trainer_state.json`, the last file of a checkpoint. Without a budget it does
    nothing.

    Args:
        trainer: an `UnlearningTrainer`.
    """

    KEY = "RetainMultiplier"

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (multiplier := self.trainer.multiplier) is None:
            return
        multiplier.reset()  # also when auto_find_batch_size tries again
        if (saved := state.stateful_callbacks.get(self.KEY)) is not None:
            multiplier.load_state_dict(saved)
        elif state.global_step > 0:
            logger.warning("the checkpoint holds no multiplier: alpha starts at %g again.", multiplier.alpha)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (multiplier := self.trainer.multiplier) is None:
            return
        accelerator = self.trainer.accelerator
        several = accelerator.num_processes > 1
        multiplier.update(reduce=partial(accelerator.reduce, reduction="mean") if several else None)
        state.stateful_callbacks[self.KEY] = multiplier.state_dict()


class EmbeddingNoise:
    """Uniform noise on the input embeddings of trained passes (NEFTune, arXiv 2310.05914).

    `Trainer` puts its hook where some bases and unlearning layers have no embeddings, and a live reference would get
    noise, too. The reference and every evaluation run without gradients, by which they are told apart here.
    """

    def __init__(self) -> None:
        self._hook: Any = None

    def start(self, base: Any, alpha: float | None) -> None:
        """Add noise of this strength to a causal LM's embeddings from now on; None adds none."""
        self.stop()
        if alpha is None:
            return

        def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not (module.training and torch.is_grad_enabled()):
                return output
            size = alpha / (output.shape[1] * output.shape[2]) ** 0.5
            return output + torch.empty_like(output).uniform_(-size, size)

        self._hook = base.get_input_embeddings().register_forward_hook(add_noise)
        reset_compiled()

    def stop(self) -> None:
        """Add no more noise."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            reset_compiled()


class EpochCallback(TrainerCallback):
    """Sets the epoch of collator and sampler, so that draws resume, and drops metrics of an earlier prompt.

    Passes are counted, since for a stream the epoch of `TrainerState` is the share of `max_steps`. Checkpoints have
    their number.

    Args:
        trainer: an `UnlearningTrainer`.
        collator: its collator.
    """

    KEY = "passes"

    def __init__(self, trainer: Any, collator: ForgetRetainCollator) -> None:
        self.trainer, self.collator, self.epoch, self.resumed = trainer, collator, 0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch, self.resumed = int(state.epoch or 0), state.global_step > 0
        if not has_length(kwargs["train_dataloader"]):
            self.epoch = state.stateful_callbacks.get(self.KEY, 1) - 1
            if self.epoch:
                logger.warning(
                    "training goes on after step %d, in pass %d over a stream, whose rows can be skipped in the first "
                    "pass only: it goes on with the first row of the next pass.",
                    state.global_step,
                    self.epoch + 1,
                )
        self.trainer.restart_terms()  # also when auto_find_batch_size tries again

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.unlearner.parameters_changed()  # evaluation, which records metrics, comes after this

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.set_epoch(self.epoch)
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(self.epoch)
        self.epoch += 1
        state.stateful_callbacks[self.KEY] = self.epoch
        self.trainer.begin_pass(may_be_empty=self.resumed)
        self.resumed = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_pass()
