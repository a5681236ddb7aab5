"""Facts of a training's rows: groups, counts and digests, each read once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from transformers import TrainingArguments

from ..data.checks import forget_flags
from ..data.collator import ROW_COLUMNS, ForgetRetainCollator
from ..data.row_weights import WEIGHT
from ..data.rows import read_rows, rewritten_by
from ..records.digests import DataSummary, RewrittenRows, is_transformed, summarize_groups
from .options import GROUPING, is_stream
from .resuming import CONTENT
from .row_digest import plain_digest


class TrainingRows:
    """Facts of a training's rows; few of a stream, which is read as it trains, and of no rows.

    Args:
        rows: the training set; None if nothing is trained.
        collator: of the training; it names further columns.
        key: of the owner, for digests to share; None for counts alone.

    Raises:
        ValueError: if there is a key, and the rows are a stream.
    """

    def __init__(self, rows: Any, collator: ForgetRetainCollator, key: bytes | None) -> None:
        self.rows, self.collator, self.key = rows, collator, key
        self.is_stream = rows is not None and is_stream(rows)
        if key is not None and self.is_stream:
            raise ValueError("digest_key: the rows of a stream are not digested; load them as a datasets.Dataset.")

    @cached_property
    def flags(self) -> list[bool]:
        """The rows' `is_forget`; [] of a stream, and without rows."""
        return [] if self.rows is None or self.is_stream else forget_flags(self.rows)

    @cached_property
    def rewritten(self) -> RewrittenRows | None:
        """Numbers and ways of the rewritten rows; None without any, and for a stream."""
        return None if self.is_stream else RewrittenRows.of(self.flags, rewritten_by(self.rows))

    @cached_property
    def summaries(self) -> tuple[DataSummary | None, DataSummary | None]:
        """Number and keyed digest of the forget and of the retain rows; None for a stream, which is not counted.

        Rewritten rows are counted apart, so that the digests are those of the rows that their owner has.
        """
        if self.is_stream:
            return None, None
        made_by = rewritten_by(self.rows)
        given = [flag for flag, by in zip(self.flags, made_by, strict=True) if by is None]
        if self.key is None:
            return DataSummary(given.count(True)), DataSummary(given.count(False))
        content = read_rows(self.rows, ("prompt", "completion", "input_ids", "completion_mask"))
        own = (row for row, by in zip(content, made_by, strict=True) if by is None)
        return summarize_groups(own, given, self.key)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Numbers of the rows, and a plain digest of all that a training reads of them, in their order.

        Rows behind a transform of the caller's, which may draw them anew each time, have no digest.
        """
        if self.is_stream:
            return {"forget": "a stream", "retain": "a stream", "rewritten": None, CONTENT: None}
        further = filter(None, (self.collator.encoder.text_field, self.collator.alternates))
        return {
            "forget": sum(self.flags),
            "retain": len(self.flags) - sum(self.flags),
            "rewritten": None if self.rewritten is None else self.rewritten.in_words(),
            CONTENT: None if is_transformed(self.rows) else plain_digest(self.rows, (*ROW_COLUMNS, WEIGHT, *further)),
        }

    def lengths(self, args: TrainingArguments) -> str | None:
        """Digest of the column of lengths by which rows are grouped; None where they are not, or it is not there."""
        name, strategy = args.length_column_name, args.train_sampling_strategy
        is_read = strategy in GROUPING and not self.is_stream and name in getattr(self.rows, "column_names", ())
        return plain_digest(self.rows, (name,)) if is_read and not is_transformed(self.rows) else None
