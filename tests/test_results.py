"""Evaluations of several seeds joined, saved and read again."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from measured import VALUES, ends, evaluate, membership, of
from scipy.stats import binomtest

import spul.evaluation.aggregation as aggregation
from spul.evaluation.aggregation import MetricValue
from spul.evaluation.metrics.intervals import joined_interval, seeds_interval
from spul.evaluation.results import EVALUATION_NAME, MEASUREMENTS_NAME, Evaluation, join, read_measurements

RESAMPLES = 200


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(aggregation, "NUM_RESAMPLES", RESAMPLES)


OTHER = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


# ---- joining ----


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
    with pytest.raises(TypeError, match=r"evaluations holds 'out/1'; expected .* Evaluation\.load\(folder\)"):
        join(["out/1", "out/2"])
    with pytest.raises(ValueError, match="evaluations is empty"):
        join([])


def test_what_some_seeds_lack_is_left_out_of_the_joined_and_said():
    one, other = of(per_row={"accuracy": VALUES}), of(rows="test_retain", per_row={"accuracy": VALUES})
    lacking = dataclasses.replace(evaluate(one), skipped={"utility test_retain unlearned": "it has diverged"})
    for seeds in ([evaluate(one, other), lacking], [lacking, evaluate(one, other)]):
        found = join(seeds)
        assert {number.rows for number in found.metrics} == {one.rows}
        assert found.skipped == {"utility test_retain unlearned": "of 1 of 2 seeds only; it has diverged"}


def test_scores_that_some_seeds_lack_are_left_out_of_the_joined_and_said():
    def seed(*attacks: str) -> Evaluation:
        sets = ("train_forget", "unseen")
        return evaluate(
            *(of("membership", rows, per_row=dict.fromkeys(attacks, VALUES)) for rows in sets),
            of("relearning", overall=dict.fromkeys(attacks, 0.5)),
        )

    for seeds in ([seed("loss", "reference"), seed("loss")], [seed("loss"), seed("loss", "reference")]):
        found = join(seeds)
        assert {one.attack for one in found.metrics if one.measure == "membership"} == {"loss"}
        assert {one.name for one in found.metrics if one.measure == "relearning"} == {"loss"}
        names = [f"reference of membership {rows} unlearned" for rows in ("train_forget", "unseen")]
        names.append("reference of relearning test_forget unlearned")
        assert found.skipped == dict.fromkeys(names, "of 1 of 2 seeds only")


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


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize(("inputs", "left"), [(["mine"], {}), (None, {"capitals": "A"})])
def test_examples_by_functions_of_ones_own_that_an_earlier_version_stored_are_not_loaded(
    tmp_path, is_joined, inputs, left
):
    facts = {"base": "b", "attack_examples": {"capitals": "A", "paraphrase": "a row"}}
    settings = {"attacks": {"inputs": inputs}}
    found = Evaluation(settings, [of(per_row={"accuracy": VALUES})], {}, facts=facts)
    (join([found, found]) if is_joined else found).save(tmp_path)
    loaded, kept = Evaluation.load(tmp_path).facts, {"base": "b", "attack_examples": left}
    assert loaded == ({"seeds": [kept, kept]} if is_joined else kept)


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


@pytest.mark.parametrize(
    "line", ["5", "[]", "{}", '{"per_row": 5, "overall": {}}', '{"per_row": {}, "overall": {}, "score": 1}']
)
def test_a_line_of_another_program_is_refused_by_file_and_number(tmp_path, line):
    path = tmp_path / MEASUREMENTS_NAME
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"line 1 of .*measurements\.jsonl is no measurement of spul\.evaluate"):
        read_measurements(path)
    path.write_bytes(b"\xff\xfe\n{}\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no JSON, and not the last"):
        read_measurements(path)


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
