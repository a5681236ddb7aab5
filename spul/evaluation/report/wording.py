"""How the numbers of an evaluation are found, named and shown."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

# For types alone: at run time `spul.evaluation` imports models, whose saving imports this package.
if TYPE_CHECKING:
    from ..aggregation import Number
    from ..results import Evaluation


MODELS = ("detached", "unlearned", "retrained")
"""Before, after, and what a model would be that never saw the forget rows."""

AS_THEY_ARE = "none"  # what the measure "input attack" calls the rows without an attack

PERCENT = (
    *("accuracy", "f1", "generic", "success", "majority", "shuffled", "exact_memorization", "extraction_strength"),
    *("true_positive_rate", "reversed_true_positive_rate"),
)
"""Shares of rows or of a response, shown in %; F1 with them, as it is customary."""

NAMES = {
    "auc": "AUC",
    "auc_difference": "AUC, less the retrained model's",
    "choice_probability": "probability among the choices",
    "f1": "F1",
    "forward_kl": "forward KL",
    "generic": "generic answers",
    "majority": "accuracy of the most frequent class",
    "priv_leak": "PrivLeak, in %",
    "reverse_kl": "reverse KL",
    "reversed_true_positive_rate": "true positives at 1 % false positives, by low scores",
    "rouge_l_f1": "ROUGE-L F1",
    "rouge_l_recall": "ROUGE-L recall",
    "shuffled": "accuracy on shuffled labels",
    "tokens": "tokens, mean of a row",
    "tokens_lost": "tokens lost, mean of a row",
    "true_positive_rate": "true positives at 1 % false positives",
}
"""In words, where putting spaces for underscores does not do."""

BETTER = {"low": "lower", "high": "higher", "0": "near 0"}


def where(evaluation: Evaluation, **fields: Any) -> list[Number]:
    """The numbers that have these values, such as `measure="utility", model="unlearned"`."""
    return [one for one in evaluation.numbers if all(getattr(one, key) == value for key, value in fields.items())]


def first(evaluation: Evaluation, **fields: Any) -> Number | None:
    """The first of `where`; None if there is none."""
    return next(iter(where(evaluation, **fields)), None)


def knowledge_name(evaluation: Evaluation, measure: str = "utility") -> str:
    """Which number says what is known under a measure: of free-form rows the probability, of others accuracy.

    An answer of free form is hardly ever the row's own, word for word, so that accuracy says little of such rows.
    """
    return "probability" if where(evaluation, measure=measure, name="probability") else "accuracy"


def worst_input_attack(evaluation: Evaluation) -> Number | None:
    """The most that the unlearned model knows of test forget rows under an input attack; None without attacks."""
    fields = {"measure": "input attack", "rows": "test_forget", "name": knowledge_name(evaluation, "input attack")}
    found = where(evaluation, **fields, model="unlearned")
    return max((one for one in found if one.variant != AS_THEY_ARE), key=lambda one: one.value, default=None)


def steps(variant: str) -> int:
    """Of how many steps of relearning a variant such as `"4 steps"` is.

    Raises:
        ValueError: if it does not say so.
    """
    match = re.fullmatch(r"(\d+) steps?", variant)
    if match is None:
        raise ValueError(f"variant={variant!r} of the measure 'relearning'; expected a number of steps: '4 steps'.")
    return int(match[1])


def name_in_words(name: str) -> str:
    """A number's name as it is shown."""
    return NAMES.get(name, name.replace("_", " "))


def scale(name: str) -> int:
    """100 for what is shown in %, else 1."""
    return 100 if name in PERCENT else 1


def with_unit(name: str) -> str:
    """A number's name, with % where it is shown so."""
    return name_in_words(name) + (", %" if name in PERCENT else "")


def value_in_words(number: Number) -> str:
    """`12.3 % [10.1, 14.2]`: a number, its 95 % interval where there is one, and its note."""
    text = _digits(number.name, number.value) + (" %" if number.name in PERCENT else "")
    if not (math.isnan(number.low) or math.isnan(number.high)):
        text += f" [{_digits(number.name, number.low)}, {_digits(number.name, number.high)}]"
    return f"{text}, {number.note}" if number.note else text


def _digits(name: str, value: float) -> str:
    if name in PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:.3g}" if not abs(value) >= 100 else f"{value:,.1f}"
