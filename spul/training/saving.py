"""Checkpoints of a training: `Trainer` saves and loads PEFT's adapters, but not unlearning layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState

from ..models.compat import save_training_args
from .resuming import IDENTITY, load_trained, saving_into
from .steps import SteppingTrainer


class SavingTrainer(SteppingTrainer):
    """A `Trainer` whose checkpoints hold whatever trains, and the identity of the training."""

    def identity(self, batch_size: int | None = None) -> dict[str, Any]:
        """All that the rows of every step and their loss depend on."""
        raise NotImplementedError

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.unlearner.has_own_checkpoint:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir or "."
            self._learner.save_pretrained(folder)
            (self.processing_class or self._collator.tokenizer).save_pretrained(folder)
            save_training_args(self.args, folder)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Whoever asks for the checkpoint: a strategy, StopWhenForgotten, or a callback of the user's.
        states: Any = self.state.stateful_callbacks
        if self.is_world_process_zero() and IDENTITY not in states:  # a resumed training keeps that of its beginning
            states[IDENTITY] = self.identity()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, {})  # Trainer fails at one that the checkpoint did not have
        self._evaluated_weights()  # as those that are scored
        with saving_into(self.args.output_dir or "."):
            super()._save_checkpoint(*args, **kwargs)
        if self.is_in_train and callable(trained := getattr(self.optimizer, "train", None)):
            trained()  # a callback may have it save between the gradients of a step and the step itself

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer uploads the output folder with PEFT's two files alone, and those of a prompt named "default".
        is_pushed = self.is_world_process_zero() and self.args.hub_strategy != "end"
        # An upload under way reads the folder; this one is then left out.
        is_free = self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done()
        if is_pushed and is_free and self.unlearner.spul_config is not None:
            self._learner.save_pretrained(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_trained(self, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._evaluated_weights()  # as those were that are loaded; a later evaluation would change them otherwise
        if not load_trained(self, self.state.best_model_checkpoint or ".", is_trainable=False):
            super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `Trainer`'s model card, which `push_to_hub` does, where the model writes none of its own."""
        if self.unlearner.spul_config is None:
            super().create_model_card(*args, **kwargs)
