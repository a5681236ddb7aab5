"""Stopping when forgetting is done: held-out rows scored in training, the best checkpoint kept and loaded."""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

from transformers import TrainerCallback

from ..data.collator import ROW_COLUMNS
from ..data.conversations import comparable
from ..data.rows import column_batches
from ..data.samplers import RowCopies
from ..models.causal_lm import num_embeddings
from ..models.compat import CHECKPOINT_PREFIX
from ..models.unlearner import detached_base
from ..records.digests import is_transformed
from ..records.fields import is_count, is_finite_number
from .checks import check_evaluation_rows
from .evaluation import EvaluatingTrainer
from .row_digest import plain_digest

logger = logging.getLogger(__name__)

# Entry of `TrainerState.stateful_callbacks`. It is not the class's name, by which Trainer would make the callback anew
# without its rows (`restore_callback_states_from_checkpoint`).
ENTRY = "stop_when_forgotten"
# Less than a thousandth of a row of any set that is scored here, in points.
ROUNDING = 1e-6


class HeldOutScore(NamedTuple):
    """Scores of the held-out rows after a step, in points (0..100).

    Attributes:
        step: optimizer steps before it.
        forget_accuracy: forget rows that are answered with their own completion.
        forget_generic: forget rows that are answered with a generic completion.
        retain_accuracy: retain rows that are answered with their own completion.
    """

    step: int
    forget_accuracy: float
    forget_generic: float
    retain_accuracy: float


class StopWhenForgotten(TrainerCallback):
    """Stops training when forgetting has leveled off while retaining holds, and loads the best checkpoint.

    Held-out rows are scored every `every` steps, and after the last one, by greedy answers as in `score_completions`.
    The base, without prompt, layers or LoRA, is scored once, before the first step; a whole model is its own base
    there. A scoring is *within the margin* if retain accuracy is at most `margin` points below
    the base's. The best scoring is the one within the margin of the lowest forget accuracy, of equal ones that of the
    highest retain accuracy, and of these the first; if none is within, that of the highest retain accuracy.

    Training stops once forget accuracy is at most `target` within the margin, and either is 0 or `patience` further
    scorings were no better. If that is never reached, it ends as scheduled, with a warning of what was. Either way the
    best checkpoint is loaded. Every scoring that is the best so far saves a checkpoint, which `save_total_limit` does
    not delete while it is the best; `save_only_model=True` keeps them small where the whole model trains.

    A resumed run continues with the scores of its checkpoint and equals an uninterrupted one. In several processes
    each scores its share of the rows, and all decide by the same scores.

    Args:
        trainer: the `UnlearningTrainer`; it needs no `eval_strategy`.
        forget: held-out forget rows, with `prompt` and their own `completion`; see `spul.data.hold_out`.
        retain: held-out retain rows. One point of theirs cannot be seen with fewer than 100.
        every: optimizer steps between scorings.
        margin: points of retain accuracy that may be lost against the base.
        target: forget accuracy in percent at which forgetting counts as done.
        patience: further scorings that must be no better; 0 stops at the first that meets the target.

    Attributes:
        scores: a `HeldOutScore` for each scoring, in order.
        base: the base's, step 0; None before training.

    Raises:
        TypeError: if `trainer` is none, or rows are not a `datasets.Dataset`.
        ValueError: if there are no rows, one cannot be scored, a held-out prompt is trained on, a number is out of
            range, or `Trainer` is to choose a best checkpoint of its own.

    Example:
        ```python
        train, forget, retain = hold_out(dataset, 0.2)
        trainer = UnlearningTrainer(unlearner, args, collator, train)
        trainer.add_callback(StopWhenForgotten(trainer, forget, retain, every=25))
        trainer.train()
        ```
    """

    def __init__(
        self,
        trainer: EvaluatingTrainer,
        forget: Any,
        retain: Any,
        *,
        every: int = 50,
        margin: float = 1.0,
        target: float = 5.0,
        patience: int = 2,
    ) -> None:
        if not isinstance(trainer, EvaluatingTrainer):
            raise TypeError(
                f"trainer is a {type(trainer).__name__}; expected the UnlearningTrainer that it is added to."
            )
        collator: Any = trainer.data_collator
        held_out = {"forget": forget, "retain": retain}
        check_evaluation_rows(held_out, collator.encoder, num_embeddings(trainer.unlearner.called_model))
        for name, rows in held_out.items():
            _check_not_trained_on(rows, trainer.train_dataset, name)
        for name, number, least in (("every", every, 1), ("patience", patience, 0)):
            if not is_count(number, least):
                raise ValueError(f"{name}={number!r}; expected a whole number from {least}.")
        for name, points in (("margin", margin), ("target", target)):
            if not is_finite_number(points) or not 0 <= points < 100:
                raise ValueError(f"{name}={points!r}; expected points of accuracy, from 0 to below 100.")
        args = trainer.args
        if args.load_best_model_at_end or args.metric_for_best_model is not None:
            raise ValueError(
                f"load_best_model_at_end={args.load_best_model_at_end} with metric_for_best_model="
                f"{args.metric_for_best_model!r} has Trainer choose a best checkpoint by a metric of its own; leave "
                "both out: StopWhenForgotten chooses and loads the best one."
            )
        self.trainer, self.forget, self.retain = trainer, forget, retain
        self.every, self.margin, self.target, self.patience = every, margin, target, patience
        self.scores: list[HeldOutScore] = []
        self.base: HeldOutScore | None = None
        columns = (*ROW_COLUMNS, collator.encoder.text_field or "prompt")
        # None behind a transform, which may draw rows anew each time.
        self._digests = {
            name: None if is_transformed(rows) else plain_digest(rows, columns)
            for name, rows in (("forget", forget), ("retain", retain))
        }

    # ---- what the scores say ----

    def is_within(self, score: HeldOutScore) -> bool:
        """Whether a scoring is within the margin."""
        assert self.base is not None
        return score.retain_accuracy >= self.base.retain_accuracy - self.margin - ROUNDING

    @property
    def best(self) -> HeldOutScore | None:
        """The best scoring so far; None before the first."""
        return max(self.scores, key=self._rank, default=None)  # the first of equal ones

    @property
    def is_met(self) -> bool:
        """Whether forget accuracy was at most `target` within the margin."""
        best = self.best
        return best is not None and self.is_within(best) and best.forget_accuracy <= self.target + ROUNDING

    @property
    def is_done(self) -> bool:
        """Whether forgetting has leveled off within the margin."""
        if (best := self.best) is None or not self.is_met:
            return False
        return best.forget_accuracy == 0 or len(self.scores) - 1 - self.scores.index(best) >= self.patience

    def _rank(self, score: HeldOutScore) -> tuple[bool, float, float]:
        if self.is_within(score):
            return True, -score.forget_accuracy, score.retain_accuracy
        return False, score.retain_accuracy, -score.forget_accuracy

    # ---- events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stored = state.stateful_callbacks.get(ENTRY)
        if stored is not None:  # of the checkpoint that training resumes from
            self._check_rows(stored.get("rows") or {})  # earlier versions noted none
            self.scores = [HeldOutScore(**score) for score in stored["scores"]]
            self.base = HeldOutScore(**stored["base"])
            if self.best is not None:
                self._find(self.best, state)  # also where the folder was moved
            return
        if state.global_step and self.trainer.unlearner.trains_base:
            raise ValueError(
                f"training resumes after {state.global_step} steps from a checkpoint without scores of "
                "StopWhenForgotten, and the base's own weights train, so that the base's scores are not known any "
                "more. Resume without the callback, or train from the start."
            )
        self.scores = []
        with detached_base(self.trainer.unlearner.called_model):
            self.base = self._scored(0)
        self._store(state)
        if self.base.forget_accuracy <= self.target or self.base.retain_accuracy == 0:
            logger.warning(
                "the base itself answers %.1f %% of the held-out forget rows and %.1f %% of the retain rows: with so "
                "little to lose they do not show when forgetting is done (target=%g %%). Hold out rows that the base "
                "knows.",
                self.base.forget_accuracy,
                self.base.retain_accuracy,
                self.target,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        score = self._scored(state.global_step)
        self.scores.append(score)
        names = ("forget_accuracy", "forget_generic", "retain_accuracy")
        self.trainer.log({f"held_out_{name}": getattr(score, name) / 100 for name in names})
        if self.best is score:
            state.best_global_step, state.best_model_checkpoint = score.step, self._folder(score)
            control.should_save = True
        self._store(state)
        if self.is_done:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = self.best
        if best is None or self.base is None:
            logger.warning(
                "training ended after %d steps, before the first scoring of StopWhenForgotten (every=%d); nothing is "
                "known of held-out rows.",
                state.global_step,
                self.every,
            )
            return
        if best.step != state.global_step:
            self._find(best, state)
            self.trainer.load_best()
        found = (
            f"forget accuracy {best.forget_accuracy:.1f} % (generic {best.forget_generic:.1f} %) and retain accuracy "
            f"{best.retain_accuracy:.1f} % at step {best.step} of {state.global_step}, {state.best_model_checkpoint}"
        )
        if self.is_met:
            logger.info("forgotten within the margin, on held-out rows: %s", found)
            return
        logger.warning(
            "not forgotten within the margin, on held-out rows: asked were at most %g %% of forget rows "
            "answered and retain accuracy of at least %.1f %% (the base's %.1f %% less %g points); the best reached "
            "is %s, %s the margin. The model has these weights. Train longer or with a higher learning rate, give "
            "forget rows more weight (a lower alpha, a larger retain_budget), or allow a larger margin.",
            self.target,
            self.base.retain_accuracy - self.margin,
            self.base.retain_accuracy,
            self.margin,
            found,
            "within" if self.is_within(best) else "outside",
        )

    def _folder(self, score: HeldOutScore) -> str:
        return os.path.join(self.trainer.run_folder(), f"{CHECKPOINT_PREFIX}-{score.step}")

    def _find(self, best: HeldOutScore, state: Any) -> None:
        """Have the state point to the best checkpoint.

        Raises:
            FileNotFoundError: if it is gone.
        """
        folder = self._folder(best)
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"the best checkpoint of this training, {folder}, is gone. Keep it until training ends, or resume "
                "from a checkpoint before it."
            )
        state.best_model_checkpoint = folder

    def _scored(self, step: int) -> HeldOutScore:
        """The scores of the model as it is."""
        forget = self.trainer.score(self.forget, "held-out forget")
        retain = self.trainer.score(self.retain, "held-out retain")
        return HeldOutScore(
            step, *(100 * value for value in (forget["accuracy"], forget["generic"], retain["accuracy"]))
        )

    def _store(self, state: Any) -> None:
        """Put the scores where checkpoints have them: into `trainer_state.json`."""
        scores = [score._asdict() for score in self.scores]
        base = self.base and self.base._asdict()
        state.stateful_callbacks[ENTRY] = {"base": base, "scores": scores, "rows": self._digests}

    def _check_rows(self, stored: dict[str, str | None]) -> None:
        """Raise if the checkpoint's scores are of other rows: base and best would not be those of these."""
        known = {name: digest for name, digest in self._digests.items() if digest and stored.get(name)}
        if others := [name for name, digest in known.items() if digest != stored[name]]:
            raise ValueError(
                f"the checkpoint has scores of other held-out {' and '.join(others)} rows than those passed to "
                "StopWhenForgotten. Resume with the rows that it was scored on, or train from the start in another "
                "folder."
            )


def _check_not_trained_on(rows: Any, train_rows: Any, name: str) -> None:
    """Raise if a held-out prompt is among the training rows; streams and rows without texts are not compared."""
    train_rows = train_rows.rows if isinstance(train_rows, RowCopies) else train_rows
    if "prompt" not in (getattr(train_rows, "column_names", None) or ()):
        return
    held_out = {comparable(prompt) for prompts in column_batches(rows, "prompt") for prompt in prompts}
    both = {
        text
        for prompts in column_batches(train_rows, "prompt")
        for prompt in prompts
        if (text := comparable(prompt)) in held_out
    }
    if both:
        raise ValueError(
            f"{len(both)} prompt(s) of the held-out {name} rows are trained on; train on the others: "
            "train, forget, retain = spul.data.hold_out(dataset)."
        )
