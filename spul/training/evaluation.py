"""Evaluation within training: answers of each set, and what Trainer's own options of evaluation add."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from ..data.collator import ForgetRetainCollator
from ..evaluation.metrics.scoring import Answers, collect_answers, summarize
from ..models.compat import PredictionOutput, gathered, should_reduce_batch_size, speed_metrics
from ..models.protocol import Unlearner
from .options import check_not_stream
from .predictions import in_precision, predict_rows
from .sharding import ShardingTrainer


class EvaluatingTrainer(ShardingTrainer):
    """A `Trainer` whose `evaluate` scores answers and whose `predict` gives logits at the response positions."""

    _learner: Any
    unlearner: Unlearner
    _collator: ForgetRetainCollator

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score every evaluation set by greedy decoding at the response positions.

        Args:
            eval_dataset: rows with `prompt` and `completion`, a dict of such, or the name of one of the trainer's
                sets; None takes the trainer's.
            ignore_keys: not used.
            metric_key_prefix: first part of the metrics' names.

        Returns:
            `<prefix>_<name>_accuracy`, `_f1`, `_generic`, `_loss` for every set of a dict, without `<name>` for a
            single set, and what `compute_metrics` returns, which replaces those of the same name. The record that is
            saved keeps the former.

        Raises:
            ValueError: if there are no rows, or no set of that name.
            TypeError: if they are not a data set.
        """
        self._memory_tracker.start()
        own: Any = self.eval_dataset
        rows = own if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            if not isinstance(own, dict) or rows not in own:
                names = sorted(own) if isinstance(own, dict) else "they have no names"
                raise ValueError(
                    f"eval_dataset={rows!r} names none of the trainer's evaluation sets: {names}. Pass one of their "
                    "names, or rows; names are those of a dict, UnlearningTrainer(eval_dataset={name: rows, ...})."
                )
            rows = {rows: own[rows]}
        if rows is None:
            raise ValueError("evaluate needs rows: pass eval_dataset here or to UnlearningTrainer.")
        metrics: dict[str, float] = {}
        with self._full_eval():
            for name, split in (rows if isinstance(rows, dict) else {"": rows}).items():
                prefix = f"{metric_key_prefix}_{name}" if isinstance(rows, dict) else metric_key_prefix
                found = self._score(split, prefix)
                record = self.unlearner.spul_config
                if isinstance(rows, dict) and record is not None and self.unlearner.enabled:
                    record.metrics[name] = {key: found[f"{prefix}_{key}"] for key in ("accuracy", "f1", "generic")}
                metrics.update(found)
                if self.compute_metrics is not None and not self.args.prediction_loss_only:
                    metrics.update(prefixed(prefix, self._predict(split, keep=not self.args.batch_eval_metrics)[1]))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Logits and labels at the response positions of rows, and what `compute_metrics` makes of them.

        Args:
            test_dataset: rows with `prompt` and `completion`.
            ignore_keys: not used.
            metric_key_prefix: first part of the metrics' names.

        Returns:
            `predictions` (rows, K, V) unless `preprocess_logits_for_metrics` changes them; `label_ids` (rows, K),
            -100 in unused slots; `metrics`: `<prefix>_loss`, nats per row, and those of `compute_metrics`.

        Raises:
            TypeError: if the rows are not a data set.
        """
        with self._full_eval():
            start = time.time()
            arrays, metrics = self._predict(test_dataset, keep=True)
            metrics = {"loss": float(np.mean(np.concatenate([np.atleast_1d(x) for x in arrays["losses"]]))), **metrics}
            metrics = prefixed(metric_key_prefix, metrics)
            metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(test_dataset)))
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(arrays["predictions"], arrays["label_ids"], metrics)

    def score(self, rows: Any, name: str) -> dict[str, float]:
        """Scores of rows as of `summarize`, without a log and without callbacks; the same in every process.

        Args:
            rows: rows with `prompt` and `completion`, divided among the processes.
            name: label of the progress bar.

        Raises:
            RuntimeError: if memory runs out in a training with `auto_find_batch_size`, which cannot help.
            ValueError: if there are no rows.
            TypeError: if they are not a data set.
        """
        check_not_stream(rows, name)
        self._evaluated_weights()
        rank, world = self.shares
        progress = name if self.is_world_process_zero() and not self.args.disable_tqdm else None
        with self.accelerator.autocast(), self._memory_of_evaluation():
            # The plain model, not DDP's: every process has rows of its own, and their numbers may differ.
            some = range(rank, len(rows), world)
            found = collect_answers(self._learner, rows, self._collator, self.args.eval_batch_size, some, progress)
        answers = Answers()
        for part in gathered([found]) if world > 1 else [found]:
            answers.true += part.true
            answers.predicted += part.predicted
            answers.nll += part.nll
        return summarize(answers, self._collator.generic_completions)

    def run_folder(self) -> str:
        """The folder of this training's checkpoints; each trial of a search has its own."""
        return self._get_output_dir(getattr(self, "_trial", None))

    def load_best(self) -> None:
        """Load the weights of `state.best_model_checkpoint` into the model that trains."""
        self._load_best_model()
        self.unlearner.parameters_changed()

    def _evaluated_weights(self) -> None:
        """Put in place the weights of an optimizer that trains others than it evaluates, such as a schedule-free one.

        The next training step puts the trained ones back, in `Trainer`.
        """
        if callable(evaluated := getattr(self.optimizer, "eval", None)):
            evaluated()

    def _predict(self, rows: Any, keep: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        self._evaluated_weights()
        with self._memory_of_evaluation():
            return predict_rows(
                self._learner,
                rows,
                self._collator,
                self.args,
                self.accelerator,
                self.shares,
                self.compute_metrics,
                self.preprocess_logits_for_metrics,
                keep,
            )

    @contextmanager
    def _memory_of_evaluation(self) -> Iterator[None]:
        """Name the option to lower where memory runs out within a training that begins again with fewer rows then.

        `Trainer` does so where it evaluates itself, not where a callback asks for scores.
        """
        try:
            yield
        except RuntimeError as error:
            if self.is_in_train and self.args.auto_find_batch_size and should_reduce_batch_size(error):
                raise RuntimeError(
                    "rows that are scored in training do not fit into memory in batches of per_device_eval_batch_size="
                    f"{self.args.per_device_eval_batch_size}; lower it. auto_find_batch_size lowers that of training "
                    "alone."
                ) from error
            raise

    def _score(self, rows: Any, prefix: str) -> dict[str, float]:
        start = time.time()
        metrics = {f"{prefix}_{name}": value for name, value in self.score(rows, prefix).items()}
        return {**metrics, **speed_metrics(prefix, start, num_samples=len(rows))}

    def _full_eval(self) -> AbstractContextManager[None]:
        """The model in the precision of `fp16_full_eval` or `bf16_full_eval`; its own in training, as in `Trainer`."""
        half = torch.float16 if self.args.fp16_full_eval else torch.bfloat16 if self.args.bf16_full_eval else None
        return in_precision(self._learner, None if self.is_in_train else half, self.args.device)


def prefixed(prefix: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics under names with a prefix, where they have none."""
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()}
