"""Free-form answers: generated greedily, and compared with the true ones by ROUGE-L."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ...data.collator import ForgetRetainCollator
from ...data.samplers import by_length
from ...models.causal_lm import bare_model, evaluation_mode, max_positions, unwrapped
from ...prompts.unlearner import SoftPromptUnlearner
from .likelihood import check_rows


class RougeL(NamedTuple):
    """ROUGE-L per row, in 0..1; high is better on retain rows, low on forget rows.

    Attributes:
        recall: (rows,), the longest common subsequence of words, as a share of the true answer's words.
        f1: (rows,), the harmonic mean of that and of the share of the given answer's words.
    """

    recall: np.ndarray
    f1: np.ndarray


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    rows: Dataset,
    collator: ForgetRetainCollator,
    batch_size: int = 32,
    max_new_tokens: int = 200,
    progress: str | None = None,
) -> list[str]:
    """What a model answers to each row's prompt: greedy decoding, whatever the model's own generation settings say.

    An answer ends before the end-of-sequence token, after `max_new_tokens`, or where the model has no more positions.
    The prompts are those that are scored: `collator` leaves room for the true completion.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        collator: for tokenizing.
        batch_size: rows per call of `generate`; fewer where prompts have more than 256 tokens.
        max_new_tokens: the most tokens of an answer; TOFU takes 200.
        progress: a name to show a progress bar under; none unless given.

    Returns:
        One text per row, without special tokens.

    Raises:
        TypeError: if `rows` are no `datasets.Dataset`.
        ValueError: if there are no rows, or a prompt fills all of the model's positions.
    """
    check_rows(rows)
    model, tokenizer = unwrapped(model), collator.tokenizer
    base: Any = bare_model(model)
    ends = end_tokens(base, tokenizer.eos_token_id)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    prompts = [collator.encoder.encode(row).prompt_ids for row in rows]
    batches = list(_batches(model, [len(ids) for ids in prompts], batch_size, max_new_tokens))
    answers = [""] * len(prompts)
    device = next(model.parameters()).device
    generate: Any = model.generate
    with evaluation_mode(model), bare_generation(model):
        for places in tqdm(batches, desc=progress, disable=progress is None, leave=False):
            width = max(len(prompts[i]) for i in places)
            room = room_to_answer(model, width, max_new_tokens)
            ids = torch.full((len(places), width), pad)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(places):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=greedy(room, pad, ends),
            )
            for row, i in enumerate(places):
                said = before_end(out[row, width:].tolist(), ends)
                answers[i] = str(tokenizer.decode(said, skip_special_tokens=True))
    return answers


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> RougeL:
    """ROUGE-L of answers against the true ones, by the `rouge-score` package with stemming, as TOFU has it.

    TOFU reports the recall, which a long answer does not lower; MUSE the F1. Words are runs of the letters a-z and
    digits: text in another script has none and scores 0.

    Args:
        answers: what the model said.
        references: the true answers.

    Raises:
        ImportError: if `rouge-score` is not installed.
        ValueError: if the numbers of texts differ.

    Source: Lin, *ROUGE*, 2004, https://aclanthology.org/W04-1013; TOFU, https://arxiv.org/abs/2401.06121; MUSE,
    https://arxiv.org/abs/2407.06460
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers and {len(references)} references; expected one for each.")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs rouge-score: pip install rouge-score") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    found = [scorer.score(target, answer)["rougeL"] for target, answer in zip(references, answers, strict=True)]
    return RougeL(np.array([score.recall for score in found]), np.array([score.fmeasure for score in found]))


def room_to_answer(model: nn.Module, width: int, max_new_tokens: int) -> int:
    """How many tokens an answer to a prompt of `width` tokens may have, by the model's positions and as asked.

    Raises:
        ValueError: if there is no room at all.
    """
    num_virtual, limit = num_virtual_tokens(model), max_positions(bare_model(model))
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - num_virtual - width)
    if room < 1:
        raise ValueError(
            f"{num_virtual} virtual tokens and a prompt of {width} tokens leave no room in the model's {limit} "
            "positions to answer; give the collator a smaller max_length."
        )
    return room


@contextmanager
def bare_generation(model: nn.Module) -> Iterator[None]:
    """Within it the model has no generation settings of its own, which `generate` would mix into those it is given."""
    holders: list[Any] = [m for m in {unwrapped(model), bare_model(model)} if hasattr(m, "generation_config")]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


def greedy(max_new_tokens: int, pad: int, ends: list[int]) -> GenerationConfig:
    """Greedy decoding, within `bare_generation`."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends or None
    )


def end_tokens(base: Any, eos: int | None) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's generation config names."""
    own = base.generation_config.eos_token_id
    listed = own if isinstance(own, (list, tuple)) else [own]
    return list(dict.fromkeys(int(token) for token in (eos, *listed) if token is not None))


def before_end(tokens: list[int], ends: list[int]) -> list[int]:
    cut = next((k for k, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:cut]


def _is_prompted(model: nn.Module) -> bool:
    if not isinstance(model, PeftModel) or not model.has_active_enabled_adapter:
        return False
    return bool(model.active_peft_config.is_prompt_learning)


def num_virtual_tokens(model: Any) -> int:
    return int(model.active_peft_config.num_virtual_tokens) if _is_prompted(model) else 0


def _pads_behind_prompt(model: nn.Module) -> bool:
    """Whether pads would stand between the virtual tokens and the row: PEFT's own generate does not set that right."""
    return _is_prompted(model) and not isinstance(model, SoftPromptUnlearner)


def _batches(model: nn.Module, lengths: Sequence[int], batch_size: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Places of rows of like length, the longest first.

    A batch has the room that its longest row leaves, so only rows that all have room for `max_new_tokens` are mixed:
    an answer is the same whatever its row shares a batch with.
    """
    limit = max_positions(bare_model(model))
    mixed = max(lengths) if limit is None else limit - num_virtual_tokens(model) - max_new_tokens
    if _pads_behind_prompt(model):
        mixed = 0
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(max(length, mixed), []).append(i)
    for _, group in sorted(groups.items(), reverse=True):
        for places in by_length([lengths[i] for i in group], batch_size):
            yield [group[place] for place in places]
