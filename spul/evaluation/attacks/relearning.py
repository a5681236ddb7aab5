"""Attacks by someone with more than a keyboard: who trains, quantizes, or looks inside.

Each is to be run on a control too, a model that never saw the forget rows: what it gives up there, it never knew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.checks import check_rows
from ...data.collator import ForgetRetainCollator
from ...data.samplers import shuffled
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX, token_nll
from ...models.causal_lm import evaluation_mode, unwrapped
from ...models.compat import keep_4bit_differentiable
from ..metrics.scoring import response_logits, score_completions


def check_disjoint(rows: Dataset, held_out: Dataset) -> None:
    """Raise unless both are rows to score, and none of the one stands in the other."""
    check_rows(rows)
    check_rows(held_out, name="held_out")
    if both := {str(prompt) for prompt in rows["prompt"]} & {str(prompt) for prompt in held_out["prompt"]}:
        raise ValueError(f"{len(both)} prompts stand in both sets, such as {min(both)!r}; hold out other rows.")


# ---- relearning ----


def relearn(
    model: nn.Module,
    rows: Dataset,
    held_out: Dataset,
    collator: ForgetRetainCollator,
    lr: float = 1e-3,
    at: Sequence[int] = (1, 2, 4, 8, 16, 32),
    train_batch_size: int = 8,
    batch_size: int = 32,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    seed: int = 0,
    progress: str | None = None,
    score: Callable[[nn.Module], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train on a few forget rows with their true completions, and score others, which were not trained on.

    The parameters that require gradients learn: all weights of a model that was tuned as a whole; the prompt, the
    unlearning layers or LoRA, by someone who may train them. Who has the weights need not train: detaching the prompt
    gives the base. Accuracy on the other rows is better low, and rising no faster than the retrained model's.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul. Afterwards it is as it was.
        rows: the few, `prompt` and `completion`.
        held_out: the other forget rows.
        collator: for tokenizing and padding; its generic completions are not learned.
        lr: learning rate, constant; gradients are clipped to a norm of 1.
        at: after which numbers of steps to score.
        train_batch_size: rows per step.
        batch_size: rows per forward, in scoring.
        optimizer: from the parameters and `lr` to an optimizer.
        seed: of the order of the rows.
        progress: a name to show a progress bar under; none unless given.
        score: what to record of the model, from it to numbers by name; `score_completions` of `held_out` unless given,
            which asks whether answers are right word for word: give another for free-form ones.

    Returns:
        A record for step 0 and for each of `at`: `step`, and what `score` gives.

    Raises:
        ValueError: if nothing requires gradients, `held_out` shares prompts with `rows`, or a number is out of range.

    Source: Hu et al., *Jogging the Memory of Unlearned Models*, https://arxiv.org/abs/2406.13356
    """
    check_disjoint(rows, held_out)
    model = unwrapped(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learning or not at or min(at) < 1 or not lr > 0 or train_batch_size < 1:
        raise ValueError(
            f"{len(learning)} parameters require gradients, at={list(at)}, lr={lr}, train_batch_size="
            f"{train_batch_size}: expected some that do (load a prompt with is_trainable=True), numbers of steps and "
            "rows of at least 1, and lr above 0."
        )
    if score is None:
        score = partial(score_completions, rows=held_out, collator=collator, batch_size=batch_size)
    records = [{"step": 0, **score(model)}]
    before = [parameter.detach().to("cpu", copy=True) for parameter in learning]
    # Small steps would be rounded away in 16 bit.
    masters = [p.detach().float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in learning]
    device, batches = learning[0].device, shuffled(len(rows), train_batch_size, torch.Generator().manual_seed(seed))
    keep_4bit_differentiable(model)
    try:
        stepper = optimizer(masters, lr=lr)
        with evaluation_mode(model):
            for step in tqdm(range(1, max(at) + 1), desc=progress, disable=progress is None, leave=False):
                places = next(batches)
                batch = {name: x.to(device) for name, x in collator.encoder.batch([rows[i] for i in places]).items()}
                positions, targets = response_positions(batch["labels"])
                losses = token_nll(response_logits(model, batch, positions), targets)
                for parameter in learning:
                    parameter.grad = None
                (losses.sum() / targets.ne(IGNORE_INDEX).sum()).backward()
                torch.nn.utils.clip_grad_norm_(learning, 1.0)
                _step(stepper, masters, learning)
                if step in at:
                    records.append({"step": step, **score(model)})
    finally:
        with torch.no_grad():
            for parameter, value in zip(learning, before, strict=True):
                parameter.grad = None
                parameter.copy_(value)
    return records


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """A step of the masters, which the parameters follow in their own precision."""
    for master, parameter in zip(masters, parameters, strict=True):
        if master is not parameter:
            master.grad = None if parameter.grad is None else parameter.grad.float()
    optimizer.step()
    for master, parameter in zip(masters, parameters, strict=True):
        if master is not parameter:
            parameter.copy_(master)
