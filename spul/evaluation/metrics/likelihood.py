"""What a model says of each row's response, token by token, and the measures that need no more than that.

One pass gives the log-probabilities of a response's own tokens. Probability, truth ratio, extraction strength, exact
memorization and the attacks of `membership.py` are functions of them. Every number is of the response tokens alone:
no pad, no prompt, no virtual token enters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from scipy.special import logsumexp
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.collator import ForgetRetainCollator
from ...data.samplers import by_length
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX, KLDivergence
from ...models.causal_lm import detached_base, evaluation_mode, logits_at, trains_own_weights, unwrapped
from .scoring import check_numbers, response_logits

REVERSE, FORWARD = KLDivergence(direction="reverse"), KLDivergence(direction="forward")


@dataclass(frozen=True)
class Likelihood:
    """What a model says of the response of one row, of `|y|` tokens.

    Attributes:
        log_probs: (|y|,), log p of each response token given the prompt and the tokens before it, in nats.
        is_greedy: (|y|,), whether that token is the most likely one there.
        mean: (|y|,), the mean of log p over the vocabulary where each token stands, weighted by p itself.
        std: (|y|,), the standard deviation of log p there, weighted in the same way.
    """

    log_probs: np.ndarray
    is_greedy: np.ndarray
    mean: np.ndarray
    std: np.ndarray


class Divergences(NamedTuple):
    """KL divergences per row, each a mean over the row's response tokens, in nats.

    Attributes:
        reverse: (rows,), KL(model || reference).
        forward: (rows,), KL(reference || model).
    """

    reverse: np.ndarray
    forward: np.ndarray


class ResponseBatch(NamedTuple):
    """Some rows, right-padded, and where their response tokens are predicted."""

    places: list[int]  # of the rows in their data set
    inputs: dict[str, Tensor]
    positions: Tensor  # (B, K)
    targets: Tensor  # (B, K), -100 in unused slots

    def tokens_of(self, row: int) -> int:
        """How many response tokens a row of this batch has: its first slots, the others are unused."""
        return int(self.targets[row].ne(IGNORE_INDEX).sum())


def check_rows(rows: Dataset) -> None:
    """Raise unless there are rows of a `datasets.Dataset`; their columns are the encoder's business."""
    if not isinstance(rows, Dataset):
        raise TypeError(f"rows are a {type(rows).__name__}; expected a datasets.Dataset: Dataset.from_list([...]).")
    if len(rows) == 0:
        raise ValueError("there are no rows to evaluate; expected at least one.")


def check_completions(rows: Dataset) -> None:
    """Raise unless these are rows with a prompt and a completion."""
    check_rows(rows)
    if missing := {"prompt", "completion"} - set(rows.column_names):
        raise ValueError(f"rows lack {sorted(missing)}; they have {rows.column_names}.")


def response_batches(
    rows: Dataset, collator: ForgetRetainCollator, batch_size: int, device: torch.device, progress: str | None
) -> Iterator[ResponseBatch]:
    """Rows with their own completions, like lengths together, the longest first: what does not fit fails soon."""
    encoded = [collator.encoder.encode(row) for row in rows]
    lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in encoded]
    batches = list(by_length(lengths, batch_size))
    for places in tqdm(batches, desc=progress, disable=progress is None, leave=False):
        tokenized = [
            {
                "input_ids": encoded[i].prompt_ids + encoded[i].completion_ids,
                "completion_mask": [0] * len(encoded[i].prompt_ids) + [1] * len(encoded[i].completion_ids),
            }
            for i in places
        ]
        batch = {name: value.to(device) for name, value in collator.encoder.batch(tokenized).items()}
        yield ResponseBatch(places, batch, *response_positions(batch["labels"]))


@torch.no_grad()
def response_likelihoods(
    model: nn.Module, rows: Dataset, collator: ForgetRetainCollator, batch_size: int = 32, progress: str | None = None
) -> list[Likelihood]:
    """One pass over rows: what the model says of each response, token by token.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt; within `disable_adapter()` it is the base.
        rows: `prompt` and `completion`, or tokenized.
        collator: for tokenizing and padding; its generic completions are not used.
        batch_size: rows per forward; batches are of like length.
        progress: a name to show a progress bar under; none unless given.

    Returns:
        One `Likelihood` per row, in the order of the rows, in float32 (float64 for a model in float64).

    Raises:
        TypeError: if `rows` are no `datasets.Dataset`.
        ValueError: if there are no rows, or the model's logits are not numbers.
    """
    check_rows(rows)
    model = unwrapped(model)
    found: dict[int, Likelihood] = {}
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in response_batches(rows, collator, batch_size, device, progress):
            logits = response_logits(model, batch.inputs, batch.positions)
            for row, place in enumerate(batch.places):
                num = batch.tokens_of(row)
                found[place] = _likelihood(logits[row, :num], batch.targets[row, :num])
    return [found[i] for i in range(len(rows))]


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in at least float32."""
    check_numbers(logits)
    return (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits).log_softmax(dim=-1)


def _likelihood(logits: Tensor, targets: Tensor) -> Likelihood:
    """Of one row: logits (|y|, V) and targets (|y|,)."""
    targets = targets.to(logits.device)
    log_p = _log_softmax(logits)
    p, finite = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # what cannot be said weighs nothing
    mean = (p * finite).sum(dim=-1)
    std = (p * (finite - mean[:, None]).square()).sum(dim=-1).sqrt()
    own = log_p.gather(1, targets[:, None])[:, 0]
    is_greedy = logits.argmax(dim=-1) == targets
    return Likelihood(*(tensor.cpu().numpy() for tensor in (own, is_greedy, mean, std)))


@torch.no_grad()
def kl_to(
    model: nn.Module,
    rows: Dataset,
    collator: ForgetRetainCollator,
    reference: nn.Module | None = None,
    batch_size: int = 16,
    progress: str | None = None,
) -> Divergences:
    """How far a model has moved from another at the response tokens, both ways. On retain rows lower is better.

    For each row, with `y` its own response: `reverse = mean over k of KL(p(.|x, y_<k) || p0(.|x, y_<k))` and `forward`
    with p and p0 exchanged. A mean per token, where the KL term of `UnlearningLoss` is a sum by default.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        collator: for tokenizing and padding.
        reference: the model to compare with; None for the base under the prompt or LoRA.
        batch_size: rows per forward.
        progress: a name to show a progress bar under; none unless given.

    Raises:
        TypeError: if `rows` are no `datasets.Dataset`.
        ValueError: if there are no rows, the model has weights of its own and no `reference` is given, or the two have
            vocabularies of different sizes.

    Source: Bu et al., *SPUL*, https://arxiv.org/abs/2406.12038 (the KL to the base on retain rows)
    """
    check_rows(rows)
    if reference is None and trains_own_weights(model):
        raise ValueError(
            "a model that learned in weights of its own is not as it was when an adapter is switched off: pass "
            "reference, the model before unlearning."
        )
    model = unwrapped(model)
    other = model if reference is None else unwrapped(reference)
    reverse, forward = np.zeros(len(rows)), np.zeros(len(rows))
    device, other_device = (next(m.parameters()).device for m in (model, other))
    with evaluation_mode(model), evaluation_mode(other):
        for batch in response_batches(rows, collator, batch_size, device, progress):
            logits = response_logits(model, batch.inputs, batch.positions)
            if reference is None:
                inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
                with detached_base(model) as base:
                    others = logits_at(base, batch.positions, **inputs, use_cache=False)
            else:
                inputs = {name: value.to(other_device) for name, value in batch.inputs.items()}
                others = response_logits(other, inputs, batch.positions.to(other_device))
            if others.shape[-1] != logits.shape[-1]:
                raise ValueError(
                    f"the model has logits for {logits.shape[-1]} tokens, the reference for {others.shape[-1]}; "
                    "expected two models with one vocabulary."
                )
            for row, place in enumerate(batch.places):
                num = batch.tokens_of(row)
                log_p = _log_softmax(logits[row, :num])
                log_p0 = _log_softmax(others[row, :num]).to(log_p)
                reverse[place] = float(REVERSE.token_losses(log_p, log_p, log_p0).mean())
                forward[place] = float(FORWARD.token_losses(log_p, log_p, log_p0).mean())
    return Divergences(reverse, forward)


# ---- measures ----


def probability(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """The probability of each response, normalized for its length: `P(y|x)^(1/|y|)`, in 0..1.

    High is better on retain rows, low on forget rows (as low as a retrained model's, not lower).

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2.1
    """
    return np.exp(mean_log_probs(likelihoods))


def mean_log_probs(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """`log P(y|x) / |y|` of each response, in nats per token."""
    return np.array([found.log_probs.mean(dtype=np.float64) for found in likelihoods])


def truth_ratio(paraphrased: Sequence[Likelihood], perturbed: Sequence[Sequence[Likelihood]]) -> np.ndarray:
    """How likely wrong answers are, next to the right one in other words: TOFU's `R_truth`, 0 or more.

    `R = (1/m sum_i P(y_i|x)^(1/|y_i|)) / P(y'|x)^(1/|y'|)`, with y_i the m perturbed answers and y' the paraphrased
    one: the arithmetic mean of the paper. TOFU's program and others have the geometric one, and some turn the ratio
    around. A model that knows the answer has R near 0, one that never knew it about 1, one that avoids it above 1.

    Args:
        paraphrased: one per question.
        perturbed: the wrong answers of each question, one or more.

    Raises:
        ValueError: if the numbers of questions differ, or one has no wrong answer.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2.1
    """
    if len(paraphrased) != len(perturbed) or not all(len(wrong) for wrong in perturbed):
        raise ValueError(
            f"{len(paraphrased)} paraphrased answers, and {[len(wrong) for wrong in perturbed]} perturbed ones; "
            "expected one or more perturbed answers for each paraphrased one."
        )
    wrong = np.array([logsumexp(mean_log_probs(some)) - np.log(len(some)) for some in perturbed])
    return np.exp(wrong - mean_log_probs(paraphrased))


def truth_ratio_on_forget(ratios: np.ndarray) -> float:
    """TOFU's number on the forget set: the mean of `min(R, 1/R)`, in 0..1; 1, neither known nor avoided, is best.

    Source: TOFU's program, https://github.com/locuslab/tofu. The paper compares whole distributions: `forget_quality`.
    """
    ratios = np.asarray(ratios, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratios, 1 / ratios).mean())


def truth_ratio_on_retain(ratios: np.ndarray) -> float:
    """TOFU's number on sets that are kept: the mean of `max(0, 1 - R)`, in 0..1; higher is better.

    Source: Maini et al., *TOFU*, https://arxiv.org/abs/2401.06121, section 2.2.1
    """
    return float(np.maximum(0.0, 1 - np.asarray(ratios, dtype=np.float64)).mean())


def extraction_strength(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """How little of a response must be given for greedy decoding to say the rest: 0..1; low is better on forget rows.

    `1 - k/|y|`, with k the least number of leading response tokens after which every further token is the most likely
    one. It is 1 if the prompt alone is enough, and 0 if even the last token has to be given (k = |y|).

    Source: Wang et al., *Towards Effective Evaluations and Comparisons for LLM Unlearning Methods*,
    https://arxiv.org/abs/2406.09179; open-unlearning, https://arxiv.org/abs/2506.12618, whose program stops at
    k = |y| - 1 and so never gives less than 1/|y|
    """

    def strength(agrees: np.ndarray) -> float:
        wrong = np.flatnonzero(~agrees)
        needed = int(wrong[-1]) + 1 if len(wrong) else 0
        return 1 - needed / len(agrees)

    return np.array([strength(found.is_greedy) for found in likelihoods])


def exact_memorization(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """The share of each response's tokens that are the most likely ones: 0..1; low is better on forget rows.

    `1/|y| sum_k [argmax p(.|x, y_<k) = y_k]`, each token after the true ones before it.

    Source: Tirumala et al., *Memorization Without Overfitting*, https://arxiv.org/abs/2205.10770; open-unlearning,
    https://arxiv.org/abs/2506.12618
    """
    return np.array([found.is_greedy.mean() for found in likelihoods])
