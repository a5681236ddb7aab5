"""The metric by which a checkpoint is the best, checked before a training that reads it at an evaluation."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from ..data.rows import column_values
from .evaluation import EvaluatingTrainer

logger = logging.getLogger(__name__)

# Scores of each evaluation set, and whether a high one says that its rows are known.
SCORES = {"accuracy": True, "f1": True, "generic": False, "loss": False}
TIMES = ("runtime", "samples_per_second")


def check_best_metric(trainer: EvaluatingTrainer) -> None:
    """Check `metric_for_best_model`, also the default of `load_best_model_at_end` and of `reduce_lr_on_plateau`.

    Args:
        trainer: of the training, with all of its callbacks.

    Raises:
        ValueError: if no evaluation set has it, and nothing is there that could add it.

    Warns:
        of one by which the checkpoint that forgot least is the best.
    """
    args, rows = trainer.args, trainer.eval_dataset
    if rows is None or args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    sets: dict[str, Any] = {f"{name}_": some for name, some in rows.items()} if isinstance(rows, dict) else {"": rows}
    known = {f"{name}{key}": (name, key) for name in sets for key in (*SCORES, *TIMES)}
    asked = args.metric_for_best_model.removeprefix("eval_")
    if asked not in known:
        if _has_others(trainer):
            return
        expected = ", ".join(name for name, (_, key) in known.items() if key in SCORES)
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r}, which is 'loss' unless it is passed, is no metric "
            f"of eval_dataset, so that the first evaluation would fail; expected one of {expected}, or one that "
            "compute_metrics or a callback adds."
        )
    name, key = known[asked]
    if key in SCORES and bool(args.greater_is_better) == SCORES[key] and _is_forget_set(name, sets[name]):
        logger.warning(
            "metric_for_best_model=%r with greater_is_better=%s is of forget rows: the checkpoint that forgot least "
            "counts as the best. Pass greater_is_better=%s, or use StopWhenForgotten, which reads retain rows, too.",
            args.metric_for_best_model,
            args.greater_is_better,
            not args.greater_is_better,
        )


def _has_others(trainer: EvaluatingTrainer) -> bool:
    """Whether an evaluation may have metrics whose names are not known here."""
    callbacks: list[Any] = list(map(type, trainer.callback_handler.callbacks))
    adds = any(
        kind.on_evaluate is not TrainerCallback.on_evaluate and not kind.__module__.startswith("transformers.")
        for kind in callbacks
    )
    is_own = type(trainer).evaluate is not EvaluatingTrainer.evaluate
    return adds or is_own or trainer.compute_metrics is not None or not trainer.args.skip_memory_metrics


def _is_forget_set(name: str, rows: Any) -> bool:
    """Whether evaluation rows are to be forgotten, by their flags or else by their name."""
    if "is_forget" in (getattr(rows, "column_names", None) or ()):
        return all(column_values(rows, "is_forget"))
    return "forget" in name
