"""Attacks by sampling: an answer that is never the most likely one may still be among many samples."""

from __future__ import annotations

import random

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ...data.checks import check_rows
from ...data.encoder import RowEncoder
from ...data.rows import adapter_names_of, read_rows
from ...losses.terms import IGNORE_INDEX, token_nll
from ...models.causal_lm import unwrapped
from ...records.fields import is_count, is_finite_number
from ..metrics.batches import ResponseBatch, map_responses
from ..metrics.free_form import answering
from ..metrics.likelihood import response_likelihoods
from ..metrics.scoring import check_not_diverged, response_logits


@torch.no_grad()
def sampled_success(
    model: nn.Module,
    rows: Dataset,
    encoder: RowEncoder,
    num_tries: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: str | None = None,
) -> np.ndarray:
    """Probability that at least one of `num_tries` samples begins with the true completion: `1 - (1 - P)^n` per row.

    `P` is the completion's probability at the temperature, the product over its tokens: nothing is sampled. On forget
    rows lower is better, as low as the retrained model's: with few classes, many tries find each. Free-form answers
    have many true wordings, of which this counts one.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        encoder: turns rows into token ids.
        num_tries: n, at least 1.
        temperature: divides the logits, above 0.
        batch_size: rows per forward pass.
        progress: label of a progress bar; None shows none.

    Returns:
        (rows,), in 0..1.

    Raises:
        ValueError, TypeError: if a number is out of range, or there are no rows.

    Source: many samples against unlearning, Scholten et al., https://arxiv.org/abs/2410.03523
    """
    check_rows(rows, columns=())
    _check_tries(num_tries, temperature)
    model = unwrapped(model)

    def measure(batch: ResponseBatch) -> list[float]:
        logits = response_logits(model, batch.inputs, batch.positions, batch.adapter_names)
        check_not_diverged(logits[batch.targets != IGNORE_INDEX])
        return token_nll(logits.double() / temperature, batch.targets).sum(dim=1).neg().tolist()

    log_p = np.array(map_responses(model, rows, encoder, measure, batch_size, progress))
    with np.errstate(divide="ignore"):
        return -np.expm1(num_tries * np.log1p(-np.exp(np.minimum(log_p, 0.0))))


@torch.no_grad()
def sampled_answers(
    model: nn.Module,
    rows: Dataset,
    encoder: RowEncoder,
    num_tries: int,
    temperature: float = 1.0,
    max_new_tokens: int = 200,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[list[str]]:
    """Sampled answers to each row, from the whole vocabulary: no top-k, no top-p, whatever the model's settings.

    Free-form answers are scored best-of-n, such as by a row's maximum ROUGE-L over its samples. On forget rows lower
    is better, down to the retrained model's at the same n.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        encoder: turns rows into token ids.
        num_tries: samples per row, at least 1.
        temperature: divides the logits, above 0.
        max_new_tokens: maximum length of an answer, in tokens.
        seed: seed of the samples; each row has its own draws.
        batch_size: samples per call of `generate`, all for one row.
        progress: label of a progress bar; None shows none.

    Returns:
        For each row `num_tries` texts, without special tokens.

    Raises:
        ValueError, TypeError: if a number is out of range, there are no rows, a prompt fills all positions, or the
            model has diverged.

    Source: as `sampled_success`
    """
    check_rows(rows, columns=())
    _check_tries(num_tries, temperature)
    response_likelihoods(model, rows, encoder, batch_size)  # raises if logits are NaN, which cannot be sampled from
    model = unwrapped(model)
    answers: list[list[str]] = []
    with answering(model, encoder.tokenizer) as answers_to, torch.random.fork_rng():
        given = tqdm(read_rows(rows), progress, len(rows), disable=progress is None, leave=False)
        for i, row in enumerate(given):
            torch.manual_seed(random.Random(f"{seed}/{i}").getrandbits(63))
            prompt = encoder.encode(row)
            found: list[str] = []
            while (missing := num_tries - len(found)) > 0:
                settings = {"do_sample": True, "temperature": temperature, "top_k": 0}
                num = min(batch_size, missing)
                names = adapter_names_of([row])
                found += answers_to([prompt], max_new_tokens, names, num_return_sequences=num, **settings)
            answers.append(found)
    return answers


def _check_tries(num_tries: int, temperature: float) -> None:
    if not is_count(num_tries, 1) or not is_finite_number(temperature) or temperature <= 0:
        raise ValueError(
            f"num_tries={num_tries!r}, temperature={temperature!r}; expected a whole number of at least 1, and a "
            "number above 0."
        )
