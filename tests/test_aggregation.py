"""What an evaluation's measurements amount to, and how it is kept, read and joined."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, hmean, ks_2samp
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

import spul.evaluation.aggregation as aggregation
from spul.evaluation.aggregation import Measurement, MetricValue
from spul.evaluation.metrics.intervals import joined_interval, seeds_interval
from spul.evaluation.results import EVALUATION_NAME, MEASUREMENTS_NAME, Evaluation, join, read_measurements

RESAMPLES = 200


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(aggregation, "NUM_RESAMPLES", RESAMPLES)


def evaluate(*measurements: Measurement, **settings: object) -> Evaluation:
    return Evaluation(dict(settings), list(measurements), {})


def of(measure: str = "utility", rows: str = "test_forget", model: str = "unlearned", attack: str = "", **changes):
    return Measurement(measure, rows, model, attack, **changes)


def ends(one: MetricValue) -> tuple[float, float, float]:
    return one.value, one.low, one.high


# ---- means ----

VALUES = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


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

DRAWS = np.random.default_rng(0)
SCORES = {
    (model, rows): DRAWS.normal(shift if rows == "train_forget" else 0, 1, 150).tolist()
    for model, shift in (("unlearned", -1.0), ("retrained", 0.1))
    for rows in ("train_forget", "unseen")
}


def membership(scores: dict = SCORES, sign: int = 1) -> list[Measurement]:
    return [
        of("membership", rows, model, per_row={"loss": [sign * value for value in values]}, num_rows=len(values))
        for (model, rows), values in scores.items()
    ]


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


# ---- joining ----

OTHER = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def test_seeds_on_the_same_rows_are_joined_over_rows_and_seeds():
    seeds = [
        evaluate(of(per_row={"accuracy": values}, digest="a"), seed=i) for i, values in enumerate((VALUES, OTHER))
    ]
    found = join(seeds)
    one = found.metric("utility", "test_forget", "accuracy")
    expected = joined_interval([VALUES, OTHER])
    assert ends(one) == (expected.estimate, expected.low, expected.high)
    assert (one.value, one.over, one.num_seeds) == (0.5, "rows and seeds", 2)
    assert found.settings == {"seeds": [{"seed": 0}, {"seed": 1}]}
    assert [one.seed for one in found.measurements] == [0, 1]


def test_seeds_on_rows_of_their_own_are_joined_over_seeds():
    columns = [VALUES, OTHER[:4], OTHER]  # means 3/8, 3/4, 5/8
    found = join([evaluate(of(per_row={"accuracy": v}, digest=str(i))) for i, v in enumerate(columns)])
    one = found.metric("utility", "test_forget", "accuracy")
    expected = seeds_interval([3 / 8, 3 / 4, 5 / 8])
    assert ends(one) == pytest.approx((7 / 12, expected.low, 1))
    assert expected.high > 1  # and a share ends there
    assert (one.over, one.num_seeds) == ("seeds", 3)


def test_numbers_that_each_seed_has_once_are_joined_over_seeds():
    seeds = [
        evaluate(*membership(sign=sign), of(per_row={"true": [0.0, 1.0], "predicted": [0.0, 2 * p - 1]}, digest="a"),
                 of("relearning", "train_forget", level=1, overall={"accuracy": p}, num_rows=8))
        for sign, p in ((1, 1.0), (-1, 0.5))
    ]  # fmt: skip
    found = join(seeds)
    f1 = found.metric("utility", "test_forget", "f1")
    # The second seed gives 0 to both rows: F1 of class 0 is 2/3, of class 1 it is 0.
    assert (f1.value, f1.over) == (pytest.approx((1 + 1 / 3) / 2), "seeds")
    assert found.metric("relearning", "train_forget", "accuracy", level=1).value == 0.75
    one = found.metric("membership", "train_forget", "auc", attack="loss")
    assert one.value == pytest.approx(0.5)  # one seed's AUC is one less the other's
    assert one.over == "seeds"
    difference = found.metric("membership", "train_forget", "auc_difference", attack="loss")
    assert difference.note == "over-forgotten, under-forgotten"


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("digests", ["aaa", "abc"])
def test_seeds_that_are_all_right_or_all_wrong_have_wilsons_interval_with_each_row_once(value, digests):
    seeds = [
        evaluate(
            of(per_row={"accuracy": [value] * 8, "reverse_kl": [value] * 8}, digest=digest),
            of("relearning", "train_forget", level=4, overall={"accuracy": value, "loss": 2.0}, num_rows=8),
        )
        for digest in digests
    ]
    found = join(seeds)
    share = binomtest(int(8 * value), 8).proportion_ci(method="wilson")
    for where in (("utility", "test_forget"), ("relearning", "train_forget")):
        one = found.metric(*where, "accuracy", level=4 if where[0] == "relearning" else None)
        assert ends(one) == pytest.approx((value, share.low, share.high))
        assert (one.over, one.num_seeds) == ("rows", 3)
        alone = seeds[0].metric(*where, "accuracy", level=one.level)
        assert ends(alone) == ends(one)
    for one in (
        found.metric("relearning", "train_forget", "loss", level=4),
        found.metric("utility", "test_forget", "reverse_kl"),  # no share, whatever its value
        seeds[0].metric("utility", "test_forget", "reverse_kl"),
    ):
        assert math.isnan(one.low)
        assert math.isnan(one.high)
        assert one.over == ""


def test_seeds_in_which_nobody_is_found_have_the_widest_of_their_intervals():
    scores = {"train_forget": np.arange(10.0), "unseen": np.arange(10.0) + 20}
    seeds = []
    for num in (10, 6):
        some = {("unlearned", rows): values[:num].tolist() for rows, values in scores.items()}
        seeds.append(evaluate(*membership(some)))
    where = ("membership", "train_forget", "true_positive_rate")
    one = join(seeds).metric(*where, attack="loss")
    assert (one.value, one.low, one.over) == (0, 0, "rows")
    assert one.high == seeds[1].metric(*where, attack="loss").high > seeds[0].metric(*where, attack="loss").high


def test_numbers_of_few_seeds_have_students_interval_as_far_as_they_can_reach():
    columns = [[0.2, 0.1], [0.5, 0.6], [0.9, 0.8]]
    seeds = [
        evaluate(
            of(
                "relearning",
                level=4,
                overall={"accuracy": share, "priv": share, "loss": 9 * share},
                num_rows=10,
            ),
            of(per_row={"f1": values, "loss": values}, digest=str(i)),
        )
        for i, (share, values) in enumerate(zip((0.1, 0.5, 0.9), columns, strict=True))
    ]
    found = join(seeds)
    expected = seeds_interval([0.1, 0.5, 0.9])
    assert expected.low < 0 < 1 < expected.high
    ones = {name: found.metric("relearning", "test_forget", name, level=4) for name in ("accuracy", "priv")}
    assert ends(ones["accuracy"]) == pytest.approx((0.5, 0, 1))
    assert ends(ones["priv"]) == pytest.approx((0.5, expected.low, expected.high))
    loss = found.metric("relearning", "test_forget", "loss", level=4)
    assert ends(loss) == pytest.approx((4.5, 0, 9 * expected.high))
    assert {one.over for one in found.metrics} == {"seeds"}


def test_evaluations_that_measured_different_things_are_not_joined():
    with pytest.raises(ValueError, match="no measurement is in all evaluations"):
        join([evaluate(of(per_row={"accuracy": VALUES})), evaluate(of(rows="test_retain", overall={"loss": 1.0}))])
    with pytest.raises(ValueError, match="evaluations is empty"):
        join([])


def test_what_some_seeds_lack_is_left_out_of_the_joined_and_said():
    one, other = of(per_row={"accuracy": VALUES}), of(rows="test_retain", per_row={"accuracy": VALUES})
    lacking = dataclasses.replace(evaluate(one), skipped={"utility test_retain unlearned": "it has diverged"})
    for seeds in ([evaluate(one, other), lacking], [lacking, evaluate(one, other)]):
        found = join(seeds)
        assert {number.rows for number in found.metrics} == {one.rows}
        assert found.skipped == {"utility test_retain unlearned": "of 1 of 2 seeds only; it has diverged"}


def test_evaluations_with_different_settings_are_not_joined():
    def made(seed: int, **changes: object) -> Evaluation:
        settings = {
            **{"seed": seed, "models": {"model": str(seed)}, "names": {"model": f"llama {seed}"}, "versions": seed},
            **{"rows": {"test_forget": seed}, "unrelated_texts": str(seed), "questions": {"forget": str(seed)}},
            **{"max_length": 32, "dtype": "float32", "measures": ("utility",)},
        }
        attacks = {"num_rows": 200, "bits": [8, 4], "min_k_share": 0.2} | changes.pop("attacks", {})
        return evaluate(of(per_row={"accuracy": VALUES}, digest="a"), **settings | {"attacks": attacks} | changes)

    assert join([made(0), made(1), made(2, measures=["utility"])]).metrics[0].num_seeds == 3
    with pytest.raises(ValueError, match=r"different settings: attacks\.num_rows \(200, 200, 100\)\. Evaluate"):
        join([made(0), made(1), made(2, attacks={"num_rows": 100})])
    with pytest.raises(ValueError, match=r"max_length \(32, 64\); dtype \('float32', 'bfloat16'\)\. Evaluate"):
        join([made(0), made(1, max_length=64, dtype="bfloat16")])


def test_evaluations_that_were_saved_by_an_earlier_version_are_joined(tmp_path):
    seeds = []
    for seed in range(2):
        found = evaluate(of(per_row={"accuracy": VALUES}, digest="a"), seed=seed, attacks={"bits": [8]})
        found.save(tmp_path / str(seed))
        seeds.append(Evaluation.load(tmp_path / str(seed)))
    now = evaluate(of(per_row={"accuracy": VALUES}, digest="a"), seed=2, attacks={"bits": (8,), "min_k_share": 0.2})
    assert join([*seeds, now]).metric("utility", "test_forget", "accuracy").num_seeds == 3


# ---- kept and read again ----


def test_what_is_saved_is_json_and_is_read_again_with_what_is_not_finite(tmp_path):
    found = evaluate(
        *membership(),
        of("relearning", "train_forget", level=4, overall={"loss": 2.0, "f1": math.nan, "kl": math.inf}),
        of("kl", "test_retain", per_row={"reverse_kl": [0.1, math.nan]}),
        lr=0.1,
        names=["a"],
    )
    found.skipped["kl"] = "no base: « none »"
    found.save(tmp_path / "new")
    again = Evaluation.load(tmp_path / "new")
    assert (again.settings, again.skipped) == (found.settings, found.skipped)
    assert list(map(repr, again.metrics)) == list(map(repr, found.metrics))  # NaN is not equal to itself
    assert list(map(repr, again.measurements)) == list(map(repr, found.measurements))
    assert any(math.isnan(one.value) for one in again.metrics)
    assert math.isinf(again.metric("relearning", "train_forget", "kl", level=4).value)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "new" / EVALUATION_NAME).read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse)["settings"] == {"lr": 0.1, "names": ["a"]}
    for line in (tmp_path / "new" / MEASUREMENTS_NAME).read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)


def test_an_evaluation_that_did_not_end_is_not_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {EVALUATION_NAME}"):
        Evaluation.load(tmp_path)


def test_a_last_line_that_was_cut_off_is_left_out_and_another_is_an_error(tmp_path):
    found = evaluate(of(per_row={"accuracy": VALUES}), of(rows="test_retain", per_row={"accuracy": VALUES}))
    found.save(tmp_path)
    path = tmp_path / MEASUREMENTS_NAME
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:-20]}", encoding="utf-8")
    assert read_measurements(path) == found.measurements[:1]
    path.write_text(f"{lines[0][:-20]}\n{lines[1]}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of .* is no JSON, and not the last"):
        read_measurements(path)
    assert read_measurements(tmp_path / "none.jsonl") == []


def test_numbers_are_found_by_what_they_are_of_and_a_miss_names_what_there_is():
    found = evaluate(
        of(model="unlearned", per_row={"loss": [1.0, 2.0]}), of(model="detached", per_row={"loss": [0.0]})
    )
    assert found.models == ["unlearned", "detached"]
    assert found.metric("utility", "test_forget", "loss", "detached").value == 0
    with pytest.raises(KeyError, match=r"no 'loss' of .*'retrained'.* there are .*'detached'"):
        found.metric("utility", "test_forget", "loss", "retrained")


def test_numbers_that_are_given_are_kept_as_they_are():
    given = MetricValue("utility", "test_forget", "unlearned", "", None, "accuracy", 0.1)
    measured = of(per_row={"accuracy": VALUES})
    assert Evaluation({}, [measured], {}, [given]).metrics == [given]
    assert dataclasses.replace(evaluate(measured), metrics=[]).metrics[0].value == 3 / 8
