"""Membership inference: attacks that predict from a model's likelihoods which rows it was trained on.

An attack returns a score per row, and a *higher* score always means "was trained on". `leakage.py` measures how well
it distinguishes members, the forget rows, from rows of the same kind that the model never saw.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ...data.checks import check_rows
from ...data.encoder import RowEncoder
from ...data.rows import column_values, completion_text
from ...losses.terms import token_nll
from ...models.causal_lm import bare_model, unwrapped
from ...models.compat import own_parameters
from .batches import ResponseBatch, map_responses
from .likelihood import Likelihood, check_has_likelihoods, mean_log_probs, response_likelihoods
from .scoring import check_not_diverged, response_logits

GradientOf = Literal["model", "adapter"]


def loss_attack(likelihoods: Sequence[Likelihood]) -> np.ndarray:
    """`1/|y| log P(y|x)`: members have a low loss.

    Source: Yeom et al., *Privacy Risk in Machine Learning*, https://arxiv.org/abs/1709.01604
    """
    return mean_log_probs(likelihoods)


def zlib_attack(likelihoods: Sequence[Likelihood], texts: Sequence[str]) -> np.ndarray:
    """`(1/|y| log P(y|x)) / bytes of y after zlib`: a loss that is low although the text is not simple.

    The loss is the mean per token, the log-perplexity of the paper. The texts are the responses alone, as
    in open-unlearning.

    Args:
        likelihoods: one per row.
        texts: the rows' responses.

    Raises:
        ValueError: if the numbers of rows differ.

    Source: Carlini et al., *Extracting Training Data from Large Language Models*, https://arxiv.org/abs/2012.07805
    """
    if len(texts) != len(likelihoods):
        raise ValueError(f"{len(likelihoods)} likelihoods and {len(texts)} texts; expected one text for each.")
    return mean_log_probs(likelihoods) / np.array([len(zlib.compress(text.encode())) for text in texts])


def min_k_attack(likelihoods: Sequence[Likelihood], share: float = 0.2) -> np.ndarray:
    """Mean log-probability of the `share` of a response's tokens that is least likely: higher for members.

    Args:
        likelihoods: one per row.
        share: of the tokens, rounded down, at least one token. 0.2 as in the paper; MUSE and open-unlearning use 0.4.

    Raises:
        ValueError: if `share` is not above 0 and at most 1.

    Source: Shi et al., *Detecting Pretraining Data from Large Language Models*, https://arxiv.org/abs/2310.16789
    """
    return np.array([_mean_of_least(found.log_probs, share) for found in likelihoods])


def min_k_plus_plus_attack(likelihoods: Sequence[Likelihood], share: float = 0.2) -> np.ndarray:
    """As `min_k_attack`, of `(log p(y_k) - mean) / std`, mean and deviation of log p under p at the token's position.

    Members lie at a mode of the distribution. Where the model is certain (std near 0), std counts as 1e-6.

    Source: Zhang et al., *Min-K%++*, https://arxiv.org/abs/2404.02936
    """
    return np.array(
        [_mean_of_least((found.log_probs - found.mean) / np.maximum(found.std, 1e-6), share) for found in likelihoods]
    )


def _mean_of_least(values: np.ndarray, share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r}; expected a share of the tokens above 0 and at most 1, such as 0.2.")
    num = max(1, int(share * len(values)))
    return float(np.sort(values.astype(np.float64))[:num].mean())


def reference_attack(likelihoods: Sequence[Likelihood], reference: Sequence[Likelihood]) -> np.ndarray:
    """`1/|y| log (P(y|x) / P_ref(y|x))`: likely under this model, and not under one that never saw the row.

    The likelihood ratio, in its logarithm per token. (Carlini et al. divide the two losses instead.)

    Args:
        likelihoods: one per row.
        reference: of the same rows, under a model that was not trained on them, with the same tokenizer.

    Raises:
        ValueError: if the rows or their tokens differ in number.

    Source: Mireshghallah et al., *Quantifying Privacy Risks of Masked Language Models Using Membership Inference
    Attacks*, https://arxiv.org/abs/2203.03929
    """
    counts = [[len(found.log_probs) for found in some] for some in (likelihoods, reference)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the reference's {len(reference)} responses are not the model's {len(likelihoods)}, token for token; "
            "expected likelihoods of the same rows in the same order, under models with one tokenizer."
        )
    return mean_log_probs(likelihoods) - mean_log_probs(reference)


def gradient_norm_attack(
    model: nn.Module,
    rows: Dataset,
    encoder: RowEncoder,
    of: GradientOf = "model",
    progress: str | None = None,
) -> np.ndarray:
    """`-|| d loss / d theta ||_2`, the loss being `-1/|y| log P(y|x)`: members need little change.

    In the paper theta is every weight of the attacked model. Under a prompt or LoRA, `of="model"` takes the causal
    LM's own weights, which hold the training data, with the adapter enabled; `of="adapter"` takes the parameters of
    the prompt or LoRA: an attacker who has the adapter alone. One backward pass per row; gradients are not stored.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        encoder: turns rows into token ids.
        of: whose parameters are theta.
        progress: label of a progress bar; None shows none.

    Raises:
        ValueError: if there are no rows, `of` is neither, there are no such parameters, they are quantized or
            offloaded, the adapter is disabled, or the model has diverged: its gradients are NaN or infinite.

    Source: Wang et al., *Pandora's White-Box*, https://arxiv.org/abs/2402.17012
    """
    check_rows(rows, columns=())
    model = unwrapped(model)
    own = [parameter for _, parameter in own_parameters(bare_model(model))]
    if of == "model":
        theta = own
    elif of == "adapter":
        ids = {id(parameter) for parameter in own}
        theta = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    else:
        raise ValueError(f"of={of!r}; expected 'model' or 'adapter'.")
    if not theta or not all(parameter.is_floating_point() for parameter in theta):
        raise ValueError(
            f"of={of!r}: there are {len(theta)} such parameters, "
            f"{sum(not p.is_floating_point() for p in theta)} of them quantized; expected floating-point ones. "
            "A bare model has no adapter; weights in 8 or 4 bit have no gradient."
        )
    if any(parameter.is_meta for parameter in theta):
        raise ValueError(
            f"of={of!r}: some of these parameters are offloaded, and their gradients not kept; load the whole model."
        )

    def measure(batch: ResponseBatch) -> list[float]:
        logits = response_logits(model, batch.inputs, batch.positions, batch.adapter_names)
        loss = token_nll(logits, batch.targets.to(logits.device)).mean()
        if not loss.requires_grad:
            raise ValueError(f"of={of!r}: no gradient reaches these parameters; enable the adapter.")
        found = [g for g in torch.autograd.grad(loss, theta, allow_unused=True) if g is not None]
        parts = [torch.linalg.vector_norm(g if g.dtype == torch.float64 else g.float()) for g in found]
        norm = np.linalg.norm([float(part) for part in parts])
        check_not_diverged(torch.tensor([norm]), "gradients")
        return [float(norm)]

    required = [parameter.requires_grad for parameter in theta]
    try:
        for parameter in theta:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            return -np.array(map_responses(model, rows, encoder, measure, 1, progress))
    finally:
        for parameter, was_required in zip(theta, required, strict=True):
            parameter.requires_grad_(was_required)


def attack_scores(
    model: nn.Module,
    rows: Dataset,
    encoder: RowEncoder,
    reference: nn.Module | Sequence[Likelihood] | None = None,
    gradient_of: GradientOf | None = None,
    share: float = 0.2,
    batch_size: int = 32,
    progress: str | None = None,
) -> dict[str, np.ndarray]:
    """Scores of all attacks on a set of rows.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`.
        encoder: turns rows into token ids.
        reference: a model that was not trained on the rows, for the reference attack, or the rows' likelihoods under
            it; None skips it.
        gradient_of: as `of` in `gradient_norm_attack`; None skips it: it takes a backward pass per row.
        share: of the tokens, for min-k and min-k++.
        batch_size: rows per forward pass.
        progress: label of the progress bars; None shows none.

    Returns:
        `loss`, `zlib`, `min_k`, `min_k++` and, if required, `reference` and `gradient_norm`: (rows,) each, higher for
        members.

    Raises:
        TypeError: if `rows` is not a `datasets.Dataset`, or the model answers with a fixed text.
        ValueError: if there are no rows, they have no `completion`, or as the single attacks.
    """
    check_rows(rows, columns=())
    check_has_likelihoods(model)
    if "completion" not in rows.column_names:
        raise ValueError(f"rows have {rows.column_names}; expected prompt and completion: zlib needs the text.")
    likelihoods = response_likelihoods(model, rows, encoder, batch_size, progress)
    scores = {
        "loss": loss_attack(likelihoods),
        "zlib": zlib_attack(
            likelihoods, [completion_text(completion) for completion in column_values(rows, "completion")]
        ),
        "min_k": min_k_attack(likelihoods, share),
        "min_k++": min_k_plus_plus_attack(likelihoods, share),
    }
    if reference is not None:
        if isinstance(reference, nn.Module):
            reference = response_likelihoods(reference, rows, encoder, batch_size, progress)
        scores["reference"] = reference_attack(likelihoods, reference)
    if gradient_of is not None:
        scores["gradient_norm"] = gradient_norm_attack(model, rows, encoder, gradient_of, progress)
    return scores
