"""Predictions on evaluation rows, as `compute_metrics` and `predict` of Trainer have them, and their precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments

from ..data.checks import check_rows
from ..data.collator import ForgetRetainCollator
from ..data.rows import rows_at
from ..evaluation.metrics.scoring import check_not_diverged, response_logits
from ..losses.positions import response_positions
from ..losses.terms import IGNORE_INDEX, token_nll
from ..models.causal_lm import evaluation_mode
from ..models.compat import EvalLoopContainer, denumpify_detensorize, gathered, moved, nested_concat
from ..models.compat_devices import device_of

PARTS = ("predictions", "label_ids", "losses", "inputs")


def predict_rows(
    model: nn.Module,
    rows: Any,
    collator: ForgetRetainCollator,
    args: TrainingArguments,
    accelerator: Accelerator,
    shares: tuple[int, int],
    compute_metrics: Callable[..., Any] | None = None,
    preprocess: Callable[[Tensor, Any], Any] | None = None,
    keep: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The logits of a model at the response tokens of rows, in the rows' order, and what is computed from them.

    Args:
        model: the plain model, which every process has.
        rows: a data set with `prompt` and `completion`.
        collator: its encoder makes batches with the rows' own completions.
        args: batch size, and the options of evaluation that `Trainer` has.
        accelerator: its autocast is that of the training.
        shares: number of this process, and of those that divide the rows; (0, 1) if each runs all of them.
        compute_metrics: as in `Trainer`, for an `EvalPrediction`.
        preprocess: `preprocess_logits_for_metrics` of `Trainer`, for logits and labels of a batch.
        keep: False keeps no batch, where `compute_metrics` takes them one by one (`batch_eval_metrics`).

    Returns:
        `predictions` (rows, K, V) unless preprocessed, `label_ids` (rows, K), `losses` (rows,) in nats and `inputs`
        (rows, n) as arrays, padded by -100; then the metrics. `predictions[i, k]` predicts `label_ids[i, k]`.

    Raises:
        TypeError: if `compute_metrics` returns no mapping.
        ValueError: if the logits are NaN, or `label_names` has an entry that the batches lack.
    """
    check_rows(rows)
    size, (rank, world) = args.eval_batch_size, shares
    containers = {name: EvalLoopContainer(args.eval_do_concat_batches, padding_index=IGNORE_INDEX) for name in PARTS}
    by_batch = compute_metrics is not None and args.batch_eval_metrics
    metrics: Any = {}
    include = args.include_for_metrics or ()

    def prediction(found: Mapping[str, Any]) -> EvalPrediction:
        asked = {"losses": "loss" in include, "inputs": "inputs" in include}
        some: dict[str, Any] = {name: found[name] if asked.get(name, True) else None for name in PARTS}
        return EvalPrediction(**some)

    with evaluation_mode(model), accelerator.autocast():
        for start in range(0, len(rows), size * world):
            first = start + rank * size
            own = rows_at(rows, list(range(first, min(first + size, len(rows)))))
            found = [moved(_predicted(model, own, collator, args.label_names, preprocess), "cpu")] if own else []
            parts = gathered(found) if world > 1 else found
            batch = {name: functools.reduce(_joined, (part[name] for part in parts)) for name in PARTS}
            if by_batch:
                assert compute_metrics is not None
                is_last = start + size * world >= len(rows)
                metrics = compute_metrics(prediction(moved(batch, args.device)), compute_result=is_last)
            if keep:
                for name in PARTS:
                    containers[name].add(batch[name])
    arrays = {name: container.get_arrays() for name, container in containers.items()}
    if compute_metrics is not None and not by_batch:
        metrics = compute_metrics(prediction(arrays))
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"compute_metrics returned {metrics!r:.80}, a {type(metrics).__name__}; expected a dict of names and "
            "numbers" + (", at the latest where compute_result is True." if by_batch else ".")
        )
    return arrays, denumpify_detensorize(metrics)


@torch.no_grad()
def _predicted(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collator: ForgetRetainCollator,
    label_names: Sequence[str] | None,
    preprocess: Callable[[Tensor, Any], Any] | None,
) -> dict[str, Any]:
    """Predictions, labels, losses and input ids of one batch."""
    device = device_of(model)
    batch = {name: tensor.to(device) for name, tensor in collator.encoder.batch(rows).items()}
    positions, targets = response_positions(batch["labels"])
    logits = response_logits(model, batch, positions)
    check_not_diverged(logits[targets != IGNORE_INDEX])
    entries, names = {**batch, "labels": targets}, label_names or ["labels"]
    if missing := [name for name in names if name not in entries]:
        raise ValueError(f"label_names={label_names!r}: the evaluation rows have no {', '.join(missing)}.")
    labels: Any = tuple(entries[name] for name in names)
    labels = labels[0] if len(labels) == 1 else labels
    return {
        "predictions": logits if preprocess is None else preprocess(logits, labels),
        "label_ids": labels,
        "losses": token_nll(logits, targets).sum(dim=1).float(),
        "inputs": batch["input_ids"],
    }


def _joined(one: Any, other: Any) -> Any:
    return nested_concat(one, other, padding_index=IGNORE_INDEX)


@contextmanager
def in_precision(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Context manager: the model's floating-point weights are of this type, on this device; on exit all are as before.

    `Trainer` leaves a model in half precision after an evaluation, which would then be trained, saved and compared
    with its base so. Here the weights are put back, bit for bit.

    Args:
        model: any model.
        dtype: None leaves the model alone.
        device: where it computes.
    """
    if dtype is None:
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    before = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
