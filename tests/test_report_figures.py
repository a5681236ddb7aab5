"""Figures of an evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from evaluations import ATTACKED, RIGHT, TEN, input_attacks, measurement, membership, relearning, utility, whole
from sklearn.metrics import roc_auc_score

from spul.data import SPLITS
from spul.evaluation.measures import MEASURES
from spul.evaluation.report.figures import (
    COLORS,
    draw_input_attacks,
    draw_relearning,
    draw_roc,
    draw_splits,
    evaluation_figures,
)
from spul.evaluation.report.wording import MODEL_LABELS, MODELS
from spul.evaluation.results import Evaluation, join


def evaluation(measurements: list) -> Evaluation:
    return Evaluation({}, measurements, {})


def lines(axes) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def bars(axes) -> dict[str, list[float]]:
    return {some.get_label(): [round(bar.get_height(), 6) for bar in some] for some in axes.containers}


def segments(axes) -> list[list[list[float]]]:
    return [path.vertices.tolist() for some in axes.collections for path in some.get_paths()]


# ---- splits ----


def test_splits_are_bars_of_accuracy_and_of_generic_answers_by_model():
    figure = draw_splits(whole())
    knowledge, generic = figure.axes
    assert bars(knowledge) == {MODEL_LABELS[m]: [10.0 * RIGHT[m][split] for split in SPLITS] for m in MODELS}
    # The unlearned model is generic where it is not right, the others never.
    assert bars(generic)[MODEL_LABELS["unlearned"]] == [100 - 10.0 * RIGHT["unlearned"][split] for split in SPLITS]
    assert bars(generic)[MODEL_LABELS["retrained"]] == [0, 0, 0, 0]
    assert (knowledge.get_ylabel(), generic.get_ylabel()) == ("accuracy, %", "generic answers, %")
    assert [bar.get_hatch() for bar in generic.containers[0]] == ["//"] * 4
    assert [t.get_text() for t in knowledge.get_xticklabels()] == [split.replace("_", "\n") for split in SPLITS]


def test_bars_of_a_split_stand_side_by_side_around_its_tick():
    (knowledge, _) = draw_splits(whole()).axes
    places = [[bar.get_x() + bar.get_width() / 2 for bar in some] for some in knowledge.containers]
    assert np.allclose(np.mean(places, axis=0), range(4))
    assert np.allclose(np.diff(places, axis=0), 0.8 / 3)


def test_intervals_stand_on_their_bars():
    found = whole()
    (knowledge, _) = draw_splits(found).axes
    drawn = {round(x, 3): (round(low, 6), round(high, 6)) for (x, low), (_, high) in segments(knowledge)}
    expected = {}
    for i, model in enumerate(MODELS):
        for place, split in enumerate(SPLITS):
            one = found.metric("utility", split, "accuracy", model)
            x = round(place + (i - 1) * 0.8 / 3, 3)
            expected[x] = (round(100 * one.low, 6), round(100 * one.high, 6))
    assert len(expected) == 12
    assert drawn == expected


def test_without_a_retrained_model_there_are_no_bars_of_it():
    found = evaluation(utility({model: RIGHT[model] for model in ("unlearned", "detached")}))
    assert list(bars(draw_splits(found).axes[0])) == [MODEL_LABELS["detached"], MODEL_LABELS["unlearned"]]


def test_free_form_rows_are_drawn_by_their_probability_as_it_is():
    free = [
        dataclasses.replace(one, per_row={"accuracy": [0.0] * TEN, "probability": [0.25] * 5 + [0.75] * 5})
        for one in utility({"unlearned": RIGHT["unlearned"]})
    ]
    (axes,) = draw_splits(evaluation(free)).axes  # no generic answers: no second panel
    assert bars(axes) == {MODEL_LABELS["unlearned"]: [0.5] * 4}
    assert axes.get_ylabel() == "probability"
    assert axes.get_ylim()[1] == pytest.approx(1.03)


# ---- ROC ----


def test_roc_curves_have_a_panel_an_attack_with_log_axes_and_the_areas():
    figure = draw_roc(whole())
    assert [axes.get_title() for axes in figure.axes] == ["loss", "zlib"]
    loss = figure.axes[0]
    assert (loss.get_xscale(), loss.get_yscale()) == ("log", "log")
    assert loss.texts[0].get_text() == "AUC\ndetached 0.90\nunlearned 0.30\nretrained 0.60"
    assert {name: line.get_color() for name, line in lines(loss).items() if name != "chance"} == {
        MODEL_LABELS[model]: COLORS[model] for model in MODELS
    }


def test_a_curve_is_the_roc_with_what_lies_at_zero_on_the_edge():
    scores = {"train_forget": [3.0, 2.0, 0.5, 0.5], "unseen": [2.5, 1.0, 0.5, 0.0]}
    found = [measurement("membership", rows, "unlearned", per_row={"loss": v}) for rows, v in scores.items()]
    (axes,) = draw_roc(evaluation(found)).axes
    points = lines(axes)[MODEL_LABELS["unlearned"]].get_xydata()
    edge = 0.125  # half of one of four rows
    by_hand = [[0, 0], [0, 0.25], [0.25, 0.25], [0.25, 0.5], [0.5, 0.5], [0.75, 1], [1, 1]]
    assert points.tolist() == [[max(x, edge), max(y, edge)] for x, y in by_hand]
    assert axes.get_xlim() == (edge, 1)
    area = roc_auc_score([1] * 4 + [0] * 4, scores["train_forget"] + scores["unseen"])
    assert np.trapezoid(*np.array(by_hand).T[::-1]) == pytest.approx(area)


def test_every_seed_has_its_curve_and_the_legend_names_a_model_once():
    one = evaluation(membership(("unlearned", "retrained")))
    figure = draw_roc(join([one, one, one]))
    of_model = [line for line in figure.axes[0].get_lines() if line.get_color() == COLORS["unlearned"]]
    assert len(of_model) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        MODEL_LABELS["unlearned"],
        MODEL_LABELS["retrained"],
        "chance",
    ]


def test_a_model_that_diverged_on_unseen_rows_has_no_curve_and_the_others_have_theirs():
    lacking = [one for one in membership() if (one.model, one.rows) != ("unlearned", "unseen")]
    unknown = {"loss": [1.0] * 9 + [np.nan], "zlib": [1.0] * TEN}
    found = [dataclasses.replace(one, per_row=unknown) if one.model == "retrained" else one for one in lacking]
    loss, zlib = draw_roc(evaluation(found)).axes
    assert set(lines(loss)) == {MODEL_LABELS["detached"], "chance"}
    assert set(lines(zlib)) == {MODEL_LABELS["detached"], MODEL_LABELS["retrained"], "chance"}


# ---- attacks ----


def test_input_attacks_are_dots_at_their_accuracy_the_first_on_top():
    figure = draw_input_attacks(whole())
    (axes,) = figure.axes
    assert lines(axes)[MODEL_LABELS["unlearned"]].get_xdata().tolist() == [20, 50, 40]
    assert lines(axes)[MODEL_LABELS["retrained"]].get_xdata().tolist() == [40, 40, 40]
    assert np.allclose(lines(axes)[MODEL_LABELS["unlearned"]].get_ydata(), np.arange(3) - 0.1)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["the unchanged rows", *list(ATTACKED)[1:]]
    assert axes.yaxis_inverted()
    (dashed,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert list(dashed.get_xdata()) == [20, 20]


def test_intervals_of_input_attacks_lie_on_their_dots():
    found = whole()
    (axes,) = draw_input_attacks(found).axes
    drawn = {(round(y, 3), round(low, 6), round(high, 6)) for (low, y), (high, _) in segments(axes)}
    one = found.metric("input attack", "test_forget", "accuracy", attack="capitals")
    assert (0.9, round(100 * one.low, 6), round(100 * one.high, 6)) in drawn
    assert len(drawn) == 6


def test_long_and_odd_names_of_attacks_are_shortened_and_are_no_formulas():
    names = ["none", "x" * 100, "a $b$ c"]
    found = [
        measurement("input attack", "test_forget", "unlearned", name, per_row={"accuracy": [0.0, 1.0]})
        for name in names
    ]
    figure = draw_input_attacks(evaluation(found))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[1:] == ["x" * 47 + "…", r"a \$b\$ c"]
    figure.draw_without_rendering()


def test_relearning_is_a_line_over_steps_in_order_with_its_interval():
    shuffled = relearning()[::-1]
    found = evaluation(shuffled)
    (axes,) = draw_relearning(found).axes
    assert lines(axes)[MODEL_LABELS["unlearned"]].get_xydata().round(6).tolist() == [[0, 10], [4, 60], [16, 50]]
    assert lines(axes)[MODEL_LABELS["retrained"]].get_xydata().round(6).tolist() == [[0, 40], [4, 50], [16, 60]]
    assert axes.get_xticks().tolist() == [0, 4, 16]
    one = found.metric("relearning", "train_forget", "accuracy", level=4)
    corners = {tuple(np.round(corner, 6)) for corner in axes.collections[0].get_paths()[0].vertices}
    assert {(4, round(100 * one.low, 6)), (4, round(100 * one.high, 6))} <= corners


def test_relearning_of_no_number_of_steps_is_refused():
    wrong = measurement("relearning", "train_forget", "unlearned", overall={"accuracy": 0.5})
    with pytest.raises(ValueError, match=r"level=None; expected its number of steps"):
        draw_relearning(evaluation([wrong]))


# ---- which ones there are ----


def test_an_evaluation_has_the_figures_that_it_has_measurements_for():
    assert list(evaluation_figures(whole())) == ["splits", "roc", "input_attacks", "relearning"]
    assert list(evaluation_figures(whole())) == [one.figure for one in MEASURES.values() if one.figure]
    assert list(evaluation_figures(evaluation([*input_attacks(), *utility()]))) == ["splits", "input_attacks"]
    assert evaluation_figures(evaluation([])) == {}


def test_figures_of_which_nothing_can_be_drawn_are_left_out():
    of_one_set = [one for one in membership() if one.rows == "unseen"]
    of_retain = [dataclasses.replace(one, rows="test_retain") for one in input_attacks()]
    assert list(evaluation_figures(evaluation([*utility(), *of_one_set, *of_retain]))) == ["splits"]


@pytest.mark.parametrize("draw", [draw_splits, draw_roc, draw_input_attacks, draw_relearning])
def test_a_figure_of_what_was_not_measured_is_refused(draw):
    kl = measurement("kl", "test_retain", "unlearned", per_row={"reverse_kl": [0.1, 0.2]})
    with pytest.raises(ValueError, match=r"nothing to draw of the measure .*; it has \['kl'\]"):
        draw(evaluation([kl]))
