"""The four splits as a table for a terminal."""

from __future__ import annotations

import pytest
from evaluations import RIGHT, measurement, utility

from spul.evaluation.report.summary import splits_as_text
from spul.evaluation.results import Evaluation

pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.mark.parametrize("models", [["unlearned"], ["unlearned", "detached"], ["unlearned", "detached", "retrained"]])
def test_the_splits_stand_in_a_table_with_accuracy_and_generic_answers_of_every_model(models):
    found = Evaluation({}, utility({model: RIGHT[model] for model in models}), {})
    head, names, *lines = splits_as_text(found)
    assert head.split() == ["accuracy", "generic"]
    assert names.split() == ["rows", *models, *models]
    assert [line[: names.index("unlearned")].strip() for line in lines] == [
        *("train retain", "train forget", "test retain", "test forget")
    ]
    columns = [i for i in range(len(names)) if names.startswith(tuple(models), i)]
    for line, split in zip(lines, RIGHT["unlearned"], strict=True):
        cells = [line[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)]
        for model, knowledge, generic in zip(models, cells, cells[len(models) :], strict=False):
            one = found.metric("utility", split, "accuracy", model)
            assert knowledge == f"{100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}]"
            assert generic == f"{100 * found.metric('utility', split, 'generic', model).value:.1f} %"


def test_of_free_form_answers_the_probability_stands_there():
    per_row = {"accuracy": [0.0] * 4, "generic": [1.0] * 4, "probability": [0.25, 0.25, 0.5, 0.5]}
    found = Evaluation({}, [measurement("utility", "test_forget", "unlearned", per_row=per_row)], {})
    head, _, line = splits_as_text(found)
    assert head.split() == ["probability", "generic"]
    assert line.split()[:3] == ["test", "forget", "0.375"]


def test_splits_that_are_not_measured_are_said_to_be_not():
    kl = [measurement("kl", "test_retain", "unlearned", per_row={"reverse_kl": [0.5] * 4})]
    assert splits_as_text(Evaluation({}, kl, {})) == ["The four splits: not measured."]
