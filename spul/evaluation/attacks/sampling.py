"""Attacks by trying often: what is never the most likely answer may still be among many that are drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ...data.checks import check_rows
from ...data.collator import ForgetRetainCollator
from ...losses.terms import IGNORE_INDEX, token_nll
from ...models.causal_lm import bare_model, evaluation_mode, unwrapped
from ..metrics.free_form import bare_generation, before_end, end_tokens, greedy, room_to_answer
from ..metrics.likelihood import response_batches, response_likelihoods
from ..metrics.scoring import check_numbers, response_logits


@torch.no_grad()
def sampled_success(
    model: nn.Module,
    rows: Dataset,
    collator: ForgetRetainCollator,
    num_tries: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: str | None = None,
) -> np.ndarray:
    """How likely at least one of many sampled answers begins with the true completion: `1 - (1 - P)^n` per row.

    `P` is the completion's probability at the temperature, the product over its tokens, so nothing need be drawn. On
    forget rows better low, as the retrained model's: of few classes, many tries find each. Free-form answers have many
    true wordings, of which this counts one.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        collator: for tokenizing and padding.
        num_tries: n, at least 1.
        temperature: what the logits are divided by, above 0.
        batch_size: rows per forward.
        progress: a name to show a progress bar under; none unless given.

    Returns:
        (rows,), in 0..1.

    Raises:
        ValueError, TypeError: if a number is out of range, or there are no rows.

    Source: many samples against unlearning, Scholten et al., https://arxiv.org/abs/2410.03523
    """
    check_rows(rows, columns=())
    _check_tries(num_tries, temperature)
    model, found = unwrapped(model), np.zeros(len(rows))
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in response_batches(rows, collator, batch_size, device, progress):
            logits = response_logits(model, batch.inputs, batch.positions)
            check_numbers(logits[batch.targets != IGNORE_INDEX])
            found[batch.places] = token_nll(logits.double() / temperature, batch.targets).sum(dim=1).neg().cpu()
    with np.errstate(divide="ignore"):
        return -np.expm1(num_tries * np.log1p(-np.exp(np.minimum(found, 0.0))))


@torch.no_grad()
def sampled_answers(
    model: nn.Module,
    rows: Dataset,
    collator: ForgetRetainCollator,
    num_tries: int,
    temperature: float = 1.0,
    max_new_tokens: int = 200,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[list[str]]:
    """Many answers to each row, drawn from all of the vocabulary: no top-k, no top-p, whatever the model's settings.

    For free-form answers, of which the best counts: the highest ROUGE-L of a row's tries, say. On forget rows better
    low, as that of as many tries of the retrained model.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        collator: for tokenizing.
        num_tries: answers per row, at least 1.
        temperature: what the logits are divided by, above 0.
        max_new_tokens: the most tokens of an answer.
        seed: seed of the draws, each row's its own.
        batch_size: answers per call of `generate`, all to one row.
        progress: a name to show a progress bar under; none unless given.

    Returns:
        For each row `num_tries` texts, without special tokens.

    Raises:
        ValueError, TypeError: if a number is out of range, there are no rows, a prompt fills all positions, or the
            model has diverged.

    Source: as `sampled_success`
    """
    check_rows(rows, columns=())
    _check_tries(num_tries, temperature)
    response_likelihoods(model, rows, collator, batch_size)  # raises where logits are NaN, from which nothing is drawn
    model, tokenizer = unwrapped(model), collator.tokenizer
    base: Any = bare_model(model)
    generate: Any = model.generate
    ends = end_tokens(base, tokenizer.eos_token_id)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    device = next(model.parameters()).device
    answers: list[list[str]] = []
    with evaluation_mode(model), bare_generation(model), torch.random.fork_rng():
        for i, row in enumerate(tqdm(rows, desc=progress, disable=progress is None, leave=False)):
            ids = torch.tensor([collator.encoder.encode(row).prompt_ids], device=device)
            room = room_to_answer(model, ids.shape[1], max_new_tokens)
            torch.manual_seed(random.Random(f"{seed}/{i}").getrandbits(63))
            answers.append([])
            for start in range(0, num_tries, batch_size):
                settings = greedy(room, pad, ends)
                settings.update(
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    num_return_sequences=min(batch_size, num_tries - start),
                )
                out = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                said = [before_end(tokens, ends) for tokens in out[:, ids.shape[1] :].tolist()]
                answers[-1] += [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in said]
    return answers


def _check_tries(num_tries: int, temperature: float) -> None:
    if num_tries < 1 or not temperature > 0:
        raise ValueError(f"num_tries={num_tries}, temperature={temperature}; expected at least 1, and above 0.")
