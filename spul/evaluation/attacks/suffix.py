"""Soft suffix: an attacker who trains input embeddings behind the question until the true answers come out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.batching import shuffled
from ...data.encoder import RowEncoder
from ...data.rows import read_rows
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX, token_nll
from ...models.causal_lm import bare_model, evaluation_mode, max_positions, unwrapped
from ...models.compat import keep_4bit_differentiable
from ...models.compat_devices import device_of
from ...models.unlearner import unlearner_of
from ...records.fields import is_count, is_finite_number
from ..metrics.batches import ResponseBatch, map_responses
from ..metrics.scoring import check_not_diverged, row_arguments
from .relearning import check_disjoint


def soft_suffix(
    model: nn.Module,
    rows: Dataset,
    held_out: Dataset,
    encoder: RowEncoder,
    num_virtual_tokens: int = 8,
    steps: int = 100,
    lr: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    progress: str | None = None,
) -> tuple[dict[str, dict[str, np.ndarray]], Tensor]:
    """Train one suffix of input embeddings on the completions of some forget rows, and score it on held-out ones.

    The suffix stands between prompt text and completion and starts as embeddings of random tokens; AdamW minimizes the
    completions' negative log-likelihood, the model frozen. Enough such vectors teach any model any answer: run the
    attack on a model that never saw the rows too, and compare.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul. It is not changed.
        rows: forget rows to train on, `prompt` and `completion`.
        held_out: other forget rows, to score.
        encoder: turns rows into token ids; the suffix does not count toward its `max_length`.
        num_virtual_tokens: m, number of vectors.
        steps: training steps.
        lr: learning rate; input embeddings have a standard deviation of about 0.02 in most families.
        batch_size: rows per training step and per forward pass.
        seed: seed of initialization and row order.
        progress: label of a progress bar; None shows none.

    Returns:
        Scores, and the trained suffix (m, d) on the CPU. The scores are those of the held-out rows without a suffix
        (`before`) and with it (`after`), and of the rows that it was trained on (`trained`). Each has, (rows,):
        `accuracy`, 1 if greedy decoding generates the completion, lower is better on forget rows; `loss`, its negative
        log-likelihood in nats; `probability`, the geometric mean over its tokens, as in TOFU.

    Raises:
        ValueError: if a number is out of range, `held_out` shares prompts with `rows`, rows do not fit the model's
            positions, the model has diverged, or it is under a prompt and has no plain key/value cache.
        TypeError: if the model is under a prompt of PEFT that is not a `SoftPromptUnlearner`, or reads tokens: behind
            gates, or a rival without training.

    Source: Schwinn et al., *Soft Prompt Threats*, https://arxiv.org/abs/2402.09063; why it needs the comparison,
    *Soft Token Attacks Cannot Reliably Audit Unlearning*, https://arxiv.org/abs/2502.15836
    """
    check_disjoint(rows, held_out)
    are_whole = all(is_count(number, 1) for number in (num_virtual_tokens, steps, batch_size))
    if not are_whole or not is_finite_number(lr) or lr <= 0:
        raise ValueError(
            f"num_virtual_tokens={num_virtual_tokens!r}, steps={steps!r}, lr={lr}, batch_size={batch_size!r}; "
            "expected whole numbers of at least 1, and lr above 0."
        )
    model = unwrapped(model)
    if unlearner_of(model).reads_tokens:
        raise TypeError(f"a {type(model).__name__} reads the tokens of a request, and trained vectors are none.")
    if not unlearner_of(model).follows_embeddings:
        raise TypeError("the model is under a prompt of PEFT; load it by SoftPromptUnlearner.from_pretrained.")
    keep_4bit_differentiable(model)
    base: Any = bare_model(model)
    embed = base.get_input_embeddings()
    device = device_of(embed)
    # Room for the placeholders: each row's text is the same as without a suffix.
    roomy = encoder.with_max_length(encoder.max_length + num_virtual_tokens)
    few, others = (_with_placeholders(some, encoder, num_virtual_tokens) for some in (rows, held_out))
    generator = torch.Generator().manual_seed(seed)
    with evaluation_mode(model), _frozen(model):
        before = _scores(model, _with_placeholders(held_out, encoder, 0), roomy, batch_size, None)
        with torch.no_grad():
            start = embed(torch.randint(embed.weight.shape[0], (num_virtual_tokens,), generator=generator).to(device))
        suffix = nn.Parameter(start.to(torch.promote_types(start.dtype, torch.float32)))
        optimizer = torch.optim.AdamW([suffix], lr, weight_decay=0.0)
        batches = shuffled(len(few), batch_size, generator)
        for _ in tqdm(range(steps), desc=progress, disable=progress is None, leave=False):
            batch = {name: value.to(device) for name, value in roomy.batch([few[i] for i in next(batches)]).items()}
            positions, targets = response_positions(batch["labels"])
            optimizer.zero_grad()
            token_nll(_logits(model, batch, positions, suffix), targets).sum(dim=1).mean().backward()
            optimizer.step()
        found = suffix.detach()
        after, trained = (_scores(model, some, roomy, batch_size, found) for some in (others, few))
    return {"before": before, "after": after, "trained": trained}, found.cpu()


def _with_placeholders(rows: Dataset, encoder: RowEncoder, num: int) -> Dataset:
    """Rows as token ids, with placeholders for the suffix between prompt and completion."""
    encoded = [encoder.encode(row) for row in read_rows(rows)]
    return Dataset.from_list(
        [
            {
                "input_ids": e.prompt_ids + [0] * num + e.completion_ids,
                "completion_mask": [0] * (len(e.prompt_ids) + num) + [1] * len(e.completion_ids),
                "num_ending": e.num_ending,
                "prompt_position": e.prompt_position,
            }
            for e in encoded
        ]
    )


def _logits(model: nn.Module, batch: dict[str, Tensor], positions: Tensor, suffix: Tensor | None) -> Tensor:
    """Logits (B, K, V) at the response positions, the suffix in the columns before the first of them."""
    base: Any = bare_model(model)
    mask = batch["attention_mask"]
    embeds = base.get_input_embeddings()(batch["input_ids"])
    if suffix is not None:
        columns, last = torch.arange(embeds.shape[1], device=embeds.device), positions[:, :1]
        is_suffix = (columns > last - len(suffix)) & (columns <= last)
        embeds = embeds.masked_scatter(is_suffix[..., None], suffix.to(embeds.dtype).repeat(len(mask), 1))
    unlearner = unlearner_of(model)
    num_virtual, limit = unlearner.virtual_tokens_in_use, max_positions(base)
    if limit is not None and num_virtual + embeds.shape[1] > limit:
        fits = limit - num_virtual - (0 if suffix is None else len(suffix))
        raise ValueError(
            f"{num_virtual} virtual tokens and {embeds.shape[1]} tokens with the suffix exceed the model's {limit} "
            f"positions; " + (f"collate with max_length of at most {fits}." if fits >= 2 else "take a shorter suffix.")
        )
    own = row_arguments(model, None, batch.get("prompt_position"))
    return unlearner.embedding_logits(embeds, mask, positions, **own)


@torch.no_grad()
def _scores(
    model: nn.Module, rows: Dataset, encoder: RowEncoder, batch_size: int, suffix: Tensor | None
) -> dict[str, np.ndarray]:
    """Accuracy, loss and probability of rows with placeholders, (rows,) each."""

    def measure(batch: ResponseBatch) -> list[list[float]]:
        logits = _logits(model, batch.inputs, batch.positions, suffix)
        is_unused = batch.targets == IGNORE_INDEX
        check_not_diverged(logits[~is_unused])
        nll = token_nll(logits, batch.targets).sum(dim=1).double()
        is_right = ((logits.argmax(dim=-1) == batch.targets) | is_unused).all(dim=1)
        return torch.stack([is_right, nll, (-nll / (~is_unused).sum(dim=1)).exp()], dim=1).tolist()

    scores = np.array(map_responses(model, rows, encoder, measure, batch_size)).T
    return dict(zip(("accuracy", "loss", "probability"), scores, strict=True))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Context manager: no parameter of the model requires a gradient, so its prompt is computed once and cached."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
