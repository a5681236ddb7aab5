"""Options of the commands that train, with all of `TrainingArguments`, whose import takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from .train_options import CombineOptions, TrainOptions


# Some options have narrower types than those of `TrainingArguments` that they take the place of, or None as well.
@dataclass(kw_only=True)
class TrainArguments(TrainOptions, TrainingArguments):  # type: ignore[misc]
    """All options of `spul train`."""


@dataclass(kw_only=True)
class CombineArguments(CombineOptions, TrainingArguments):  # type: ignore[misc]
    """All options of `spul combine`."""
