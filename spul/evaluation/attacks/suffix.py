"""An attack by input embeddings: vectors behind the question, trained until the true answers come out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.collator import ForgetRetainCollator
from ...data.samplers import shuffled
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX, token_nll
from ...models.causal_lm import bare_model, evaluation_mode, logits_at, max_positions, unwrapped
from ...models.compat import keep_4bit_differentiable
from ...prompts.shared_prefix import prompt_states
from ...prompts.unlearner import SoftPromptUnlearner
from ..metrics.likelihood import response_batches
from ..metrics.scoring import check_numbers
from .relearning import check_disjoint


@dataclass(frozen=True)
class SuffixAttack:
    """What a soft suffix brought out.

    Each set of scores has, one number per row, `accuracy`: whether greedy decoding gives the completion; `loss`: its
    negative log-likelihood in nats; and `probability`: the geometric mean of its tokens', as TOFU has it.

    Attributes:
        suffix: (m, d), the trained embeddings, on the CPU.
        before: scores of the held-out rows without a suffix.
        after: scores of the held-out rows with it; on forget rows better with a low accuracy.
        trained: scores of the rows that it was trained on.
    """

    suffix: Tensor
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]


def soft_suffix(
    model: nn.Module,
    rows: Dataset,
    held_out: Dataset,
    collator: ForgetRetainCollator,
    num_virtual_tokens: int = 8,
    steps: int = 100,
    lr: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    progress: str | None = None,
) -> SuffixAttack:
    """Train one suffix of input embeddings to bring out the completions of some forget rows, and try it on others.

    It stands behind every prompt's text, before the completion, and starts as embeddings of random tokens; AdamW on
    the completions' negative log-likelihood, the model frozen. Enough such vectors teach any model any answer: run the
    same on a model that never saw the rows, and count what comes out beyond that.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul. It stays as it is.
        rows: `prompt` and `completion`, to train on.
        held_out: other forget rows.
        collator: for tokenizing and padding; the suffix does not count into its `max_length`.
        num_virtual_tokens: m, how many vectors.
        steps: of the training.
        lr: learning rate; vocabularies' embeddings have a spread of about 0.02 in most families.
        batch_size: rows per step, and per forward.
        seed: of the start, and of the order of the rows.
        progress: a name to show a progress bar under; none unless given.

    Raises:
        ValueError: if a number is out of range, `held_out` shares prompts with `rows`, rows do not fit the model's
            positions, or the model is under a prompt and has no plain key/value cache.
        TypeError: if the model is under a prompt of PEFT that is no `SoftPromptUnlearner`.

    Source: Schwinn et al., *Soft Prompt Threats*, https://arxiv.org/abs/2402.09063; why it needs the comparison,
    *Soft Token Attacks Cannot Reliably Audit Unlearning*, https://arxiv.org/abs/2502.15836
    """
    check_disjoint(rows, held_out)
    if num_virtual_tokens < 1 or steps < 1 or not lr > 0 or batch_size < 1:
        raise ValueError(
            f"num_virtual_tokens={num_virtual_tokens}, steps={steps}, lr={lr}, batch_size={batch_size}; expected "
            "whole numbers of at least 1, and lr above 0."
        )
    model = unwrapped(model)
    is_peft = isinstance(model, PeftModel) and not isinstance(model, SoftPromptUnlearner)
    if is_peft and cast(PeftModel, model).active_peft_config.is_prompt_learning:
        raise TypeError("the model is under a prompt of PEFT; load it by SoftPromptUnlearner.from_pretrained.")
    keep_4bit_differentiable(model)
    base: Any = bare_model(model)
    embed = base.get_input_embeddings()
    device = embed.weight.device
    # Room for the placeholders, so that each row's text is what it is without a suffix.
    roomy = ForgetRetainCollator(collator.tokenizer, None, collator.encoder.max_length + num_virtual_tokens)
    few, others = (_with_places(some, collator, num_virtual_tokens) for some in (rows, held_out))
    generator = torch.Generator().manual_seed(seed)
    with evaluation_mode(model), _frozen(model):
        before = _scores(model, _with_places(held_out, collator, 0), roomy, batch_size, None)
        with torch.no_grad():
            start = embed(torch.randint(embed.weight.shape[0], (num_virtual_tokens,), generator=generator).to(device))
        suffix = nn.Parameter(start.to(torch.promote_types(start.dtype, torch.float32)))
        optimizer = torch.optim.AdamW([suffix], lr, weight_decay=0.0)
        batches = shuffled(len(few), batch_size, generator)
        for _ in tqdm(range(steps), desc=progress, disable=progress is None, leave=False):
            places = next(batches)
            batch = {name: value.to(device) for name, value in roomy.encoder.batch([few[i] for i in places]).items()}
            positions, targets = response_positions(batch["labels"])
            optimizer.zero_grad()
            token_nll(_logits(model, batch, positions, suffix), targets).sum(dim=1).mean().backward()
            optimizer.step()
        found = suffix.detach()
        return SuffixAttack(
            found.cpu(),
            before,
            _scores(model, others, roomy, batch_size, found),
            _scores(model, few, roomy, batch_size, found),
        )


def _with_places(rows: Dataset, collator: ForgetRetainCollator, num: int) -> Dataset:
    """Rows as token ids, with placeholders between prompt and completion: where the suffix comes to stand."""
    encoded = [collator.encoder.encode(row) for row in rows]
    return Dataset.from_list(
        [
            {
                "input_ids": e.prompt_ids + [0] * num + e.completion_ids,
                "completion_mask": [0] * (len(e.prompt_ids) + num) + [1] * len(e.completion_ids),
            }
            for e in encoded
        ]
    )


def _logits(model: nn.Module, batch: dict[str, Tensor], positions: Tensor, suffix: Tensor | None) -> Tensor:
    """Logits (B, K, V) at the response positions, the suffix in the places before the first of them."""
    base: Any = bare_model(model)
    mask = batch["attention_mask"]
    embeds = base.get_input_embeddings()(batch["input_ids"])
    if suffix is not None:
        columns, last = torch.arange(embeds.shape[1], device=embeds.device), positions[:, :1]
        is_place = (columns > last - len(suffix)) & (columns <= last)
        embeds = embeds.masked_scatter(is_place[..., None], suffix.to(embeds.dtype).repeat(len(mask), 1))
    is_prompted = isinstance(model, SoftPromptUnlearner) and model.enabled
    states = prompt_states(model) if is_prompted else None
    if is_prompted and states is None:
        raise ValueError(f"{type(base).__name__} has no plain key/value cache, which a prompt and a suffix need.")
    num_virtual, limit = states.num_virtual_tokens if states else 0, max_positions(base)
    if limit is not None and num_virtual + embeds.shape[1] > limit:
        raise ValueError(
            f"{num_virtual} virtual tokens and {embeds.shape[1]} tokens with the suffix exceed the model's {limit} "
            "positions; give the collator a smaller max_length, or take a shorter suffix."
        )
    if states is None:
        return logits_at(model, positions, inputs_embeds=embeds, attention_mask=mask)
    return logits_at(
        base,
        positions,
        inputs_embeds=embeds,
        **states.prefix_inputs(base, mask),
        use_cache=True,
    )


@torch.no_grad()
def _scores(
    model: nn.Module, rows: Dataset, collator: ForgetRetainCollator, batch_size: int, suffix: Tensor | None
) -> dict[str, np.ndarray]:
    """Accuracy, loss and probability of rows with their placeholders."""
    device = next(model.parameters()).device
    found = {name: np.zeros(len(rows)) for name in ("accuracy", "loss", "probability")}
    for batch in response_batches(rows, collator, batch_size, device, None):
        logits = _logits(model, batch.inputs, batch.positions, suffix)
        is_unused = batch.targets == IGNORE_INDEX
        nll = token_nll(logits, batch.targets).sum(dim=1).double()
        check_numbers(nll)
        found["accuracy"][batch.places] = ((logits.argmax(dim=-1) == batch.targets) | is_unused).all(dim=1).cpu()
        found["loss"][batch.places] = nll.cpu()
        found["probability"][batch.places] = (-nll / (~is_unused).sum(dim=1)).exp().cpu()
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within it no parameter of the model requires a gradient, so that its prompt is computed once and kept."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
