"""Tables of the report: the four splits before and after, and what each attack finds."""

from __future__ import annotations

from collections.abc import Sequence

from ...data.unlearning_data import SPLITS
from ..aggregation import MEMBERS, MetricValue
from ..attacks.inputs import WITHOUT
from ..measures import variant_in_words
from ..metrics.table import metric_of
from ..results import Evaluation
from .document import Section
from .wording import (
    MODEL_LABELS,
    MODELS,
    better_in_words,
    first,
    knowledge_name,
    method_in_words,
    points,
    spaced,
    under_input_attacks,
    value_in_words,
    where,
    worst_input_attack,
)

NOT_MEASURED = "not measured"


def before_and_after(evaluation: Evaluation) -> Section:
    """The four splits before and after unlearning."""
    rows = []
    for split in SPLITS:
        for name in (knowledge_name(evaluation), "generic"):
            found = {
                model: first(evaluation, measure="utility", rows=split, name=name, model=model) for model in MODELS
            }
            if found["unlearned"] is not None:
                cells = ["" if one is None else value_in_words(one) for one in found.values()]
                rows.append([spaced(split), metric_of(name).label, *cells, better_in_words(found["unlearned"])])
    columns = ["rows", "metric", *MODEL_LABELS.values(), "better"]
    columns, rows = without_empty_columns(columns, rows)
    return Section("Before and after", [] if rows else [f"The four splits: {NOT_MEASURED}."], columns, rows)


def what_comes_back(evaluation: Evaluation) -> Section:
    """A line for each attack: what it finds, beside its controls."""
    in_few_bits, in_suffix = (knowledge_name(evaluation, measure) for measure in ("quantized", "soft suffix"))
    rows = [
        [f"Without {method_in_words(evaluation)}", _detached(evaluation)],
        ["The input attack that finds most", _worst_input(evaluation)],
        ["The membership attack that is farthest from the retrained model", _membership(evaluation)],
        ["Training on a few forget rows", _relearned(evaluation)],
        ["The input attack under which most is lost on retain rows", _worst_on_retain(evaluation)],
        ["The base in fewer bits", _beside(evaluation, "quantized", "test_forget", in_few_bits)],
        ["Sampling", _beside(evaluation, "sampling", "test_forget", "success", "rouge_l_recall")],
        ["A soft suffix", _beside(evaluation, "soft suffix", MEMBERS, in_suffix, attack="after")],
        ["A linear probe on hidden states", _beside(evaluation, "linear probe", MEMBERS, "accuracy")],
    ]
    rows = rows[:4] + [row for row in rows[4:] if row[1] != NOT_MEASURED]
    text = "Where one of several attacks is named, it was selected by its value, which chance alone makes too high."
    return Section("What comes back", [text], ["attack", "result"], rows)


def _detached(evaluation: Evaluation) -> str:
    fields = {"measure": "utility", "rows": "test_forget", "name": knowledge_name(evaluation)}
    before, after = (first(evaluation, **fields, model=model) for model in ("detached", "unlearned"))
    if before is None or after is None:
        return NOT_MEASURED
    label = metric_of(before.name).label
    return f"test forget {label} {value_in_words(before)}, against {value_in_words(after)} with it"


def _worst_input(evaluation: Evaluation) -> str:
    worst = worst_input_attack(evaluation)
    if worst is None:
        return NOT_MEASURED
    fields = {"measure": "input attack", "rows": "test_forget", "name": worst.name}
    count = len(under_input_attacks(evaluation, "test_forget"))
    text = (
        f"'{variant_in_words(worst)}', of {count}: test forget {metric_of(worst.name).label} {value_in_words(worst)}"
    )
    plain = first(evaluation, **fields, model="unlearned", attack=WITHOUT)
    if plain is not None:
        text += f", {points(worst, plain)} against the unchanged rows ({value_in_words(plain)})"
    for model, words in (("detached", "detached"), ("retrained", "the retrained model")):
        control = first(evaluation, **fields, model=model, attack=worst.attack, level=worst.level)
        text += "" if control is None else f"; {words} under it: {value_in_words(control)}"
    return text


def _worst_on_retain(evaluation: Evaluation) -> str:
    """The input attack under which retain rows lose most against the detached model under the same attack."""
    found = under_input_attacks(evaluation, "test_retain")
    if not found:
        return NOT_MEASURED
    controls = {(one.attack, one.level): one for one in under_input_attacks(evaluation, "test_retain", "detached")}
    pairs = [(one, controls[one.attack, one.level]) for one in found if (one.attack, one.level) in controls]
    if not pairs:
        lowest = min(found, key=lambda one: one.value)
        return (
            f"{_under(lowest, len(found))}; the detached model was not measured, so how much of it the attack itself "
            "costs is not known"
        )
    worst, control = min(pairs, key=lambda pair: (pair[0].value - pair[1].value, pair[0].value))
    text = f"{_under(worst, len(found))}, {points(worst, control)} against the detached model under it "
    text += f"({value_in_words(control)})"
    fields = {"measure": "input attack", "rows": "test_retain", "name": control.name, "model": "detached"}
    plain = first(evaluation, **fields, attack=WITHOUT)
    if plain is not None:
        text += f", which without it has {value_in_words(plain)}"
    if worst.value < control.value:
        return text
    is_attack = plain is not None and control.value < plain.value
    doing = f"; what is lost is the attack's doing, not that of {method_in_words(evaluation)}"
    return text + (doing if is_attack else "; nothing is lost")


def _under(attacked: MetricValue, num: int) -> str:
    """The value of test retain rows under an attack that was selected of some."""
    label = metric_of(attacked.name).label
    return f"'{variant_in_words(attacked)}', of {num}: test retain {label} {value_in_words(attacked)}"


def _beside(evaluation: Evaluation, measure: str, rows: str, *names: str, attack: str | None = None) -> str:
    """The value of the unlearned and of the retrained model under a given attack, or the last attack and level."""
    found = [one for name in names for one in where(evaluation, measure=measure, rows=rows, name=name)]
    ours = [one for one in found if one.model == "unlearned" and one.attack in (attack or one.attack,)]
    if not ours:
        return NOT_MEASURED
    last = ours[-1]
    theirs = [one for one in found if (one.model, one.attack, one.level) == ("retrained", last.attack, last.level)]
    text = f"{spaced(rows)} {metric_of(last.name).label} {value_in_words(last)}"
    variant = variant_in_words(last)
    text += f" ({variant})" if variant else ""
    return text + "".join(f"; the retrained model: {value_in_words(one)}" for one in theirs)


def _membership(evaluation: Evaluation) -> str:
    areas = where(evaluation, measure="membership", name="auc", model="unlearned")
    area = farthest_membership(evaluation)
    if area is None:
        return NOT_MEASURED
    fields = {"measure": "membership", "name": "auc_difference", "model": "unlearned"}
    difference = first(evaluation, **fields, attack=area.attack)
    if difference is None:
        return (
            f"no retrained model to compare with; farthest from chance, of {len(areas)}: '{area.attack}', AUC "
            f"{value_in_words(area)}"
        )
    return (
        f"'{area.attack}', of {len(where(evaluation, **fields))}: AUC {value_in_words(area)}; the difference from the "
        f"retrained model's is {value_in_words(difference)}"
    )


def farthest_membership(evaluation: Evaluation) -> MetricValue | None:
    """AUC of the membership attack farthest from the retrained model's, without one from chance; None without any."""
    areas = where(evaluation, measure="membership", name="auc", model="unlearned")
    differences = where(evaluation, measure="membership", name="auc_difference", model="unlearned")
    if differences:
        most = max(differences, key=lambda one: abs(one.value))
        return next(one for one in areas if one.attack == most.attack)
    return max(areas, key=lambda one: abs(one.value - 0.5), default=None)


def _relearned(evaluation: Evaluation) -> str:
    name = knowledge_name(evaluation, "relearning")

    def curve(model: str) -> dict[int, MetricValue]:
        found = where(evaluation, measure="relearning", rows=MEMBERS, name=name, model=model)
        return {one.level: one for one in found if one.level is not None}

    ours, theirs = curve("unlearned"), curve("retrained")
    most = max((step for step in ours if step > 0), key=lambda step: ours[step].value, default=None)
    if most is None:
        return NOT_MEASURED
    label, steps = metric_of(name).label, variant_in_words(ours[most])
    text = f"{label} on the other forget rows is highest after {steps}, {value_in_words(ours[most])}"
    if 0 in ours:
        text += f", {points(ours[most], ours[0])} against none ({value_in_words(ours[0])})"
    if most in theirs:
        text += f"; the retrained model after {steps}: {value_in_words(theirs[most])}"
        text += f", after none {value_in_words(theirs[0])}" if 0 in theirs else ""
    return text


def without_empty_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that are empty in all rows."""
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [columns[i] for i in filled], [[row[i] for i in filled] for row in rows]
