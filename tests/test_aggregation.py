"""An evaluation's measurements to metrics with intervals."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
from measured import SCORES, VALUES, ends, evaluate, membership, of
from scipy.stats import binomtest, bootstrap, hmean, ks_2samp
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

import spul.evaluation.aggregation as aggregation
from spul.evaluation.aggregation import Measurement, MetricValue

RESAMPLES = 200


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(aggregation, "NUM_RESAMPLES", RESAMPLES)


# ---- means ----


def test_a_number_per_row_becomes_its_mean_with_scipys_bca_interval_over_rows():
    one = evaluate(of(per_row={"accuracy": VALUES}, num_rows=8)).metric("utility", "test_forget", "accuracy")
    expected = bootstrap(
        (VALUES,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert ends(one) == pytest.approx((3 / 8, expected.low, expected.high))
    assert (one.over, one.num_rows, one.num_seeds) == ("rows", 8, 1)


def test_f1_is_scikit_learns_over_the_classes_that_there_are_and_the_classes_are_no_numbers():
    true, predicted = [0.0, 0.0, 1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 1.0, 0.0, 1.0, 2.0]
    found = evaluate(of(per_row={"true": true, "predicted": predicted}))
    one = found.metric("utility", "test_forget", "f1")
    assert [number.name for number in found.metrics] == ["f1"]
    # By hand: class 0 has precision 1/2, recall 1/3, F1 2/5; class 1 precision 1, recall 2/3, F1 4/5; three rows each.
    assert one.value == pytest.approx(0.6)
    assert one.value == pytest.approx(f1_score(true, predicted, labels=[0, 1], average="weighted"))
    assert one.low < one.value < one.high


def test_perplexity_is_of_all_tokens_together_and_not_a_mean_over_rows():
    rows = of("unrelated text", "news", per_row={"nats": [2.0, 30.0, 4.0], "tokens": [1, 10, 4]})
    one = evaluate(rows).metric("unrelated text", "news", "perplexity")
    assert one.value == pytest.approx(math.exp(36 / 15))
    assert one.low < one.value < one.high


def test_a_perplexity_beyond_what_floats_hold_is_infinite_and_not_warned_of():
    rows = of("unrelated text", "news", per_row={"nats": [2.0, 3e5], "tokens": [1, 2]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = evaluate(rows).metric("unrelated text", "news", "perplexity")
    assert one.value == math.inf


def test_a_share_that_exists_once_has_wilsons_interval_and_other_numbers_none():
    found = evaluate(of("relearning", "train_forget", level=4, overall={"accuracy": 0.3, "loss": 2.0},
                        num_rows=10))  # fmt: skip
    share, loss = (found.metric("relearning", "train_forget", name, level=4) for name in ("accuracy", "loss"))
    n, p, z = 10, 0.3, 1.959964
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert ends(share) == pytest.approx((0.3, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)))
    assert share.over == "rows"
    assert loss.value == 2
    assert math.isnan(loss.low)
    assert math.isnan(loss.high)
    assert loss.over == ""


# ---- membership ----


def area(model: str) -> float:
    members, unseen = SCORES[model, "train_forget"], SCORES[model, "unseen"]
    return float(roc_auc_score([1] * 150 + [0] * 150, members + unseen))


def test_membership_gives_scikit_learns_auc_and_rates_of_either_direction():
    found = evaluate(*membership())

    def number(name: str) -> MetricValue:
        return found.metric("membership", "train_forget", name, attack="loss")

    assert number("auc").value == pytest.approx(area("unlearned"))
    assert number("auc").low < area("unlearned") < number("auc").high
    for name, sign in (("true_positive_rate", 1), ("reversed_true_positive_rate", -1)):
        scores = sign * np.array(SCORES["unlearned", "train_forget"] + SCORES["unlearned", "unseen"])
        false, true, _ = roc_curve([1] * 150 + [0] * 150, scores, drop_intermediate=False)
        assert number(name).value == pytest.approx(max(t for f, t in zip(false, true, strict=True) if f <= 0.01))
    assert number("reversed_true_positive_rate").value > number("true_positive_rate").value
    for name in ("true_positive_rate", "reversed_true_positive_rate"):
        assert 0 <= number(name).low <= number(name).value <= number(name).high <= 1
        assert number(name).low < number(name).high
    assert {one.over for one in found.metrics} == {"rows"}
    assert {one.rows for one in found.metrics} == {"train_forget"}


def test_a_rate_of_0_or_1_has_the_wider_of_both_intervals():
    """One unseen row beyond all members sets the threshold, unless it is not drawn."""
    rng = np.random.default_rng(0)
    members, others = rng.normal(2, 0.2, 50), np.r_[rng.normal(0, 0.2, 49), 9.0]
    scores = {("unlearned", "train_forget"): members.tolist(), ("unlearned", "unseen"): others.tolist()}
    number = evaluate(*membership(scores)).metric("membership", "train_forget", "true_positive_rate", attack="loss")
    assert (number.value, number.low, number.high) == (0, 0, 1)
    scores["unlearned", "unseen"] = rng.normal(9, 0.2, 50).tolist()  # whatever is drawn
    number = evaluate(*membership(scores)).metric("membership", "train_forget", "true_positive_rate", attack="loss")
    assert number.value == number.low == 0
    assert number.high == pytest.approx(binomtest(0, 50).proportion_ci(method="wilson").high)


def test_the_difference_to_the_retrained_model_has_a_verdict_by_its_interval():
    for sign, verdict in ((1, "over-forgotten"), (-1, "under-forgotten")):
        found = evaluate(*membership(sign=sign))
        one = found.metric("membership", "train_forget", "auc_difference", attack="loss")
        assert one.value == pytest.approx(sign * (area("unlearned") - area("retrained")))
        assert one.note == verdict
        assert one.high < 0 if sign == 1 else one.low > 0
    same = {(model, rows): SCORES["retrained", rows] for model, rows in SCORES}
    one = evaluate(*membership(same)).metric("membership", "train_forget", "auc_difference", attack="loss")
    assert (one.value, one.note) == (0, "not told apart")


def test_priv_leak_is_by_its_formula_and_the_retrained_model_is_not_compared_with_itself():
    found = evaluate(*membership())
    number = found.metric("membership", "train_forget", "priv_leak", attack="loss")
    leak = number.value
    assert number.low < leak < number.high
    assert leak == pytest.approx(100 * (area("retrained") - area("unlearned")) / (1 - area("retrained")))
    assert {one.name for one in found.metrics if one.model == "retrained"} == {
        *("auc", "true_positive_rate", "reversed_true_positive_rate"),
    }


def test_without_a_retrained_model_nothing_is_compared():
    found = evaluate(*(one for one in membership() if one.model == "unlearned"))
    assert [one.name for one in found.metrics] == ["auc", "true_positive_rate", "reversed_true_positive_rate"]


def test_a_model_without_scores_of_unseen_rows_has_no_membership_numbers_and_the_others_have_theirs():
    """It diverged on them: the rest of the evaluation stands."""
    for model, left in (("unlearned", "retrained"), ("retrained", "unlearned")):
        found = evaluate(*(one for one in membership() if (one.model, one.rows) != (model, "unseen")))
        assert {(one.model, one.name) for one in found.metrics} == {
            (left, name) for name in ("auc", "true_positive_rate", "reversed_true_positive_rate")
        }


@pytest.mark.parametrize("model", ["unlearned", "retrained"])
@pytest.mark.parametrize("rows", ["train_forget", "unseen"])
def test_membership_by_scores_that_are_nan_is_not_known_and_compared_with_nothing(model, rows):
    found = [
        dataclasses.replace(one, per_row={**one.per_row, "loss": [math.nan, *one.per_row["loss"][1:]]})
        if (one.model, one.rows) == (model, rows)
        else one
        for one in membership()
    ]
    metrics = [one for one in evaluate(*found).metrics if one.attack == "loss"]
    assert {one.name for one in metrics} == {"auc", "true_positive_rate", "reversed_true_positive_rate"}
    assert {one.model for one in metrics if math.isnan(one.value)} == {model}
    assert [one.model for one in metrics if not math.isnan(one.value)]


# ---- TOFU ----


def questions(model: str, shift: float = 0.0) -> list[Measurement]:
    found = []
    for i, rows in enumerate(("forget", "retain", "real_authors", "world_facts")):
        column = np.array([0.2, 0.4, 0.6, 0.8]) - 0.05 * i
        per_row = {
            "probability": column,
            "choice_probability": column + 0.1,
            "rouge_l_recall": column + 0.15,
            "truth_ratio": column + shift,
            "truth_ratio_geometric": column + 2 * shift,
        }
        found.append(of("questions", rows, model, per_row={name: v.tolist() for name, v in per_row.items()}))
    return found


def test_model_utility_is_the_harmonic_mean_of_nine_means():
    found = evaluate(*questions("unlearned"))
    nine = []
    for mean, name in ((0.45, "retain"), (0.4, "real_authors"), (0.35, "world_facts")):
        nine += [mean if name == "retain" else mean + 0.1, mean + 0.15, 1 - mean]
    (one,) = [one for one in found.metrics if one.name == "model_utility"]
    assert one.value == pytest.approx(hmean(nine))
    assert one.low < one.value < one.high
    assert one.better == "high"
    ratio = found.metric("questions", "retain", "truth_ratio_on_retain")
    assert ratio.value == pytest.approx(0.55)
    assert ratio.low < ratio.value < ratio.high


def test_forget_quality_is_the_p_value_against_the_retrained_model():
    found = evaluate(*questions("unlearned", 0.3), *questions("retrained"))
    one = found.metric("questions", "forget", "forget_quality")
    theirs = np.array([0.2, 0.4, 0.6, 0.8])
    assert one.value == pytest.approx(ks_2samp(theirs + 0.3, theirs).pvalue)
    assert [n.model for n in found.metrics if n.name == "forget_quality"] == ["unlearned"]
    assert not [n for n in evaluate(*questions("unlearned")).metrics if n.name == "forget_quality"]
    by_program = found.metric("questions", "forget", "forget_quality_geometric")
    assert by_program.value == pytest.approx(ks_2samp(theirs + 0.6, theirs).pvalue)


def test_forget_quality_by_geometric_means_is_left_out_of_measurements_without_them():
    both = [*questions("unlearned", 0.3), *questions("retrained")]
    for one in both:
        del one.per_row["truth_ratio_geometric"]
    names = {n.name for n in evaluate(*both).metrics}
    assert "forget_quality" in names
    assert "forget_quality_geometric" not in names


@pytest.mark.parametrize("without", [0, 1])
def test_a_score_that_some_seeds_were_measured_without_is_left_out_for_all(without):
    seeds = [dataclasses.replace(one, seed=seed) for seed in (0, 1) for one in questions("unlearned", 0.1 * seed)]
    for one in seeds:
        if one.seed == without:
            del one.per_row["truth_ratio_geometric"]
    names = {n.name for n in evaluate(*seeds).metrics}
    assert "truth_ratio" in names
    assert "truth_ratio_geometric" not in names


# ---- better ----


@pytest.mark.parametrize(
    ("rows", "name", "better"),
    [
        ("test_forget", "accuracy", "low"),
        ("train_forget", "rouge_l_recall", "low"),
        ("test_retain", "accuracy", "high"),
        ("same surname", "probability", "high"),
        ("test_forget", "generic", "high"),
        ("test_retain", "generic", "low"),
        ("test_retain", "loss", "low"),
        ("test_forget", "loss", ""),
        ("test_retain", "reverse_kl", "low"),
        ("test_forget", "success", "low"),
        ("test_forget", "shuffled", ""),
    ],
)
def test_what_is_better_is_low_on_what_is_forgotten_and_high_on_what_is_kept(rows, name, better):
    for model, expected in (("unlearned", better), ("detached", ""), ("retrained", "")):
        found = evaluate(of("some", rows, model, per_row={name: [0.1, 0.2]}))
        assert found.metric("some", rows, name, model).better == expected


def test_an_attack_is_best_where_it_finds_what_it_finds_in_the_retrained_model():
    found = {one.name: one.better for one in evaluate(*membership()).metrics if one.model == "unlearned"}
    assert found == {
        **dict.fromkeys(("auc", "true_positive_rate", "reversed_true_positive_rate"), "as retrained"),
        **dict.fromkeys(("auc_difference", "priv_leak"), "0"),
    }
