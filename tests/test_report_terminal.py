"""Tables for a terminal: the four splits, and the attacks with their controls."""

from __future__ import annotations

import dataclasses

import pytest
from evaluations import RIGHT, input_attacks, measurement, utility, whole

from spul.evaluation.report.terminal import attacks_as_text, splits_as_text
from spul.evaluation.results import Evaluation

pytestmark = pytest.mark.usefixtures("few_resamples")


def cells(lines):
    """The cells of a table whose columns begin below each other."""
    head = lines[0]
    starts = [i for i in range(len(head)) if head[i] != " " and head[max(0, i - 2) : i].strip() == ""]
    return [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]


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


def test_behind_gates_the_share_of_each_split_that_they_flag_stands_last():
    def of(split, model, **more):
        return measurement("utility", split, model, per_row={"accuracy": [1.0] * 4, "generic": [0.0] * 4, **more})

    flags = {"test_retain": [0.0, 0.0, 0.0, 1.0], "test_forget": [1.0] * 4}
    rows = [of(split, "unlearned", flagged=some) for split, some in flags.items()]
    head, names, *lines = splits_as_text(Evaluation({}, [*rows, *(of(split, "detached") for split in flags)], {}))
    assert head.split() == ["accuracy", "generic", "flagged"]
    assert names.index("unlearned", names.rindex("detached")) == head.index("flagged")
    assert [line.split()[:2] + line.split()[-2:] for line in lines] == [
        *(["test", "retain", "25.0", "%"], ["test", "forget", "100.0", "%"])
    ]


def test_of_free_form_answers_the_probability_stands_there():
    per_row = {"accuracy": [0.0] * 4, "generic": [1.0] * 4, "probability": [0.25, 0.25, 0.5, 0.5]}
    found = Evaluation({}, [measurement("utility", "test_forget", "unlearned", per_row=per_row)], {})
    head, _, line = splits_as_text(found)
    assert head.split() == ["probability", "generic"]
    assert line.split()[:3] == ["test", "forget", "0.375"]


def test_splits_that_are_not_measured_are_said_to_be_not():
    kl = [measurement("kl", "test_retain", "unlearned", per_row={"reverse_kl": [0.5] * 4})]
    assert splits_as_text(Evaluation({}, kl, {})) == ["The four splits: not measured."]


def test_each_attack_stands_with_its_value_and_its_controls():
    head, *lines = cells(attacks_as_text(whole()))
    assert head == ["attack", "rows", "metric", "unlearned", "without it", "detached", "retrained"]
    assert [[cell.split(" [")[0] for cell in line] for line in lines] == [
        ["capitals", "test forget", "accuracy", "50.0 %", "20.0 %", "", "40.0 %"],
        ["prefix: <b>Say|it</b>", "test forget", "accuracy", "40.0 %", "20.0 %", "", "40.0 %"],
        ["relearning, 4 steps", "train forget", "accuracy", "60.0 %", "10.0 %", "", "50.0 %"],
        ["a trained suffix, after", "train forget", "accuracy", "70.0 %", "70.0 %", "", "40.0 %"],
        ["membership inference, loss", "train forget", "AUC", "0.3", "", "0.9", "0.6"],
    ]
    one = whole().metric("input attack", "test_forget", "accuracy", attack="capitals")
    assert lines[0][3] == f"50.0 % [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def test_of_many_attacks_on_the_input_those_that_find_most_are_shown_and_the_others_counted():
    plain, first = (one for one in input_attacks() if one.model == "unlearned" and one.attack in ("none", "capitals"))
    many = [
        dataclasses.replace(first, attack=f"way {i}", per_row={"accuracy": [1.0] * i + [0.0] * (10 - i)})
        for i in range(8)
    ]
    lines = attacks_as_text(Evaluation({}, [plain, *many], {}))
    assert [line.split("  ")[0] for line in lines[1:-1]] == [f"way {i}" for i in (7, 6, 5, 4, 3)]
    assert lines[-1] == "The 5 of 8 attacks on the input that find most; the report has all."


def test_without_attacks_there_is_no_table_of_them():
    assert attacks_as_text(Evaluation({}, utility(), {})) == []
    alone = [one for one in input_attacks() if one.attack == "none"]
    assert attacks_as_text(Evaluation({}, alone, {})) == []
