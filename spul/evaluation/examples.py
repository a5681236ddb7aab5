"""The text of each attack on the input, by the example of a row made up for it: reports show no rows of the data."""

from __future__ import annotations

from datasets import Dataset

from ..data.conversations import texts_of
from ..data.rows import column_values
from .aggregation import in_words
from .attacks.changes import InapplicableError, with_prompts_changed
from .attacks.usual import STAND_IN, TURN_UNIT, checked_attacks, usual_attacks
from .suite import Suite

OTHERS = tuple(f"Play number {i} has a fine cast and a poor script." for i in range(1, 65))


def attack_examples(suite: Suite) -> dict[str, str]:
    """A made-up row as each attack on the input changes it.

    Attacks that are the user's own may put other rows into a prompt. An example with a prompt or a text of the
    evaluation's rows in it is left out, and so is one of an attack that cannot be made on the row; `suite.skipped`
    says so.

    Args:
        suite: models, rows and settings.

    Returns:
        The changed prompt by the attack's name in the report.
    """
    settings, text_field = suite.attacks, suite.collator.encoder.text_field
    row = _rows([STAND_IN], text_field, " ".join(settings.wording or ()))
    attacks = settings.inputs
    if attacks is None:
        others = _rows(OTHERS, text_field)
        attacks = usual_attacks(
            *(text_field, others, suite.seed, settings.paraphrase, settings.wording, settings.turns, settings.names),
            other_rows=others,
            document_words=settings.document_words,
        )
    found = {}
    for (attack, level), change in checked_attacks(attacks).items():
        name = in_words(attack, level, TURN_UNIT)
        try:
            text = with_prompts_changed(row, change, name)[0]["prompt"]
        except InapplicableError:
            continue
        except Exception as error:
            if settings.inputs is None:
                raise
            suite.skipped[f"example of the input attack {name!r}"] = f"it fails on a made-up row: {error!r}"
            continue
        if settings.inputs is not None and _holds_rows(text, suite):
            suite.skipped[f"example of the input attack {name!r}"] = "it has rows of the evaluation in it"
            continue
        found[name] = text
    return found


def _rows(texts: list[str] | tuple[str, ...], text_field: str | None, before: str = "") -> Dataset:
    prompts = [f"{before} {text}" if before else text for text in texts]
    rows = {"prompt": prompts, "completion": [f" answer {i % 2 + 1}" for i in range(len(texts))]}
    return Dataset.from_dict(rows if text_field is None else rows | {text_field: list(texts)})


def _holds_rows(text: str, suite: Suite) -> bool:
    """Whether a prompt or a text of the evaluation's rows stands in an example."""
    return any(
        one in text
        for rows in suite.splits.values()
        for column in ("prompt", suite.collator.encoder.text_field)
        if column is not None and column in rows.column_names
        for value in column_values(rows, column)
        for one in texts_of(value)
        if one.strip()
    )
