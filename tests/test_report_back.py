"""The report's answer to *What brings it back?*: the attack that raises most, against the same rows without it."""

from __future__ import annotations

import dataclasses

import pytest
from evaluations import input_attacks, measurement, utility

from spul.evaluation.report import evaluation_markdown
from spul.evaluation.results import Evaluation


def test_an_attack_that_raises_nothing_is_not_said_to_bring_anything_back():
    rows = {"unlearned": {"test_forget": 2}, "detached": {"test_forget": 10}}
    attacked = [one for one in input_attacks() if one.attack == "none"]
    found = [*utility(rows), *attacked, dataclasses.replace(attacked[0], attack="capitals")]
    text = evaluation_markdown(Evaluation({}, found, {}))
    assert "No attack raised what is answered. Tried: attacks on the input." in text


def test_an_attack_without_anything_to_compare_it_with_is_not_said_not_to_be_measured():
    per_row = {"accuracy": [1.0] * 3 + [0.0] * 7}
    found = [measurement("quantized", "test_forget", "unlearned", level=4, per_row=per_row)]
    text = evaluation_markdown(Evaluation({}, found, {}))
    assert "Under a quantized base (4 bit): test forget accuracy 30.0 % [" in text
    assert "(3 of 10 rows); what is answered without it was not measured." in text
    assert "No attack was measured." not in text
    both = evaluation_markdown(Evaluation({}, [*found, *input_attacks()], {}))
    assert "Most is brought back by attacks on the input" in both
    assert "Under a quantized base (4 bit): test forget accuracy 30.0 % [" in both


def test_an_attack_on_drawn_rows_is_compared_with_the_same_rows_where_these_were_asked_too():
    drawn = measurement("quantized", "test_forget", "unlearned", level=4, per_row={"accuracy": [1.0] * 3 + [0.0] * 2})
    drawn = dataclasses.replace(drawn, num_rows=5, digest="drawn")
    asked = dataclasses.replace(drawn, measure="input attack", attack="none", level=None)
    asked = dataclasses.replace(asked, per_row={"accuracy": [1.0] + [0.0] * 4})
    of_others = dataclasses.replace(asked, digest="as many others")
    all_rows = utility({"unlearned": {"test_forget": 5}})
    for others, without in (([], "50.0 % ["), ([asked], "20.0 % ["), ([of_others], "50.0 % [")):
        text = evaluation_markdown(Evaluation({}, [*all_rows, drawn, *others], {}))
        assert f" percentage points against {without}" in text


@pytest.mark.parametrize(("name", "level"), [("before", None), ("trained", None), ("mine", 0)])
def test_an_attack_on_the_input_brings_back_by_whatever_name_and_level(name, level):
    attacked = [one for one in input_attacks() if (one.attack, one.model) == ("none", "unlearned")]
    own = measurement("input attack", "test_forget", "unlearned", name, level=level, per_row={"accuracy": [1.0] * 10})
    text = evaluation_markdown(Evaluation({}, [*attacked, own], {}))
    assert f"Most is brought back by attacks on the input ({name}" in text


def test_where_nothing_is_forgotten_an_attack_that_raises_nothing_is_not_said_to_show_anything():
    attacked = [one for one in input_attacks() if (one.attack, one.model) == ("none", "unlearned")]
    found = [*utility({"unlearned": {"test_forget": 8}, "detached": {"test_forget": 8}}), *attacked]
    text = evaluation_markdown(Evaluation({}, [*found, dataclasses.replace(attacked[0], attack="capitals")], {}))
    assert "## Is it forgotten?\n\nNot forgotten: 8 of 8 test forget rows" in text
    assert "No attack raised" not in text
    assert "The rows are not forgotten without an attack; that no attack raised more says nothing. Tried: " in text


@pytest.mark.parametrize(("right", "is_said"), [(4, True), (6, False)])
def test_an_attack_that_the_detached_model_does_not_read_either_is_said_to_show_little(right, is_said):
    found = [
        measurement(
            "input attack", "test_forget", model, attack, per_row={"accuracy": [1.0] * num + [0.0] * (10 - num)}
        )
        for model, attack, num in (
            ("unlearned", "none", 2),
            ("unlearned", "capitals", 0),
            ("detached", "none", 10),
            ("detached", "capitals", right),
        )
    ]
    text = evaluation_markdown(Evaluation({}, found, {}))
    said = "Detached, the model answers less than half as much of the test forget rows under capitals"
    assert (said in text) == is_said
