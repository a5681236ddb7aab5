"""TOFU's two numbers, of questions with wrong answers beside the right one: model utility and forget quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from scipy.stats import hmean, ks_2samp
from torch import nn

from ...data.checks import check_rows
from ...data.collator import ForgetRetainCollator
from ...data.formats import QUESTION_ANSWER, PromptFormat
from .free_form import generate_answers, rouge_l
from .likelihood import probability, response_likelihoods, truth_ratio, truth_ratio_on_retain


@dataclass(frozen=True)
class QuestionScores:
    """What is measured of each question, arrays of (questions,).

    Attributes:
        probability: of the answer, `P(y|x)^(1/|y|)`.
        choice_probability: the answer's share of that among it and the wrong answers:
            `P(y|x)^(1/|y|) / sum of the same over y and all perturbed answers`.
        rouge_l_recall: of the answer that greedy decoding gives.
        truth_ratio: `R_truth`.
    """

    probability: np.ndarray
    choice_probability: np.ndarray
    rouge_l_recall: np.ndarray
    truth_ratio: np.ndarray


def score_questions(
    model: nn.Module,
    questions: Dataset,
    collator: ForgetRetainCollator,
    prompt_format: PromptFormat = QUESTION_ANSWER,
    batch_size: int = 32,
    max_new_tokens: int = 200,
    progress: str | None = None,
) -> QuestionScores:
    """Probability, ROUGE-L recall and truth ratio of TOFU's questions, each in its first wording.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        questions: one of TOFU's perturbed files: `question`, `answer`, `perturbed_answer` (a list of texts) and, for
            its invented authors, `paraphrased_answer`. Where that column is not there, as for real authors and world
            facts, the truth ratio takes the answer itself, as TOFU does.
        collator: for tokenizing and padding.
        prompt_format: how a question and an answer become a prompt and a completion; as in training.
        batch_size: rows per forward.
        max_new_tokens: of a generated answer.
        progress: a name to show progress bars under; none unless given.

    Raises:
        ImportError: if `rouge-score` is not installed.
        ValueError: if columns are missing, or a question has no perturbed answer.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2. The probability among choices is of
    normalized probabilities, as in TOFU's program; as printed it is of whole answers, which favors short ones.
    """
    check_rows(questions, ("question", "answer", "perturbed_answer"), "questions")
    rows: list[dict[str, str]] = []
    blocks: list[range] = []
    for question in questions:
        wrong = question["perturbed_answer"]
        if isinstance(wrong, str) or not wrong:
            raise ValueError(f"perturbed_answer={wrong!r}; expected a list of one or more texts: {dict(question)!r}")
        answers = [question["answer"], question.get("paraphrased_answer", question["answer"]), *wrong]
        blocks.append(range(len(rows), len(rows) + len(answers)))
        rows += [prompt_format.row({**question, "answer": answer}) for answer in answers]
    likelihoods = response_likelihoods(model, Dataset.from_list(rows), collator, batch_size, progress)
    each = probability(likelihoods)
    right = np.array([each[block[0]] for block in blocks])
    among = np.array([each[block[0]] / each[[block[0], *block[2:]]].sum() for block in blocks])
    ratios = truth_ratio([likelihoods[b[1]] for b in blocks], [[likelihoods[i] for i in b[2:]] for b in blocks])
    asked = Dataset.from_list([rows[block[0]] for block in blocks])
    said = generate_answers(model, asked, collator, batch_size, max_new_tokens, progress)
    return QuestionScores(right, among, rouge_l(said, questions["answer"]).recall, ratios)


def model_utility(
    retain: QuestionScores, real_authors: QuestionScores, world_facts: QuestionScores
) -> dict[str, float]:
    """TOFU's model utility: the harmonic mean of nine numbers, in 0..1; higher is better.

    Of each of the three sets: the mean probability (among the choices for real authors and world facts), the mean
    ROUGE-L recall, and the mean of `max(0, 1 - R_truth)`. One number near 0 brings the utility near 0.

    Returns:
        The nine numbers by name, such as `retain_probability`, and `model_utility`.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2.1
    """
    numbers = {}
    for name, scores in (("retain", retain), ("real_authors", real_authors), ("world_facts", world_facts)):
        likely = scores.probability if name == "retain" else scores.choice_probability
        numbers[f"{name}_probability"] = float(likely.mean())
        numbers[f"{name}_rouge_l_recall"] = float(scores.rouge_l_recall.mean())
        numbers[f"{name}_truth_ratio"] = truth_ratio_on_retain(scores.truth_ratio)
    return {**numbers, "model_utility": float(hmean(list(numbers.values())))}


def forget_quality(ratios: np.ndarray, retrained_ratios: np.ndarray) -> float:
    """TOFU's forget quality: the p-value of a Kolmogorov-Smirnov test that two models' truth ratios are alike.

    Higher is better: at 0.05 and above the unlearned model is not told apart from the retrained one. It says so the
    more easily, the fewer questions there are. TOFU writes it as its logarithm.

    Args:
        ratios: `R_truth` of the forget set's questions by the unlearned model, (questions,).
        retrained_ratios: the same by a model trained without the forget set.

    Raises:
        ValueError: if one of them is empty or has NaN.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2.2
    """
    both = [np.asarray(some, dtype=np.float64) for some in (ratios, retrained_ratios)]
    if any(some.ndim != 1 or len(some) == 0 or np.isnan(some).any() for some in both):
        raise ValueError(
            f"truth ratios of the shapes {[some.shape for some in both]}; expected (questions,) of both models, at "
            "least one question, no NaN."
        )
    return float(ks_2samp(*both).pvalue)
