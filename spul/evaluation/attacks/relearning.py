"""Relearning: an attacker who trains the model on a few forget rows.

Run it on a control too, a model that never saw the forget rows: answers that come out there were never known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.batching import shuffled
from ...data.checks import check_rows
from ...data.conversations import comparable
from ...data.encoder import RowEncoder
from ...data.rows import column_values, rows_at
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX, token_nll
from ...models.causal_lm import evaluation_mode, unwrapped
from ...models.compat import keep_4bit_differentiable
from ...records.fields import are_counts, is_count, is_finite_number
from ..metrics.scoring import response_logits


def check_disjoint(rows: Dataset, held_out: Dataset) -> None:
    """Raise unless both have `prompt` and `completion`, and share no prompt."""
    check_rows(rows)
    check_rows(held_out, name="held_out")
    trained, tested = ({comparable(p): p for p in column_values(part, "prompt")} for part in (rows, held_out))
    if both := trained.keys() & tested.keys():
        raise ValueError(
            f"{len(both)} prompts stand in both sets, such as {tested[min(both)]!r}; hold out other rows."
        )


def relearn(
    model: nn.Module,
    rows: Dataset,
    held_out: Dataset,
    encoder: RowEncoder,
    score: Callable[[nn.Module, Dataset], Mapping[str, Any]],
    lr: float = 1e-3,
    at: Sequence[int] = (1, 2, 4, 8, 16, 32),
    batch_size: int = 8,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    seed: int = 0,
    progress: str | None = None,
) -> list[dict[str, Any]]:
    """Train on a few forget rows with their true completions, and score held-out ones.

    Parameters that require gradients are trained: all weights of a fully fine-tuned model; the prompt, unlearning
    layers or LoRA, for an attacker who may train them. An attacker with the weights need not train: disabling the
    adapter restores the base. Lower accuracy on held-out rows is better, rising no faster than the retrained model's.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul. Its parameters are restored.
        rows: the few forget rows to train on, `prompt` and `completion`.
        held_out: other forget rows, to score.
        encoder: turns rows into token ids.
        score: metrics of the model on `held_out`, such as `lambda model, rows: score_completions(model, rows,
            collator)`; that one counts answers right word for word: take another for free-form ones.
        lr: learning rate, constant; gradients are clipped to a norm of 1.
        at: numbers of steps after which to score.
        batch_size: rows per step.
        optimizer: from the parameters and `lr` to an optimizer.
        seed: seed of the order of the rows.
        progress: label of a progress bar; None shows none.

    Returns:
        A record for step 0 and for each of `at`: `step`, and the metrics that `score` returns.

    Raises:
        ValueError: if nothing requires gradients, or what does is offloaded, `held_out` shares prompts with `rows`, or
            a number is out of range.

    Source: Hu et al., *Jogging the Memory of Unlearned Models*, https://arxiv.org/abs/2406.13356
    """
    check_disjoint(rows, held_out)
    model = unwrapped(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_rate = is_finite_number(lr) and lr > 0
    if not learning or not are_counts(at, 1) or not is_rate or not is_count(batch_size, 1):
        raise ValueError(
            f"{len(learning)} parameters require gradients, at={at!r}, lr={lr}, batch_size={batch_size!r}: expected "
            "some that do (load a prompt with is_trainable=True), a tuple of whole numbers of steps and a number of "
            "rows, all of at least 1, and lr above 0."
        )
    if any(parameter.is_meta for parameter in learning):
        raise ValueError("some parameters that require gradients are offloaded; load the whole model.")
    records = [{"step": 0, **score(model, held_out)}]
    before = [parameter.detach().to("cpu", copy=True) for parameter in learning]
    # In 16 bit small steps would be rounded to none.
    masters = [p.detach().float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in learning]
    device, batches = learning[0].device, shuffled(len(rows), batch_size, torch.Generator().manual_seed(seed))
    keep_4bit_differentiable(model)
    try:
        stepper = optimizer(masters, lr=lr)
        with evaluation_mode(model):
            for step in tqdm(range(1, max(at) + 1), desc=progress, disable=progress is None, leave=False):
                batch = encoder.batch(rows_at(rows, next(batches)))
                batch = {name: value.to(device) for name, value in batch.items()}
                positions, targets = response_positions(batch["labels"])
                losses = token_nll(response_logits(model, batch, positions), targets)
                for parameter in learning:
                    parameter.grad = None
                (losses.sum() / targets.ne(IGNORE_INDEX).sum()).backward()
                torch.nn.utils.clip_grad_norm_(learning, 1.0)
                _step(stepper, masters, learning)
                if step in at:
                    records.append({"step": step, **score(model, held_out)})
    finally:
        with torch.no_grad():
            for parameter, value in zip(learning, before, strict=True):
                parameter.grad = None
                parameter.copy_(value)
    return records


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """One optimizer step on the masters, copied to the parameters in their own precision."""
    for master, parameter in zip(masters, parameters, strict=True):
        if master is not parameter:
            master.grad = None if parameter.grad is None else parameter.grad.float()
    optimizer.step()
    for master, parameter in zip(masters, parameters, strict=True):
        if master is not parameter:
            parameter.copy_(master)
