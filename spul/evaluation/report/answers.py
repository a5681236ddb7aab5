"""The first screen of the report: is it forgotten, what did it cost, and what brings it back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..aggregation import MEMBERS, MetricValue
from ..attacks.inputs import WITHOUT
from ..measures import MEASURES, is_attacked, variant_in_words
from ..metrics.table import metric_of
from ..results import Evaluation
from .document import Section
from .summary import what_comes_back
from .verdict import NOT, right, verdict
from .wording import counted, first, knowledge_name, points, spaced, value_in_words, where

FORGOTTEN, COST, BACK = "Is it forgotten?", "What did it cost?", "What brings it back?"
# Measures that try to bring answers to forget rows back, with the rows that they are scored on.
ATTACKS = {
    "input attack": "test_forget",
    "relearning": MEMBERS,
    "quantized": "test_forget",
    "sampling": "test_forget",
    "soft suffix": MEMBERS,
}


def answers(evaluation: Evaluation) -> list[Section]:
    """A section for each of the three questions."""
    table = what_comes_back(evaluation)
    return [
        Section(FORGOTTEN, forgotten(evaluation)),
        Section(COST, cost(evaluation)),
        Section(BACK, [*back(evaluation), *table.texts], table.columns, table.rows),
    ]


def forgotten(evaluation: Evaluation) -> list[str]:
    """The verdict, what is still answered of the forget rows, and how many of them the base itself did not know."""
    said = verdict(evaluation)
    texts = [_before_and_after(evaluation, rows) for rows in ("test_forget", "train_forget")]
    found = [text for text in texts if text] or ["Not measured: the four splits are the measure 'utility'."]
    found = found if said is None else [str(said), *found]
    return found + [text for rows in ("test_forget", "train_forget") if (text := known_to_base(evaluation, rows))]


def cost(evaluation: Evaluation) -> list[str]:
    """Losses on the retain rows and other text."""
    found = [_before_and_after(evaluation, "test_retain")]
    generic = first(evaluation, measure="utility", rows="test_retain", name="generic", model="unlearned")
    if generic is not None:
        found.append(f"Generic answers, which retain rows should not get: {_value(generic)}.")
    for measure, rows, name, words in (
        ("kl", "test_retain", "reverse_kl", "KL divergence from the base's predictions on test retain rows"),
        ("unrelated text", "unrelated text", "perplexity", "Perplexity of unrelated text"),
        ("questions", "retain", "model_utility", "Model utility on TOFU's questions"),
    ):
        after, before = (
            first(evaluation, measure=measure, rows=rows, name=name, model=model)
            for model in ("unlearned", "detached")
        )
        if after is not None:
            unit = metric_of(name).unit
            text = f"{words}: {value_in_words(after)}{f' {unit}' if unit else ''}"
            found.append(text + ("." if before is None else f"; before: {value_in_words(before)}."))
    return [text for text in found if text] or ["Not measured: the four splits are the measure 'utility'."]


def back(evaluation: Evaluation) -> list[str]:
    """The attack that raises most what is answered on the forget rows."""
    pairs: list[tuple[MetricValue, MetricValue]] = []
    alone: list[MetricValue] = []
    for measure in ATTACKS:
        attacked = strongest(evaluation, measure)
        plain = None if attacked is None else unattacked(evaluation, attacked)
        if attacked is not None and plain is not None:
            pairs.append((attacked, plain))
        elif attacked is not None:
            alone.append(attacked)
    without = [
        f"Under {MEASURES[one.measure].title.lower()} ({variant_in_words(one)}): {spaced(one.rows)} "
        f"{metric_of(one.name).label} {_value(one)}; what is answered without it was not measured."
        for one in alone
    ]
    if not pairs:
        return without or ["No attack was measured."]
    return [*_most(evaluation, pairs), *without]


def _most(evaluation: Evaluation, pairs: Sequence[tuple[MetricValue, MetricValue]]) -> list[str]:
    """The attack that raises most, of pairs of a value under an attack and without it."""
    tried = f"Tried: {', '.join(MEASURES[one.measure].title.lower() for one, _ in pairs)}."
    most, plain = max(pairs, key=lambda pair: pair[0].value - pair[1].value)
    if all(one.value == plain.value == 1.0 for one, plain in pairs):
        return [f"Everything is answered as it is, so there was nothing to bring back. {tried}"]
    if most.value <= plain.value:
        said = verdict(evaluation)
        if said is not None and said.word == NOT:
            return [f"The rows are not forgotten without an attack; that no attack raised more says nothing. {tried}"]
        return [f"No attack raised what is answered. {tried}", *_lost_on_the_model_itself(evaluation)]
    retrained = first(evaluation, **_fields(most) | {"model": "retrained"})
    text = (
        f"Most is brought back by {MEASURES[most.measure].title.lower()} ({variant_in_words(most)}): "
        f"{spaced(most.rows)} {metric_of(most.name).label} {_value(most)}, {points(most, plain)} against "
        f"{_value(plain)} without{_retrained(retrained, 'under the attack, ')}"
    )
    return [text, tried, *_lost_on_the_model_itself(evaluation)]


def _lost_on_the_model_itself(evaluation: Evaluation) -> list[str]:
    """Attacks on the input that the model without the prompt answers less than half as much of: they show little."""
    rows = ATTACKS["input attack"]
    own = where(
        evaluation,
        measure="input attack",
        rows=rows,
        name=knowledge_name(evaluation, "input attack"),
        model="detached",
    )
    plain = next((one.value for one in own if one.attack == WITHOUT), math.nan)
    lost = [variant_in_words(one) for one in own if one.attack != WITHOUT and one.value < plain / 2]
    if not lost:
        return []
    return [
        f"Detached, the model answers less than half as much of the {spaced(rows)} rows under {', '.join(lost)}: what "
        "is not answered there says little about forgetting."
    ]


def known_to_base(evaluation: Evaluation, rows: str) -> str:
    """Numbers of rows that the model before got wrong, and of those that it knew and are answered; "" if unknown.

    Free-form answers hardly ever equal the true one word for word, so of these nothing is said.
    """
    if knowledge_name(evaluation) != "accuracy":
        return ""
    before, after = (right(evaluation, rows, model) for model in ("detached", "unlearned"))
    if before is None or after is None or len(before) != len(after):
        return ""
    num, wrong, still = len(before), int((~before).sum()), int((before & after).sum())
    seeds = max(one.num_seeds for one in evaluation.metrics)
    text = f"Of the {num:,} {spaced(rows)} rows{f' of {seeds} seeds' if seeds > 1 else ''} "
    text += f"the base itself got {wrong:,} wrong" if wrong else "the base itself got all right"
    if wrong:
        text += "; what it did not know cannot be forgotten"
    if wrong == num:
        return f"{text}."
    are = "is" if still == 1 else "are"
    return f"{text}. Of the {num - wrong:,} that it knew, {still:,} {are} still answered right."


def _before_and_after(evaluation: Evaluation, rows: str) -> str:
    fields = {"measure": "utility", "rows": rows, "name": knowledge_name(evaluation)}
    after, before, retrained = (
        first(evaluation, **fields, model=model) for model in ("unlearned", "detached", "retrained")
    )
    if after is None:
        return ""
    label = metric_of(after.name).label
    text = f"{spaced(rows).capitalize()} {label}: {_value(after)}"
    text += "" if before is None else f"; before: {_value(before)}"
    return text + _retrained(retrained)


def strongest(evaluation: Evaluation, measure: str) -> MetricValue | None:
    """The attack of a measure under which the unlearned model answers most."""
    names: Sequence[str] = [knowledge_name(evaluation, measure)]
    if measure == "sampling":
        names = ["success", "rouge_l_recall"]
    found = [
        one
        for name in names
        for one in where(evaluation, measure=measure, rows=ATTACKS[measure], name=name, model="unlearned")
        if is_attacked(one) and not math.isnan(one.value)
    ]
    return max(found, key=lambda one: one.value, default=None)


def unattacked(evaluation: Evaluation, attacked: MetricValue) -> MetricValue | None:
    """The same metric of the unlearned model without the attack, on the same rows where there is one.

    Of more rows than are attacked, those drawn for the attacks on the input may be the same.
    """
    fields = _fields(attacked)
    del fields["attack"], fields["level"]
    without: dict[str, dict[str, Any]] = {
        "input attack": {"attack": WITHOUT},
        "relearning": {"level": 0},
        "soft suffix": {"attack": "before"},
    }
    if attacked.measure in without:
        return first(evaluation, **fields, **without[attacked.measure])
    fields["name"] = "accuracy" if attacked.name == "success" else attacked.name
    found = first(evaluation, **fields | {"measure": "utility"})
    drawn = first(evaluation, **fields | {"measure": "input attack"} | without["input attack"])
    same = (one for one in (found, drawn) if one and _digests(evaluation, one) == _digests(evaluation, attacked))
    return found and next(same, found)


def _digests(evaluation: Evaluation, of: MetricValue) -> list[str]:
    """Digests of the rows that a value is of, one for each seed."""
    return [one.digest for one in evaluation.measurements if one.key == of.key]


def _fields(one: MetricValue) -> dict[str, Any]:
    return {**one.key._asdict(), "name": one.name}


def _retrained(one: MetricValue | None, when: str = "") -> str:
    """The end of a sentence: what a retrained model answers, the yardstick of what is learned or guessed anew."""
    return "." if one is None else f"; {when}a model retrained without the forget rows: {_value(one)}."


def _value(one: MetricValue) -> str:
    return value_in_words(one) + counted(one)
