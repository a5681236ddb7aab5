"""TOFU's numbers: from the model to nine means and their harmonic mean, and the KS test."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import prompted
from likelihoods import answer_collator, plain_likelihood
from scipy.stats import hmean, kstest
from small_evaluations import QUESTIONS

from spul.data import QUESTION_ANSWER
from spul.evaluation.metrics import (
    forget_quality,
    generate_answers,
    model_utility,
    rouge_l,
    score_questions,
)


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("paraphrased", [True, False])
def test_scores_of_questions_are_the_formulae_written_out(prompt_type, paraphrased):
    model, collator = prompted(prompt_type=prompt_type), answer_collator()
    questions = [{k: v for k, v in q.items() if paraphrased or not k.startswith("para")} for q in QUESTIONS]
    found = score_questions(model, Dataset.from_list(questions), collator.encoder, batch_size=4, max_new_tokens=5)

    def normalized(question, answer):
        row = QUESTION_ANSWER.row({"question": question, "answer": answer})
        return np.exp(np.mean(plain_likelihood(model, row, collator)["log_probs"]))

    for i, q in enumerate(questions):
        right = normalized(q["question"], q["answer"])
        wrong = [normalized(q["question"], text) for text in q["perturbed_answer"]]
        again = normalized(q["question"], q.get("paraphrased_answer", q["answer"]))
        assert found["probability"][i] == pytest.approx(right, rel=1e-5)
        assert found["choice_probability"][i] == pytest.approx(right / (right + sum(wrong)), rel=1e-5)
        assert found["truth_ratio"][i] == pytest.approx(np.mean(wrong) / again, rel=1e-5)
        geometric = np.exp(np.mean(np.log(wrong))) / again
        assert found["truth_ratio_geometric"][i] == pytest.approx(geometric, rel=1e-5)
    asked = Dataset.from_list([QUESTION_ANSWER.row(q) for q in questions])
    said = generate_answers(model, asked, collator.encoder, max_new_tokens=5)
    np.testing.assert_array_equal(
        found["rouge_l_recall"], rouge_l(said, [q["answer"] for q in questions])["rouge_l_recall"]
    )


def test_bad_questions_raise():
    model, collator = prompted(dtype=torch.float32), answer_collator()
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['perturbed_answer'\]"):
        score_questions(model, Dataset.from_list([{"question": "a", "answer": "b"}]), collator.encoder)
    empty = {"question": "a", "answer": "b", "perturbed_answer": []}
    with pytest.raises(ValueError, match="one or more texts"):
        score_questions(model, Dataset.from_list([empty]), collator.encoder)


def scores(seed):
    draws = np.random.default_rng(seed)
    shares = ("probability", "choice_probability", "rouge_l_recall")
    return {**{name: draws.uniform(0.1, 0.9, 10) for name in shares}, "truth_ratio": draws.uniform(0, 2, 10)}


def test_model_utility_is_the_harmonic_mean_of_nine():
    retain, authors, facts = scores(0), scores(1), scores(2)
    found = model_utility(retain, authors, facts)
    nine = [retain["probability"].mean()]
    nine += [s["choice_probability"].mean() for s in (authors, facts)]
    nine += [s["rouge_l_recall"].mean() for s in (retain, authors, facts)]
    nine += [np.clip(1 - s["truth_ratio"], 0, None).mean() for s in (retain, authors, facts)]
    assert found["model_utility"] == pytest.approx(9 / sum(1 / x for x in nine))
    assert len(found) == 10
    assert found["model_utility"] == pytest.approx(hmean([v for k, v in found.items() if k != "model_utility"]))
    ruined = {**retain, "probability": retain["probability"] * 0}
    assert model_utility(ruined, authors, facts)["model_utility"] == 0


def test_forget_quality_is_the_p_value_of_a_ks_test():
    draws = np.random.default_rng(0)
    same, other = draws.normal(1, 0.2, 80), draws.normal(1, 0.2, 90)
    assert forget_quality(same, other) == pytest.approx(kstest(same, other).pvalue)
    assert forget_quality(same, other) > 0.05
    assert forget_quality(same, other - 0.5) < 1e-6
    assert forget_quality(same, other + 0.5) < 1e-6  # made too unlikely: as bad
    # By hand: three values all below three others. Of the 20 orders two are as far apart as that.
    assert forget_quality(np.array([1.0, 2, 3]), np.array([4.0, 5, 6])) == pytest.approx(2 / 20)
    with pytest.raises(ValueError, match="no NaN"):
        forget_quality(same, np.array([np.nan]))
