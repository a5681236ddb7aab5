"""Tables of an evaluation for a terminal: the four splits, and what the attacks find."""

from __future__ import annotations

from collections.abc import Sequence

from ...data.unlearning_data import SPLITS
from ..aggregation import MEMBERS, MetricValue
from ..measures import MEASURES, variant_in_words
from ..metrics.table import metric_of
from ..results import Evaluation
from .answers import ATTACKS, strongest, unattacked
from .summary import NOT_MEASURED, farthest_membership, without_empty_columns
from .wording import first, knowledge_name, spaced, under_input_attacks, value_in_words

MOST_INPUT_ATTACKS = 5


def splits_as_text(evaluation: Evaluation) -> list[str]:
    """A table for a terminal: knowledge of each split with its interval, and the shares of generic answers and, behind
    gates, of rows that they flag."""
    name = knowledge_name(evaluation)
    models = [model for model in ("unlearned", "detached", "retrained") if model in evaluation.models]
    columns = [(metric, model) for metric in (name, "generic") for model in models]
    if first(evaluation, measure="utility", name="flagged", model="unlearned") is not None:
        columns.append(("flagged", "unlearned"))
    heads = [metric_of(name).label, *[""] * (len(models) - 1), "generic", *[""] * (len(models) - 1), "flagged"]
    table = [["", *heads[: len(columns)]], ["rows", *(model for _, model in columns)]]
    for split in SPLITS:
        found = [
            first(evaluation, measure="utility", rows=split, name=metric, model=model) for metric, model in columns
        ]
        if any(found):
            cells = ["" if one is None else value_in_words(one) for one in found]
            table.append([spaced(split), *cells[: len(models)], *(one.split(" [")[0] for one in cells[len(models) :])])
    if len(table) == 2:
        return [f"The four splits: {NOT_MEASURED}."]
    return _aligned(table)


def attacks_as_text(evaluation: Evaluation) -> list[str]:
    """A table for a terminal: the attacks on the input that find most, and the strongest of each other attack.

    Beside the value under an attack stand those without it, and of the other models under it. Empty where no attack
    was measured.
    """
    found = sorted(under_input_attacks(evaluation, "test_forget"), key=lambda one: -one.value)
    shown = found[:MOST_INPUT_ATTACKS]
    others = [strongest(evaluation, measure) for measure in ATTACKS if measure != "input attack"]
    probe = first(evaluation, measure="linear probe", rows=MEMBERS, name="accuracy", model="unlearned")
    rows = [
        _attack(evaluation, one)
        for one in (*shown, *others, farthest_membership(evaluation), probe)
        if one is not None
    ]
    if not rows:
        return []
    columns, rows = without_empty_columns(
        ["attack", "rows", "metric", "unlearned", "without it", "detached", "retrained"], rows
    )
    lines = _aligned([columns, *rows])
    if len(found) > len(shown):
        lines.append(f"The {len(shown)} of {len(found)} attacks on the input that find most; the report has all.")
    return lines


def _attack(evaluation: Evaluation, one: MetricValue) -> list[str]:
    """A line of the table: an attack on the unlearned model, with its controls."""
    controls = [
        unattacked(evaluation, one) if one.measure in ATTACKS else None,
        *(
            first(
                evaluation,
                **{name: getattr(one, name) for name in ("measure", "rows", "name", "attack", "level")},
                model=model,
            )
            for model in ("detached", "retrained")
        ),
    ]
    kind = "" if one.measure == "input attack" else MEASURES[one.measure].title.lower()
    return [
        ", ".join(filter(None, (kind, variant_in_words(one)))),
        spaced(one.rows),
        metric_of(one.name).label,
        value_in_words(one),
        *("" if control is None else value_in_words(control).split(" [")[0] for control in controls),
    ]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, whose columns begin below each other."""
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(max(map(len, table)))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
