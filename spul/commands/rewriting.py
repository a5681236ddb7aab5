"""`--rewritten`: training rows with rewritten ones beside them, and what is said of them in options."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .wording import in_options

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.dataset import HeldOut
    from .train_options import TrainingOptions

    Ways = dict[str, Callable[[Dataset], Dataset]]

logger = logging.getLogger(__name__)

SHARES = {"forget": 2.0, "retain": 1.0}  # rewritten rows for each row, as in the run that was measured with them
TURNS = (1, 2)
# The library's words for what the command has as options, beside those of `in_options`.
WORDS = {
    "turns has": "--rewritten-turns has",
    "filler_rows have": "the retain rows that are trained on have",
    "the collator has": "they have",
    "rewritings(turns=...) with fewer turns": "smaller --rewritten-turns",
}


def check_rewritten(options: TrainingOptions) -> None:
    """Raise if turns are given that nothing takes.

    Raises:
        ValueError: if there are.
    """
    if options.rewritten_turns is not None and not options.rewritten:
        raise ValueError(
            f"--rewritten-turns is {options.rewritten_turns}, of no effect without rewritten rows; expected it with "
            "--rewritten true: add that, or leave it out."
        )


def ways_of(options: TrainingOptions, dataset: Dataset) -> Ways | None:
    """The ways by which rows are rewritten; None without `--rewritten`. Made before a base is loaded.

    Args:
        options: of the command.
        dataset: the rows that are trained on, without those held out: turns are drawn from its retain rows.

    Raises:
        ValueError: if there are too few rows.
    """
    from ..training.augmentation import rewritings

    if not options.rewritten:
        return None
    sides = _sides(dataset)
    turns = TURNS if options.rewritten_turns is None else options.rewritten_turns
    try:
        ways = rewritings(options.text_field, sides["retain"], options.seed, turns)
    except ValueError as error:
        raise ValueError(f"--rewritten: {_in_options(error, options)}") from error
    for side, share in SHARES.items():
        least = next(num for num in itertools.count(1) if round(share * num / len(ways)) >= 1)
        if len(sides[side]) < least:
            raise ValueError(
                f"--rewritten: {len(sides[side])} {side} row(s) to train on; expected at least {least}, so that each "
                f"of {len(ways)} ways has one. Give more rows, or leave --rewritten out."
            )
    return ways


def rewritten_rows(
    options: TrainingOptions,
    dataset: Dataset,
    ways: Ways,
    collator: Any,
    held_out: HeldOut | None = None,
    tests: Iterable[Dataset] = (),
) -> Dataset:
    """Training rows with rewritten ones: two for each forget row, one for each retain row.

    A rewritten prompt that is also one of the other side, held out, or to test with, is left out: rows that differ in
    letter case or spaces alone have such.

    Args:
        options: of the command.
        dataset: the rows that are trained on, as `forget_retain_dataset` makes them.
        ways: of `ways_of`.
        collator: of the training.
        held_out: the rows that are not trained on.
        tests: sets of rows to test with.

    Raises:
        ValueError: if rewritten rows do not fit in `--max-length`.
    """
    from ..data.conversations import comparable
    from ..data.dataset import forget_retain_dataset
    from ..data.rows import column_values
    from ..training.augmentation import augmented

    try:
        both = {
            side: augmented(rows, ways, collator, SHARES[side], options.seed, skips_unchanged=True)
            for side, rows in _sides(dataset).items()
        }
    except ValueError as error:
        raise ValueError(f"--rewritten: {_in_options(error, options)}") from error
    prompts = {side: list(map(comparable, column_values(rows, "prompt"))) for side, rows in both.items()}
    others = [*(held_out[1:] if held_out else ()), *tests]
    kept_out = {comparable(prompt) for rows in others for prompt in column_values(rows, "prompt")}
    forget = _without(both["forget"], prompts["forget"], {*prompts["retain"], *kept_out})
    retain = _without(both["retain"], prompts["retain"], {*prompts["forget"], *kept_out})
    if num := len(both["forget"]) + len(both["retain"]) - len(forget) - len(retain):
        logger.warning(
            "--rewritten: %d rewritten row(s) left out, whose prompt is one of the other side, held out or to test "
            "with, as of rows that differ in letter case or spaces alone.",
            num,
        )
    return forget_retain_dataset(forget, retain)


def _sides(dataset: Dataset) -> dict[str, Dataset]:
    """The forget and the retain rows of a training set."""
    from ..data.checks import forget_flags

    flags = forget_flags(dataset)
    return {
        side: dataset.select([i for i, flag in enumerate(flags) if flag == group])
        for side, group in (("forget", True), ("retain", False))
    }


def _without(rows: Dataset, prompts: list[Any], kept_out: set[Any]) -> Dataset:
    """Rows, of these prompts, without the rewritten ones whose prompt is kept out."""
    from ..data.rows import rewritten_by

    each = zip(prompts, rewritten_by(rows), strict=True)
    return rows.select([i for i, (prompt, by) in enumerate(each) if by is None or prompt not in kept_out])


def _in_options(error: Exception, options: TrainingOptions) -> str:
    text = in_options(str(error), type(options))
    for old, new in WORDS.items():
        text = text.replace(old, new)
    return text
