"""Every measure of an evaluation against the plain function, called by hand on the same rows and models."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from helpers import Counting, make_collator, probed, rows, scored
from small_evaluations import (
    ATTACKS,
    INPUTS,
    SEED,
    assert_metrics,
    assert_unchanged,
    halves,
    learned,
    make_model,
    make_splits,
    measured,
    per_row,
    questions,
    snapshot,
)

import spul
import spul.evaluation.aggregation as aggregation
from spul import SoftPromptUnlearner, UnlearningLayers
from spul.evaluation.attack_settings import AttackSettings
from spul.evaluation.attacks import (
    attack_inputs,
    linear_probe,
    quantized,
    relearn,
    sampled_success,
    soft_suffix,
)
from spul.evaluation.measures import MEASURES
from spul.evaluation.metrics import (
    attack_scores,
    auc,
    forget_quality,
    kl_to,
    model_utility,
    perplexity,
    score_questions,
    text_losses,
)
from spul.evaluation.metrics.scoring import score_completions
from spul.evaluation.metrics.table import METRICS
from spul.evaluation.results import Evaluation

TRAINABLES = ("prompt_tuning", "prefix_tuning", "layers", "lora", "whole")
ASKED = ("prompt_tuning", "whole")  # TOFU's questions, which take their time
QUESTION_SETS = ("forget", "retain", "real_authors", "world_facts")
TEXTS = ["the plot of the film is about jane doe .", "text", "good and bad"]


@dataclass
class Case:
    """An evaluation, and what it was of."""

    found: Evaluation
    models: dict[str, Any]  # the detached one built anew
    before: dict[str, Any]
    after: dict[str, Any]


@cache
def case(trainable: str) -> Case:
    """Everything there is to measure, once for each trainable; the models are left in training mode meanwhile."""
    model, retrained, reference = make_model(trainable).train(), learned(0.1, 1).train(), learned(0.1, 2)
    base = learned().requires_grad_(False) if trainable == "whole" else None
    given = {"model": model, "retrained": retrained, "reference": reference}
    given |= {} if base is None else {"base": base}
    before = {name: snapshot(one) for name, one in given.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "NUM_RESAMPLES", 20)
        found = spul.evaluate(
            splits=make_splits(),
            collator=make_collator(),
            neighbors={"surname": rows("doe film", 5)},
            unrelated_texts=TEXTS,
            questions={name: questions(name) for name in QUESTION_SETS} if trainable in ASKED else None,
            attacks=ATTACKS,
            batch_size=4,
            max_new_tokens=5,
            seed=SEED,
            progress=False,
            **given,
        )
    after = {name: snapshot(one) for name, one in given.items()}
    return Case(found, {"unlearned": model, "detached": learned(), "retrained": retrained}, before, after)


@pytest.fixture(params=TRAINABLES)
def trainable(request) -> str:
    return request.param


# ---- as they are ----


def test_the_models_are_afterwards_what_they_were(trainable):
    one = case(trainable)
    for name in one.before:
        assert_unchanged(one.before[name], one.after[name])
    assert one.before["model"]["modes"][""] is True


def test_every_metric_and_measure_is_in_its_table(trainable):
    found = case(trainable).found
    assert {one.name for one in found.metrics} <= METRICS.keys()
    for one in found.metrics:
        assert one.rows in (MEASURES[one.measure].rows or ["surname"])
        assert one.name in MEASURES[one.measure].metrics
    asked = trainable in ASKED  # else there are no questions
    assert list(dict.fromkeys(one.measure for one in found.measurements)) == [
        name for name in MEASURES if asked or name != "questions"
    ]


def test_utility_is_what_score_completions_gives(trainable):
    one, shares = case(trainable), set()
    assert one.found.models == ["unlearned", "detached", "retrained"]
    for name, model in one.models.items():
        for split, some in make_splits().items():
            scores = score_completions(model, some, make_collator())
            assert_metrics(one.found, scores, measure="utility", rows=split, model=name)
            shares |= {scores["accuracy"], scores["generic"], scores["f1"]}
    assert len(shares) > 5  # or this could not tell one model from another


def test_kl_is_to_the_base(trainable):
    one, base = case(trainable), learned()
    for split in ("train_retain", "test_retain"):
        for name in ("unlearned", "retrained"):
            kl = kl_to(one.models[name], make_splits()[split], make_collator().encoder, base)
            found = per_row(one.found, "kl", split, name, "")
            np.testing.assert_allclose(found["reverse_kl"], kl["reverse_kl"], rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(found["forward_kl"], kl["forward_kl"], rtol=1e-4, atol=1e-7)
            assert kl["reverse_kl"].min() > 1e-5
    assert not [x for x in one.found.measurements if x.measure == "kl" and x.model == "detached"]


def test_the_reference_model_reads_each_set_once_for_all_models():
    reference = learned(0.1, 2)
    counting, splits = Counting(reference), make_splits()
    measured(make_model("prompt_tuning"), "membership", reference=reference, retrained=learned(0.1, 1))
    assert counting.rows == len(splits["train_forget"]) + len(splits["test_forget"])


@pytest.mark.parametrize("given", [False, True])
def test_the_base_reads_each_retain_set_once_for_the_kl_of_all_models(given):
    model, splits = make_model("prompt_tuning"), make_splits()
    base = learned(0.1, 2)
    counting = Counting(base if given else model.get_base_model())
    probed(model)
    counting.rows = 0
    found = measured(model, "kl", retrained=learned(0.1, 1), base=base if given else None)
    num = len(splits["train_retain"]) + len(splits["test_retain"])
    assert counting.rows == (num if given else 2 * num)  # the model's own base also reads them behind the prompt
    assert {(one.rows, one.model) for one in found.measurements} == {
        (rows, name) for rows in ("train_retain", "test_retain") for name in ("unlearned", "retrained")
    }


def test_membership_scores_are_those_of_attack_scores_and_auc_of_them(trainable):
    one, splits, reference = case(trainable), make_splits(), learned(0.1, 2)
    aucs = {}
    for name, model in one.models.items():
        members, others = (
            attack_scores(model, splits[split], make_collator().encoder, reference, "model")
            for split in ("train_forget", "test_forget")
        )
        assert list(members) == ["loss", "zlib", "min_k", "min_k++", "reference", "gradient_norm"]
        for rows_name, scores in (("train_forget", members), ("unseen", others)):
            found = per_row(one.found, "membership", rows_name, name, "")
            assert list(found) == list(members)
            for attack, values in scores.items():
                np.testing.assert_allclose(found[attack], values, rtol=1e-4, atol=1e-5, err_msg=attack)
        for attack in members:
            where = {"measure": "membership", "rows": "train_forget", "model": name, "attack": attack}
            aucs[name, attack] = auc(members[attack], others[attack])
            assert_metrics(one.found, {"auc": aucs[name, attack]}, **where)
            if name != "retrained":
                found_difference = one.found.metric(name="auc_difference", **where).value
                theirs = one.found.metric(**where | {"name": "auc", "model": "retrained"}).value
                assert found_difference == pytest.approx(aucs[name, attack] - theirs)


def test_neighbors_and_running_text_are_scored_as_by_hand(trainable):
    one = case(trainable)
    for name, model in one.models.items():
        scores = score_completions(model, rows("doe film", 5), make_collator())
        assert_metrics(one.found, scores, measure="neighbors", rows="surname", model=name)
        losses = text_losses(model, TEXTS, make_collator().encoder, 32)
        where = {"measure": "unrelated text", "rows": "unrelated text", "model": name}
        assert_metrics(one.found, {"perplexity": perplexity(losses)}, **where)


@pytest.mark.parametrize("trainable", ASKED)
def test_questions_give_scores_model_utility_and_forget_quality(trainable):
    one, ratios = case(trainable), {}
    for name, model in one.models.items():
        scores = {
            of: score_questions(model, questions(of), make_collator().encoder, max_new_tokens=5)
            for of in QUESTION_SETS
        }
        for of, some in scores.items():
            for what, values in some.items():
                found = per_row(one.found, "questions", of, name, "")[what]
                np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-7)
        kept = [scores[of] for of in ("retain", "real_authors", "world_facts")]
        utility = model_utility(*kept)["model_utility"]
        assert_metrics(one.found, {"model_utility": utility}, 1e-4, measure="questions", rows="retain", model=name)
        ratios[name] = scores["forget"]["truth_ratio"]
    for name in ("unlearned", "detached"):
        quality = {"forget_quality": forget_quality(ratios[name], ratios["retrained"])}
        assert_metrics(one.found, quality, measure="questions", rows="forget", model=name)


# ---- under attack ----


def test_input_attacks_are_scored_as_by_attack_inputs(trainable):
    one = case(trainable)
    for split in ("test_forget", "test_retain"):
        records = attack_inputs(one.models, make_splits()[split], INPUTS, make_collator())
        assert len(records) == 9
        for record in records:
            where = {"measure": "input attack", "rows": split, "attack": record.pop("attack")}
            assert_metrics(one.found, record, model=record.pop("model"), **where)


def test_relearning_is_what_relearn_gives_and_not_done_to_the_base(trainable):
    one = case(trainable)
    few, others = halves()
    assert not set(few["prompt"]) & set(others["prompt"])
    for name in ("unlearned", "retrained"):
        lr = 0.003 if name == "retrained" or trainable == "whole" else 0.02
        for record in relearn(one.models[name], few, others, make_collator().encoder, scored, lr, (1, 3), seed=SEED):
            where = {"measure": "relearning", "rows": "train_forget", "level": record.pop("step")}
            assert_metrics(one.found, record, 1e-4, model=name, **where)
    assert {x.model for x in one.found.measurements if x.measure == "relearning"} == {"unlearned", "retrained"}


def test_sampling_soft_suffix_and_probe_are_as_by_hand(trainable):
    one, collator = case(trainable), make_collator()
    few, others = halves(5)
    for name, model in one.models.items():
        for tries in (1, 7):
            success = sampled_success(model, make_splits()["test_forget"], collator.encoder, tries, 0.7).mean()
            where = {"measure": "sampling", "rows": "test_forget", "level": tries}
            assert_metrics(one.found, {"success": success}, 1e-4, model=name, **where)
        probe = linear_probe(model, few, others, collator.encoder, seed=SEED)
        assert_metrics(one.found, probe, measure="linear probe", rows="train_forget", model=name)
        attack, _ = soft_suffix(model, few, others, collator.encoder, 2, 3, 0.1, seed=SEED)
        for stage in ("before", "after", "trained"):
            where = {"measure": "soft suffix", "rows": "train_forget", "attack": stage}
            means = {score: attack[stage][score].mean() for score in ("accuracy", "loss")}
            assert_metrics(one.found, means, 1e-4, model=name, **where)
        assert (attack["after"]["loss"] != attack["before"]["loss"]).all()


def test_quantized_is_the_same_prompt_on_the_base_in_four_bit(tmp_path, trainable):
    one = case(trainable)
    small = {"retrained": save_and_quantize(one.models["retrained"], tmp_path / "retrained")}
    if trainable == "lora":
        for name in ("unlearned", "detached"):
            assert "merge_and_unload" in one.found.skipped[f"quantized, {name}"]
    else:
        small["detached"] = save_and_quantize(learned(), tmp_path / "base")
    if trainable == "whole":
        small["unlearned"] = save_and_quantize(one.models["unlearned"], tmp_path / "whole")
    elif trainable != "lora":
        kind = UnlearningLayers if trainable == "layers" else SoftPromptUnlearner
        one.models["unlearned"].save_pretrained(str(tmp_path / "adapter"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*trained on other weights")
            small["unlearned"] = kind.from_pretrained(
                save_and_quantize(learned(), tmp_path / "base"), str(tmp_path / "adapter")
            )
    for name, model in small.items():
        for split in ("test_forget", "test_retain"):
            scores = score_completions(model, make_splits()[split], make_collator())
            where = {"measure": "quantized", "rows": split, "model": name, "level": 4}
            assert_metrics(one.found, scores, 1e-4, **where)
            whole = score_completions(one.models[name], make_splits()[split], make_collator())
            assert abs(whole["loss"] - scores["loss"]) > 1e-4  # or nothing was quantized
    assert {x.model for x in one.found.measurements if x.measure == "quantized"} == set(small)


def save_and_quantize(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder)
    return quantized(folder, 4)


def test_min_k_looks_at_the_share_of_tokens_that_is_asked_for():
    members, unseen = ("good bad plot film by the jane doe", "bad good film plot the by doe jane")
    sets = {
        name: Dataset.from_list([{"prompt": f"{name} {i}", "completion": f" {text} ."} for i in range(2)])
        for name, text in (("train_forget", members), ("test_forget", unseen))
    }
    found = {}
    for share in (0.2, 0.7):
        attacks = dataclasses.replace(ATTACKS, min_k_share=share)
        evaluated = spul.evaluate(
            learned(), make_splits(**sets), make_collator(), measures=["membership"], attacks=attacks, progress=False
        )
        found[share] = per_row(evaluated, "membership", "train_forget", "unlearned", "")
        expected = attack_scores(learned(), sets["train_forget"], make_collator().encoder, share=share)
        for attack, values in expected.items():
            np.testing.assert_allclose(found[share][attack], values, rtol=1e-4, atol=1e-5, err_msg=attack)
        assert evaluated.settings["attacks"]["min_k_share"] == share
    for attack in ("min_k", "min_k++"):
        assert (np.array(found[0.2][attack]) < np.array(found[0.7][attack])).all()
    assert ATTACKS.min_k_share == 0.2


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_of_tokens_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"min_k_share=.*: expected a share of the tokens above 0 and at most 1"):
        AttackSettings(min_k_share=share)
    assert AttackSettings(min_k_share=1).min_k_share == 1


@pytest.mark.parametrize("name", ["relearn_lr", "relearn_model_lr", "suffix_lr", "temperature"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_rates_and_temperatures_of_attacks_are_finite_numbers_above_zero(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*: expected a number above 0"):
        AttackSettings(**{name: value})
