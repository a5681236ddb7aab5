"""Tables of the report: the four splits, and what each attack brings back."""

from __future__ import annotations

import dataclasses
import re

import pytest
from evaluations import input_attacks, measurement, membership, whole
from reports import cells, section, verdict

from spul.evaluation.report import evaluation_markdown
from spul.evaluation.results import Evaluation

pytestmark = pytest.mark.usefixtures("few_resamples")


def test_the_table_of_splits_has_all_four_before_and_after():
    head, _, *rows = cells(section(evaluation_markdown(whole()), "Before and after"))
    assert head == ["rows", "metric", "before (detached)", "after (unlearned)", "retrained", "better"]
    values = [[re.sub(r" \[.*\]", "", cell) for cell in row] for row in rows]
    assert values[0] == ["train retain", "accuracy", "100.0 %", "90.0 %", "90.0 %", "higher"]
    assert values[6] == ["test forget", "accuracy", "80.0 %", "20.0 %", "40.0 %", "lower"]
    assert values[7] == ["test forget", "generic answers", "0.0 %", "80.0 %", "0.0 %", "higher"]
    one = whole().metric("utility", "test_forget", "accuracy")
    assert rows[6][3] == f"20.0 % [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def test_what_comes_back_is_said_with_its_controls():
    _, _, *rows = cells(section(evaluation_markdown(whole()), "What brings it back?"))
    found = {what: re.sub(r" \[[-\d., ]*\]", "", said) for what, said in rows}
    assert list(found.values()) == [
        "test forget accuracy 80.0 %, against 20.0 % with it",
        "'capitals', of 2: test forget accuracy 50.0 %, +30.0 percentage points against the unchanged rows (20.0 %)"
        "; the retrained model under it: 40.0 %",
        "'loss', of 2: AUC 0.3; the difference from the retrained model's is -0.3, " + verdict(),
        "accuracy on the other forget rows is highest after 4 steps, 60.0 %, +50.0 percentage points against none "
        "(10.0 %); the retrained model after 4 steps: 50.0 %, after none 40.0 %",
        "train forget accuracy 70.0 % (after); the retrained model: 40.0 %",
    ]


def test_without_a_retrained_model_the_attack_farthest_from_chance_is_named_without_a_verdict():
    text = evaluation_markdown(Evaluation({}, membership(("unlearned",)), {}))
    said = cells(section(text, "What brings it back?"))[4][1]
    assert said.startswith("no retrained model to compare with; farthest from chance, of 2: 'loss', AUC 0.3")
    assert "forgotten" not in said


def test_an_attack_under_which_less_is_answered_has_a_minus():
    fewer = [one for one in input_attacks() if one.attack != "capitals" and one.model == "unlearned"]
    fewer[0] = dataclasses.replace(fewer[0], per_row={"accuracy": [1.0] * 5 + [0.0] * 5})
    text = section(evaluation_markdown(Evaluation({}, fewer, {})), "What brings it back?")
    assert "-10.0 percentage points against the unchanged rows (50.0 %" in text


def test_what_else_comes_back_stands_beside_its_control():
    def of(measure, rows, model, variant, name, values):
        attack, level = (variant, None) if isinstance(variant, str) else ("", variant)
        return measurement(measure, rows, model, attack, level=level, per_row={name: values})

    found = [
        of("input attack", "test_retain", "unlearned", "none", "accuracy", [1.0] * 4),
        of("input attack", "test_retain", "unlearned", "capitals", "accuracy", [1.0, 1.0, 0.0, 0.0]),
        of("input attack", "test_retain", "unlearned", "dilution", "accuracy", [1.0, 0.0, 0.0, 0.0]),
        of("input attack", "test_retain", "detached", "none", "accuracy", [1.0] * 4),
        of("input attack", "test_retain", "detached", "capitals", "accuracy", [1.0, 1.0, 1.0, 0.0]),
        of("input attack", "test_retain", "detached", "dilution", "accuracy", [1.0, 0.0, 0.0, 0.0]),
        of("quantized", "test_forget", "unlearned", 8, "accuracy", [1.0, 0.0, 1.0, 1.0]),
        of("quantized", "test_forget", "unlearned", 4, "accuracy", [1.0, 0.0, 0.0, 0.0]),
        of("quantized", "test_forget", "retrained", 4, "accuracy", [1.0, 0.0, 1.0, 0.0]),
    ]
    rows = cells(section(evaluation_markdown(Evaluation({}, found, {})), "What brings it back?"))[6:]
    said = {what: re.sub(r" \[[-\d., ]*\]", "", text) for what, text in rows}
    assert said == {
        # Dilution leaves fewer answers, of the detached model as well.
        "The input attack under which most is lost on retain rows": "'capitals', of 2: test retain accuracy "
        "50.0 %, -25.0 percentage points against the detached model under it (75.0 %), which without it has 100.0 %",
        "The base in fewer bits": "test forget accuracy 25.0 % (4 bit); the retrained model: 50.0 %",
    }


@pytest.mark.parametrize(
    ("detached", "expected"),
    [
        (
            {"none": 4, "capitals": 2, "dilution": 1},
            "'dilution', of 2: test retain accuracy 25.0 %, +0.0 percentage points against the detached model under "
            "it (25.0 %), which without it has 100.0 %; what is lost is the attack's doing, not that of "
            "the method",
        ),
        (
            {"none": 2, "capitals": 2},
            "'capitals', of 2: test retain accuracy 50.0 %, +0.0 percentage points against the detached model under "
            "it (50.0 %), which without it has 50.0 %; nothing is lost",
        ),
        (
            {"capitals": 3},
            "'capitals', of 2: test retain accuracy 50.0 %, -25.0 percentage points against the detached model under "
            "it (75.0 %)",
        ),
        (
            {},
            "'dilution', of 2: test retain accuracy 25.0 %; the detached model was not measured, so how much of "
            "it the attack itself costs is not known",
        ),
    ],
)
def test_what_an_attack_takes_from_the_detached_model_too_is_not_said_to_be_the_methods_doing(detached, expected):
    rights = {"unlearned": {"none": 4, "capitals": 2, "dilution": 1}, "detached": detached}
    found = [
        measurement(
            "input attack", "test_retain", model, attack, per_row={"accuracy": [1.0] * right + [0.0] * (4 - right)}
        )
        for model, of in rights.items()
        for attack, right in of.items()
    ]
    text = section(evaluation_markdown(Evaluation({}, found, {})), "What brings it back?")
    (said,) = [cell for what, cell in cells(text)[2:] if what.endswith("lost on retain rows")]
    assert re.sub(r" \[[-\d., ]*\]", "", said) == expected
