"""The training set: forget and retain rows joined, with a flag and a number for each row."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..models.compat import flattened
from ..records.fields import is_finite_number
from .checks import check_rows, check_side, forget_flags
from .conversations import comparable
from .row_weights import WEIGHT, checked_weights
from .rows import SHOWN, column_batches, column_values, concatenated, is_empty, rewritten_by, rows_at, shortened


def forget_retain_dataset(
    forget: Dataset, retain: Dataset, *, retain_weight: Sequence[float] | None = None
) -> Dataset:
    """Join a forget set and a retain set into one data set.

    Args:
        forget: rows in prompt-completion form: columns `prompt` and `completion`, both strings, or both lists of
            `{"role", "content"}` messages. Other columns stay.
        retain: rows of the same form.
        retain_weight: how often each retain row is drawn in training, one number above 0 for each: a hard negative
            of weight 3 three times as often as a row of weight 1. None (default) takes the column `sampling_weight`
            of the rows, and 1 without it.

    Returns:
        All rows, forget rows first, with the columns `is_forget` (bool) and `row_id` (int, from 0); and
        `sampling_weight` (float), 1 for rows without one, if weights are given.

    Raises:
        TypeError: if one is not a `datasets.Dataset`.
        ValueError: if a set is empty or lacks a column, a prompt is missing, a completion is empty, a prompt is in
            both sets, a column `is_forget` says that a row belongs to the other set, a column has another type in
            each set, or weights are not one for each row, finite and above 0.

    Example:
        ```python
        dataset = forget_retain_dataset(forget, retain, retain_weight=[3.0 if hard else 1.0 for hard in flagged])
        ```
    """
    hashes = []
    for name, rows in (("forget", forget), ("retain", retain)):
        check_rows(rows, name=name)
        check_side(rows, name == "forget", name)
        hashes.append(_checked_prompts(name, rows))
    _check_disjoint(forget, retain, *hashes)
    weights = [_weights(forget, None, "forget"), _weights(retain, retain_weight, "retain")]
    own = ("is_forget", "row_id", WEIGHT)
    forget, retain = (
        flattened(rows.remove_columns([name for name in own if name in rows.column_names]))
        for rows in (forget, retain)
    )
    forget = forget.add_column("is_forget", np.full(len(forget), True))
    retain = retain.add_column("is_forget", np.full(len(retain), False))
    joined = _concatenated(forget, retain).add_column("row_id", np.arange(len(forget) + len(retain)))
    if all(some is None for some in weights):
        return joined
    filled = [
        np.ones(len(rows)) if some is None else some for some, rows in zip(weights, (forget, retain), strict=True)
    ]
    return joined.add_column(WEIGHT, np.concatenate(filled))


def _concatenated(forget: Dataset, retain: Dataset) -> Dataset:
    """Both sets as one.

    Raises:
        ValueError: if a column of both has types that do not go together.
    """
    try:
        return concatenated([forget, retain])
    except (ValueError, TypeError, AttributeError) as error:  # the last where a struct meets another type
        both = [name for name in forget.column_names if name in retain.column_names]
        unlike = [name for name in both if forget.features[name] != retain.features[name]]
        if not unlike:
            raise
        listed = "; ".join(f"{name} is {forget.features[name]} and {retain.features[name]}" for name in unlike)
        raise ValueError(
            f"columns of the forget and the retain set have different types: {listed}. Make them alike, "
            "retain.cast_column(name, forget.features[name]) or retain.map, or drop those that are not needed: "
            "rows.select_columns(['prompt', 'completion'])."
        ) from error


class HeldOut(NamedTuple):
    """A training set without the rows held out of it, and those rows by side."""

    train: Dataset
    forget: Dataset
    retain: Dataset


def hold_out(dataset: Dataset, share: float = 0.1, seed: int = 0) -> HeldOut:
    """Hold rows out of a training set, to choose settings and to stop by: a share of each side, at random.

    Prompts are drawn, so that a repeated one is in one part alone.

    Args:
        dataset: the result of `forget_retain_dataset`.
        share: share of the different prompts of each side, above 0 and below 1, rounded to whole ones.
        seed: seed of the draw.

    Returns:
        `train`, the rows that are left, and `forget` and `retain`, those held out, all in their order and with their
        columns.

    Raises:
        TypeError: if `dataset` is not a `datasets.Dataset`.
        ValueError: if a column is missing, `share` is out of range, a part would be empty, or rows are rewritten
            (`spul.training.augmented`), so that a held-out row's copy could stay among those trained on.

    Example:
        ```python
        train, held_out_forget, held_out_retain = hold_out(dataset, 0.2)
        ```
    """
    check_rows(dataset, name="dataset")
    flags = forget_flags(dataset, "dataset")
    if not is_finite_number(share) or not 0 < share < 1:
        raise ValueError(f"share={share!r}; expected a number above 0 and below 1.")
    if num := sum(by is not None for by in rewritten_by(dataset)):
        raise ValueError(
            f"{num} row(s) of dataset are rewritten, and a copy of a held-out row may be trained on; expected rows as "
            "they were given: hold rows out first, then rewrite those that are left."
        )
    prompts = [comparable(prompt) for values in column_batches(dataset, "prompt") for prompt in values]
    drawn: set[str | tuple[str, ...]] = set()
    for side, group in (("forget", True), ("retain", False)):
        different = list(dict.fromkeys(prompt for prompt, flag in zip(prompts, flags, strict=True) if flag == group))
        number = math.floor(len(different) * share + 0.5)
        if number in (0, len(different)):
            raise ValueError(
                f"share={share!r} of the {len(different)} different {side} prompt(s) leaves a part empty; expected "
                "at least one prompt in each."
            )
        drawn.update(random.Random(seed).sample(different, number))
    is_held = np.array([prompt in drawn for prompt in prompts])
    is_forget = np.array(flags, dtype=bool)
    parts = (~is_held, is_held & is_forget, is_held & ~is_forget)
    return HeldOut(*(dataset.select(np.flatnonzero(part)) for part in parts))


def _weights(rows: Dataset, given: Sequence[float] | None, name: str) -> np.ndarray | None:
    """Weights by which the rows of a set are drawn: as given, or by its column; None without either."""
    if given is None:
        if WEIGHT not in rows.column_names:
            return None
        given = column_values(rows, WEIGHT)
    if isinstance(given, str) or not hasattr(given, "__len__") or len(given) != len(rows):
        found = f"{len(given)} values" if hasattr(given, "__len__") and not isinstance(given, str) else repr(given)
        raise ValueError(f"{name}_weight is {found}; expected {len(rows)} numbers above 0, one for each {name} row.")
    return checked_weights(given, f"the {name} set")


def _checked_prompts(name: str, rows: Dataset) -> np.ndarray:
    """A hash of each prompt, (rows,), after a check of every row."""
    hashes, bad_prompts, bad_completions = [], [], []
    number = 0
    for prompts, completions in zip(column_batches(rows, "prompt"), column_batches(rows, "completion"), strict=True):
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=number):
            if (
                not _is_text_or_messages(prompt)
                or not (_is_text_or_messages(completion) or completion in (None, []))
                or isinstance(prompt, str) != isinstance(completion, str)
            ):
                bad_prompts.append(i)
            if completion is None or (_is_text_or_messages(completion) and is_empty(completion)) or completion == []:
                bad_completions.append(i)
        hashes.append(np.fromiter((hash(comparable(prompt)) for prompt in prompts), np.int64, len(prompts)))
        number += len(prompts)
    for bad, fault, expected in (
        (bad_completions, "an empty completion", "the answer, as text or messages."),
        (
            bad_prompts,
            "a prompt that cannot be used",
            "prompt and completion to be strings, or both lists of {'role', 'content'} messages.",
        ),
    ):
        if bad:
            shown = "; ".join(f"row {i}: {shortened(repr(rows[i]))}" for i in bad[:SHOWN])
            raise ValueError(f"{len(bad)} row(s) of the {name} set have {fault}: {shown}. Expected {expected}")
    return np.concatenate(hashes)


def _check_disjoint(forget: Dataset, retain: Dataset, forget_hashes: np.ndarray, retain_hashes: np.ndarray) -> None:
    """Compare the prompts of equal hashes, which are few, so that not all prompts are in memory at once."""
    alike = [
        (indices, [comparable(row["prompt"]) for row in rows_at(rows, indices, ("prompt",))])
        for rows, hashes, others in ((forget, forget_hashes, retain_hashes), (retain, retain_hashes, forget_hashes))
        if (indices := np.flatnonzero(np.isin(hashes, others)).tolist())
    ]
    if not alike:
        return
    forgotten, retained = (list(zip(*each, strict=True)) for each in alike)
    first = {text: i for i, text in reversed(retained)}
    if both := [(i, text) for i, text in forgotten if text in first]:
        shown = "; ".join(
            f"forget row {i} = retain row {first[text]}: {shortened(repr(rows_at(forget, [i])[0]['prompt']))}"
            for i, text in both[:SHOWN]
        )
        raise ValueError(
            f"{len(both)} prompt(s) are in both sets and would be forgotten and retained at once: {shown}. Remove "
            "them from one."
        )


def _is_text_or_messages(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)
