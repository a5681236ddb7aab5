"""Likelihood of each row's response, token by token, and the metrics computed from it.

One pass gives the log-probabilities of a response's own tokens. Probability, truth ratio, extraction strength, exact
memorization and the attacks of `membership.py` are functions of them. Only response tokens count: no padding, no
prompt text, no virtual token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from scipy.special import logsumexp
from torch import Tensor, nn

from ...data.checks import check_rows
from ...data.encoder import RowEncoder
from ...losses.terms import KLDivergence, as_float
from ...models.causal_lm import evaluation_mode, unwrapped
from ...models.compat_devices import device_of
from ...models.unlearner import unlearner_of
from .batches import ResponseBatch, map_responses
from .scoring import check_not_diverged, response_logits

REVERSE, FORWARD = KLDivergence(direction="reverse"), KLDivergence(direction="forward")


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Log-probabilities of the `|y|` response tokens of one row, each given the prompt and the tokens before it.

    Attributes:
        log_probs: (|y|,), log p of each response token, in nats.
        is_greedy: (|y|,), whether the token is the most likely one at its position.
        mean: (|y|,), mean of log p over the vocabulary at each position, weighted by p.
        std: (|y|,), standard deviation of log p there, weighted by p.
    """

    log_probs: np.ndarray
    is_greedy: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def check_has_likelihoods(model: nn.Module) -> None:
    """Raise for a model whose likelihoods cannot be compared with others.

    Raises:
        TypeError: if it answers some requests with a fixed text.
    """
    if unlearner_of(model).answers_fixed:
        raise TypeError(
            f"a {type(unwrapped(model)).__name__} answers some requests with a fixed text, whose tokens have "
            "probability 1 and all others 0: comparisons of likelihoods say nothing of it. Measure its answers."
        )


@torch.no_grad()
def response_likelihoods(
    model: nn.Module, rows: Dataset, encoder: RowEncoder, batch_size: int = 32, progress: str | None = None
) -> list[Likelihood]:
    """Likelihood of each row's response, in one pass over the rows.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt; inside `disable_adapter()` it is the base.
        rows: `prompt` and `completion`, or tokenized.
        encoder: turns rows into token ids.
        batch_size: rows per forward pass; batches hold rows of similar length.
        progress: label of a progress bar; None shows none.

    Returns:
        One `Likelihood` per row, in the order of the rows, in float32 (float64 for a model in float64).

    Raises:
        TypeError: if `rows` is not a `datasets.Dataset`.
        ValueError: if there are no rows, or the model's logits are NaN or infinite.
    """
    check_rows(rows, columns=())
    model = unwrapped(model)

    def measure(batch: ResponseBatch) -> Iterator[Likelihood]:
        logits = response_logits(model, batch.inputs, batch.positions, batch.adapter_names)
        for row in range(len(batch.indices)):
            num = batch.num_tokens(row)
            yield _likelihood(logits[row, :num], batch.targets[row, :num])

    return map_responses(model, rows, encoder, measure, batch_size, progress)


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in at least float32."""
    check_not_diverged(logits)
    return as_float(logits).log_softmax(dim=-1)


def _likelihood(logits: Tensor, targets: Tensor) -> Likelihood:
    """Likelihood of one row from its logits (|y|, V) and targets (|y|,)."""
    targets = targets.to(logits.device)
    log_p = _log_softmax(logits)
    p, finite = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # tokens of probability 0 have no weight
    mean = (p * finite).sum(dim=-1)
    std = (p * (finite - mean[:, None]).square()).sum(dim=-1).sqrt()
    own = log_p.gather(1, targets[:, None])[:, 0]
    is_greedy = logits.argmax(dim=-1) == targets
    # Copies: an array of torch's holds a tensor, and of many rows there are many.
    log_probs, means, stds = torch.stack((own, mean, std)).cpu().numpy().copy()
    return Likelihood(log_probs, is_greedy.cpu().numpy().copy(), means, stds)


@torch.no_grad()
def kl_to(
    model: nn.Module,
    rows: Dataset,
    encoder: RowEncoder,
    reference: nn.Module | None = None,
    batch_size: int = 16,
    progress: str | None = None,
) -> dict[str, np.ndarray]:
    """KL divergences of a model from a reference at the response tokens. On retain rows lower is better.

    For each row, with `y` its own response: `reverse_kl = mean over k of KL(p(.|x, y_<k) || p0(.|x, y_<k))` and
    `forward_kl` with p and p0 exchanged. A mean per token; the KL term of `UnlearningLoss` sums up to three.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        encoder: turns rows into token ids.
        reference: the model to compare with; None for the base under the prompt, layers or LoRA.
        batch_size: rows per forward pass.
        progress: label of a progress bar; None shows none.

    Returns:
        `reverse_kl` and `forward_kl`, (rows,) each, in nats per token.

    Raises:
        TypeError: if `rows` is not a `datasets.Dataset`, or the model answers with a fixed text.
        ValueError: if there are no rows, no `reference` is given for a model whose own weights are trained, or the
            two vocabularies differ in size.

    Source: Bhaila et al., *Soft Prompting for Unlearning*, https://arxiv.org/abs/2406.12038, eq. 4 (the KL to the base
    on retain rows)
    """
    return kl_of_models([model], rows, encoder, reference, batch_size, progress)[0]


@torch.no_grad()
def kl_of_models(
    models: Sequence[nn.Module],
    rows: Dataset,
    encoder: RowEncoder,
    reference: nn.Module | None = None,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[dict[str, np.ndarray]]:
    """`kl_to` of several models from one reference, which passes once over the rows for all of them.

    Args:
        models: at least one, each on its own device.
        rows: this and the others as in `kl_to`.
        reference: None for the base under the first model.

    Raises:
        TypeError: as `kl_to`.
        ValueError: as `kl_to`; with one model diverged, none is measured.
    """
    check_rows(rows, columns=())
    for one in models:
        check_has_likelihoods(one)
    model = models[0]
    if reference is None and unlearner_of(model).trains_base:
        raise ValueError(
            "the model's own weights are trained, so disabling its adapter does not restore it: pass reference, the "
            "model before unlearning."
        )
    bare = [unwrapped(one) for one in models]
    other = bare[0] if reference is None else unwrapped(reference)

    def run(one: nn.Module, batch: ResponseBatch, names: list[str] | None = None) -> Tensor:
        device = device_of(one)
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        return response_logits(one, inputs, batch.positions.to(device), names)

    def reference_logits(batch: ResponseBatch) -> Tensor:
        if reference is not None:
            return run(other, batch)
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        return unlearner_of(other).base_logits(**inputs, positions=batch.positions)

    def measure(batch: ResponseBatch) -> list[list[tuple[float, float]]]:
        others = reference_logits(batch)
        found = [list(_divergences(run(one, batch, batch.adapter_names), others, batch)) for one in bare]
        return [list(row) for row in zip(*found, strict=True)]

    with ExitStack() as stack:
        for one in (*bare[1:], other):
            stack.enter_context(evaluation_mode(one))
            stack.enter_context(unlearner_of(one).cached_prompts())
        found = np.array(map_responses(bare[0], rows, encoder, measure, batch_size, progress))
    return [{"reverse_kl": one[:, 0], "forward_kl": one[:, 1]} for one in found.transpose(1, 0, 2)]


def _divergences(logits: Tensor, others: Tensor, batch: ResponseBatch) -> Iterator[tuple[float, float]]:
    """Reverse and forward KL of each row of a batch, from its logits (B, K, V) and the reference's."""
    if others.shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"the model has logits for {logits.shape[-1]} tokens, the reference for {others.shape[-1]}; "
            "expected two models with one vocabulary."
        )
    for row in range(len(batch.indices)):
        num = batch.num_tokens(row)
        log_p = _log_softmax(logits[row, :num])
        log_p0 = _log_softmax(others[row, :num]).to(log_p)
        reverse, forward = (term.token_losses(log_p, log_p, log_p0).mean() for term in (REVERSE, FORWARD))
        yield float(reverse), float(forward)


# ---- metrics ----


def probability(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """Probability of each response, normalized for its length: `P(y|x)^(1/|y|)`, in 0..1.

    Higher is better on retain rows; on forget rows low, as low as the retrained model's and not lower.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2
    """
    return np.exp(mean_log_probs(likelihoods))


def mean_log_probs(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """`log P(y|x) / |y|` of each response, in nats per token."""
    return np.array([found.log_probs.mean(dtype=np.float64) for found in likelihoods])


def truth_ratio(
    paraphrased: Sequence[Likelihood],
    perturbed: Sequence[Sequence[Likelihood]],
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
) -> np.ndarray:
    """Likelihood of wrong answers relative to a paraphrase of the right one: TOFU's `R_truth`, 0 or more.

    `R = (1/m sum_i P(y_i|x)^(1/|y_i|)) / P(y'|x)^(1/|y'|)`, with y_i the m perturbed answers and y' the paraphrased
    one: the arithmetic mean, as printed. Some programs invert the ratio. A model that knows the answer has R near 0,
    one that never knew it about 1, one that avoids it above 1.

    Args:
        paraphrased: one per question.
        perturbed: the wrong answers of each question, one or more.
        mean: over the wrong answers; `"geometric"` is that of TOFU's program, which averages their losses (for its
            model utility, in one of two places).

    Raises:
        ValueError: if `mean` is neither, the numbers of questions differ, or one has no wrong answer.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, eq. 1; for the difference between paper and program
    https://github.com/locuslab/open-unlearning/issues/26
    """
    if len(paraphrased) != len(perturbed) or not all(len(wrong) for wrong in perturbed):
        raise ValueError(
            f"{len(paraphrased)} paraphrased answers, and {[len(wrong) for wrong in perturbed]} perturbed ones; "
            "expected one or more perturbed answers for each paraphrased one."
        )
    if mean not in (known := ("arithmetic", "geometric")):
        raise ValueError(f"mean={mean!r}; expected one of {known}.")
    each = [mean_log_probs(some) for some in perturbed]
    means = [one.mean() if mean == "geometric" else logsumexp(one) - np.log(len(one)) for one in each]
    return np.exp(np.array(means) - mean_log_probs(paraphrased))


def truth_ratio_on_forget(ratios: np.ndarray) -> float:
    """TOFU's truth ratio of a forget set: mean of `min(R, 1/R)`, in 0..1; 1, neither known nor avoided, is best.

    Source: TOFU's program, https://github.com/locuslab/tofu. The paper compares whole distributions: `forget_quality`.
    """
    ratios = np.asarray(ratios, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratios, 1 / ratios).mean())


def truth_ratio_on_retain(ratios: np.ndarray) -> float:
    """TOFU's truth ratio of a retain set: mean of `max(0, 1 - R)`, in 0..1; higher is better.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2
    """
    return float(np.maximum(0.0, 1 - np.asarray(ratios, dtype=np.float64)).mean())


def extraction_strength(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """Share of a response that greedy decoding completes by itself: 0..1; low is better on forget rows.

    `1 - k/|y|`, with k the smallest number of leading response tokens after which every further token is the most
    likely one. It is 1 if the prompt alone suffices, and 0 if even the last token must be given (k = |y|).

    Source: the program of open-unlearning, https://arxiv.org/abs/2506.12618, which stops at k = |y| - 1 and so never
    returns less than 1/|y|; the metric is that of Wang et al., *Towards Effective Evaluations and Comparisons for LLM
    Unlearning Methods*, https://arxiv.org/abs/2406.09179, whose formula was not compared
    """

    def strength(agrees: np.ndarray) -> float:
        wrong = np.flatnonzero(~agrees)
        needed = int(wrong[-1]) + 1 if len(wrong) else 0
        return 1 - needed / len(agrees)

    return np.array([strength(found.is_greedy) for found in likelihoods])


def exact_memorization(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """Share of each response's tokens that are the most likely ones: 0..1; low is better on forget rows.

    `1/|y| sum_k [argmax p(.|x, y_<k) = y_k]`, each token after the true ones before it.

    Source: Tirumala et al., *Memorization Without Overfitting*, https://arxiv.org/abs/2205.10770; open-unlearning,
    https://arxiv.org/abs/2506.12618
    """
    return np.array([found.is_greedy.mean() for found in likelihoods])
