"""TOFU's metrics of questions that come with wrong answers: model utility and forget quality."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from datasets import Dataset
from scipy.stats import hmean, ks_2samp
from torch import nn

from ...data.checks import check_rows
from ...data.encoder import RowEncoder
from ...data.formats import QUESTION_ANSWER, PromptFormat
from ...data.rows import column_values, read_rows
from .free_form import generate_answers, rouge_l
from .likelihood import check_has_likelihoods, probability, response_likelihoods, truth_ratio, truth_ratio_on_retain


def question_rows(
    questions: Dataset, prompt_format: PromptFormat = QUESTION_ANSWER, name: str = "questions"
) -> tuple[list[dict[str, str]], list[range]]:
    """The rows that `score_questions` scores: each question with its answer, its paraphrased one and the wrong ones.

    Args:
        questions: as in `score_questions`.
        prompt_format: likewise.
        name: their name in messages.

    Returns:
        The rows, and of each question the range of its own.

    Raises:
        TypeError: if `questions` is not a `datasets.Dataset`.
        ValueError: if columns are missing, an answer is no text, or a question has no perturbed answer.
    """
    check_rows(questions, ("question", "answer", "perturbed_answer"), name)
    rows: list[dict[str, str]] = []
    blocks: list[range] = []
    for question in read_rows(questions):
        others = question["perturbed_answer"]
        if not isinstance(others, list) or not others:
            raise ValueError(
                f"{name}: perturbed_answer={others!r}; expected a list of one or more texts: {dict(question)!r}"
            )
        answers = [question["answer"], question.get("paraphrased_answer", question["answer"]), *others]
        if bad := [answer for answer in answers if not isinstance(answer, str)]:
            raise ValueError(
                f"{name}: {bad[0]!r} is among the answers of a question, {dict(question)!r}; expected texts. Drop it, "
                "or fill it in."
            )
        blocks.append(range(len(rows), len(rows) + len(answers)))
        rows += [prompt_format.row({**question, "answer": answer}) for answer in answers]
    return rows, blocks


def score_questions(
    model: nn.Module,
    questions: Dataset,
    encoder: RowEncoder,
    prompt_format: PromptFormat = QUESTION_ANSWER,
    batch_size: int = 32,
    max_new_tokens: int = 200,
    progress: str | None = None,
) -> dict[str, np.ndarray]:
    """Probability, ROUGE-L recall and truth ratio of TOFU's questions, each in its first wording.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        questions: one of TOFU's perturbed files: `question`, `answer`, `perturbed_answer` (a list of texts) and, for
            its invented authors, `paraphrased_answer`. Without that column, as for real authors and world facts, the
            truth ratio uses the answer itself, as TOFU does.
        encoder: turns rows into token ids.
        prompt_format: turns a question and an answer into a prompt and a completion; as in training.
        batch_size: rows per forward pass.
        max_new_tokens: maximum length of a generated answer, in tokens.
        progress: label of the progress bars; None shows none.

    Returns:
        (questions,) each: `probability`, `P(y|x)^(1/|y|)` of the answer; `choice_probability`, the answer's share of
        the sum of that over it and all perturbed answers; `rouge_l_recall` of the greedily generated answer; all in
        0..1; `truth_ratio`, `R_truth`, 0 or more, and `truth_ratio_geometric`, the same by TOFU's program.

    Raises:
        ImportError: if `rouge-score` is not installed.
        TypeError: if the model answers with a fixed text, which has no truth ratio.
        ValueError: if columns are missing, an answer is no text, or a question has no perturbed answer.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2. `choice_probability` uses
    length-normalized probabilities, as in TOFU's program; as printed it uses whole answers, which favors short ones.
    """
    rows, blocks = question_rows(questions, prompt_format)
    check_has_likelihoods(model)
    likelihoods = response_likelihoods(model, Dataset.from_list(rows), encoder, batch_size, progress)
    each = probability(likelihoods)
    right = np.array([each[block[0]] for block in blocks])
    among = np.array([each[block[0]] / each[[block[0], *block[2:]]].sum() for block in blocks])
    again, wrong = [likelihoods[b[1]] for b in blocks], [[likelihoods[i] for i in b[2:]] for b in blocks]
    asked = Dataset.from_list([rows[block[0]] for block in blocks])
    answers = generate_answers(model, asked, encoder, batch_size, max_new_tokens, progress)
    return {
        "probability": right,
        "choice_probability": among,
        "rouge_l_recall": rouge_l(answers, column_values(questions, "answer"))["rouge_l_recall"],
        "truth_ratio": truth_ratio(again, wrong),
        "truth_ratio_geometric": truth_ratio(again, wrong, mean="geometric"),
    }


def model_utility(
    retain: Mapping[str, np.ndarray], real_authors: Mapping[str, np.ndarray], world_facts: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """TOFU's model utility: the harmonic mean of nine metrics, in 0..1; higher is better.

    Of each of the three sets: the mean probability (among the choices for real authors and world facts), the mean
    ROUGE-L recall, and the mean of `max(0, 1 - R_truth)`. One metric near 0 brings the utility near 0.

    Args:
        retain, real_authors, world_facts: scores of each set, as `score_questions` returns them.

    Returns:
        The nine metrics by name, such as `retain_probability`, and `model_utility`.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2
    """
    metrics = {}
    for name, scores in (("retain", retain), ("real_authors", real_authors), ("world_facts", world_facts)):
        probability = scores["probability" if name == "retain" else "choice_probability"]
        metrics[f"{name}_probability"] = float(probability.mean())
        metrics[f"{name}_rouge_l_recall"] = float(scores["rouge_l_recall"].mean())
        metrics[f"{name}_truth_ratio"] = truth_ratio_on_retain(scores["truth_ratio"])
    return {**metrics, "model_utility": float(hmean(list(metrics.values())))}


def forget_quality(ratios: np.ndarray, retrained_ratios: np.ndarray) -> float:
    """TOFU's forget quality: the p-value of a Kolmogorov-Smirnov test that two models' truth ratios are alike.

    Higher is better: at 0.05 and above the test does not distinguish the unlearned model from the retrained one. The
    fewer the questions, the weaker the test. TOFU reports the logarithm.

    Args:
        ratios: `R_truth` of the forget set's questions under the unlearned model, (questions,).
        retrained_ratios: the same under a model trained without the forget set.

    Raises:
        ValueError: if one of them is empty or has NaN.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2
    """
    both = [np.asarray(some, dtype=np.float64) for some in (ratios, retrained_ratios)]
    if any(some.ndim != 1 or len(some) == 0 or np.isnan(some).any() for some in both):
        raise ValueError(
            f"truth ratios of the shapes {[some.shape for some in both]}; expected (questions,) of both models, at "
            "least one question, no NaN."
        )
    return float(ks_2samp(*both).pvalue)
