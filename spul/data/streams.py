"""A training set as a stream: forget and retain rows interleaved at a share, never all in memory."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets

from .checks import SPLIT, checked_flag, whole_number

COLUMNS = ({"prompt", "completion"}, {"input_ids", "completion_mask"})


def forget_retain_stream(
    forget: IterableDataset | Dataset, retain: IterableDataset | Dataset, forget_fraction: float, seed: int = 0
) -> IterableDataset:
    """Interleave a stream of forget rows and one of retain rows, drawn at random at a share.

    Training on it takes `UnlearningTrainer(..., reference="live")`, `max_steps`, and no `forget_fraction`. It ends
    when every row of both was drawn, those of the shorter one again and again until then. It resumes as datasets'
    streams do: a trainer reads past the rows that were seen, and `state_dict` and `load_state_dict` of the result
    continue a loop of one's own without. What needs all rows at hand is not done here: a prompt in both sets is not
    noticed, rows have no `row_id`, and the record has no numbers of rows.

    Args:
        forget: rows in prompt-completion form, or tokenized by `collator.tokenize`. A `Dataset` is read as a stream.
        retain: rows of the same form.
        forget_fraction: the share of forget rows, above 0 and below 1.
        seed: of the draws.

    Returns:
        A stream of the rows with the column `is_forget` (bool); shuffle the two given ones for another order of each.

    Raises:
        TypeError: if one is not of `datasets`.
        ValueError: if `forget_fraction` or `seed` is out of range, or a stream has no rows, of which the first one is
            read, or is known to lack a column; while it is read, at a row whose `is_forget` says that it belongs to
            the other stream.

    Example:
        ```python
        rows = load_dataset("json", data_files="retain-*.jsonl", split="train", streaming=True)
        stream = forget_retain_stream(forget, rows.shuffle(seed=0, buffer_size=10_000), forget_fraction=0.25)
        ```
    """
    if isinstance(forget_fraction, bool) or not 0 < forget_fraction < 1:
        raise ValueError(f"forget_fraction={forget_fraction!r}: expected a share above 0 and below 1.")
    number = whole_number(seed, bools=False)
    if number is None or number < 0:
        raise ValueError(f"seed={seed!r}: expected a whole number of at least 0.")
    flagged = [_flagged(forget, "forget", True), _flagged(retain, "retain", False)]
    shares = [forget_fraction, 1 - forget_fraction]
    return interleave_datasets(flagged, shares, seed=seed, stopping_strategy="all_exhausted")


def _flagged(rows: Any, name: str, flag: bool) -> IterableDataset:
    """Rows as a stream with `is_forget`."""
    if not isinstance(rows, (Dataset, IterableDataset)):
        raise TypeError(
            f"{name} is a {type(rows).__name__}; expected a Dataset or an IterableDataset of datasets, such as "
            "IterableDataset.from_generator(function)."
        )
    if next(iter(rows), None) is None:  # datasets would interleave nothing with the rows of the other side
        raise ValueError(f"{name} has no rows; expected at least one. Check its files and filters.")
    stream = rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows
    columns = stream.column_names
    if columns is not None and not any(needed <= set(columns) for needed in COLUMNS):
        raise ValueError(
            f"{name} has the columns {columns}; expected prompt and completion, or rows of collator.tokenize."
        )
    features = None
    if stream.features is not None:  # kept: without them, datasets reads a first row to know the columns
        features = Features({**stream.features, "is_forget": Value("bool")})
    return stream.map(_Flag(flag, name), features=features)


class _Flag:
    """Adds `is_forget` to a row unless it says the opposite; a class, so that worker processes can take it along."""

    def __init__(self, flag: bool, name: str) -> None:
        self.flag, self.name = flag, name

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if "is_forget" in row and checked_flag(row["is_forget"], f"a row of {self.name}") != self.flag:
            raise ValueError(
                f"a row of {self.name} has is_forget={not self.flag}; expected {self.flag}, or no such column. Split "
                f"one stream by its column: {SPLIT}."
            )
        return {**row, "is_forget": self.flag}
