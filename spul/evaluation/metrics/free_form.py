"""Free-form answers: generated, and compared with the true ones by ROUGE-L."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...data.batching import by_length
from ...data.characters import is_latin, normal_form, words
from ...data.checks import check_rows
from ...data.encoded import Encoded, left_padded
from ...data.encoder import RowEncoder
from ...data.rows import adapter_names_of, read_rows
from ...models.causal_lm import bare_model, evaluation_mode, max_positions, unwrapped
from ...models.compat_devices import device_of
from ...models.unlearner import unlearner_of
from ...prompts.pads import filled_pads, with_own_tokens
from .scoring import row_arguments


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    rows: Dataset,
    encoder: RowEncoder,
    batch_size: int = 32,
    max_new_tokens: int = 200,
    progress: str | None = None,
) -> list[str]:
    """Answers of a model to each row's prompt: greedy decoding, whatever the model's own generation settings.

    An answer ends before the end-of-sequence token, after `max_new_tokens`, or where the model has no more positions.
    The prompts are those that are scored: `encoder` leaves room for the true completion.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: `prompt` and `completion`, or tokenized.
        encoder: turns rows into token ids.
        batch_size: rows per call of `generate`; fewer where prompts have more than 256 tokens.
        max_new_tokens: maximum length of an answer, in tokens; TOFU uses 200.
        progress: label of a progress bar; None shows none.

    Returns:
        One text per row, without special tokens.

    Raises:
        TypeError: if `rows` is not a `datasets.Dataset`.
        ValueError: if there are no rows, or a prompt fills all of the model's positions.
    """
    check_rows(rows, columns=())
    model = unwrapped(model)
    given = list(read_rows(rows))
    prompts, adapter_names = [encoder.encode(row) for row in given], adapter_names_of(given)
    named = adapter_names is not None
    batches = list(_batches(model, [len(one.prompt_ids) for one in prompts], batch_size, max_new_tokens, named))
    answers = [""] * len(prompts)
    with answering(model, encoder.tokenizer) as answers_to:
        for indices in tqdm(batches, desc=progress, disable=progress is None, leave=False):
            names = None if adapter_names is None else [adapter_names[i] for i in indices]
            found = answers_to([prompts[i] for i in indices], max_new_tokens, names, do_sample=False)
            for i, answer in zip(indices, found, strict=True):
                answers[i] = answer
    return answers


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """ROUGE-L of answers against the true ones, by the `rouge-score` package with stemming, as in TOFU.

    Higher is better on retain rows, lower on forget rows. TOFU reports the recall, which a long answer does not lower;
    MUSE the F1. Words are runs of the letters a-z and digits, as in that package. Where the true answer has another
    script than Latin, whose letters that package drops, its words count, too, as they are; of scripts without spaces
    between words each character is a word.

    Args:
        answers: the generated texts.
        references: the true answers.

    Returns:
        (texts,) each, in 0..1: `rouge_l_recall`, the longest common subsequence of words as a share of the true
        answer's words; `rouge_l_f1`, the harmonic mean of that and of the share of the generated answer's words.

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
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise ImportError("ROUGE-L needs rouge-score: pip install rouge-score") from error
    latin = RougeScorer(["rougeL"], use_stemmer=True)
    other = RougeScorer(["rougeL"], tokenizer=_WordsOfAnyScript(DefaultTokenizer(use_stemmer=True)))
    found = [
        (latin if is_latin(target) else other).score(target, answer)["rougeL"]
        for target, answer in zip(references, answers, strict=True)
    ]
    return {
        "rouge_l_recall": np.array([score.recall for score in found]),
        "rouge_l_f1": np.array([score.fmeasure for score in found]),
    }


class _WordsOfAnyScript:
    """A tokenizer for `rouge-score`: words of other scripts as they are, Latin ones as its own tokenizer has them."""

    def __init__(self, latin: Any) -> None:
        self._of_latin = latin.tokenize

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in small letters."""
        found = words(normal_form("NFKC", text).lower())
        return [token for word in found for token in (self._of_latin(word) if is_latin(word) else [word])]


# ---- generation ----


@contextmanager
def answering(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., list[str]]]:
    """Context manager: the model in evaluation mode and without generation settings of its own.

    `generate` would mix the model's own settings into those that it is given.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt, not wrapped.
        tokenizer: pads the prompts and decodes the answers.

    Yields:
        A function of encoded rows, whose prompts it answers, `max_new_tokens`, names of the rows' soft prompts (or
        None) and further fields of a `GenerationConfig`; it returns the generated texts, without special tokens,
        `num_return_sequences` for each prompt. It raises a ValueError if the longest prompt leaves no room to answer.
    """
    base: Any = bare_model(model)
    generate: Any = model.generate
    own = base.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    ends = list(dict.fromkeys(int(token) for token in ends if token is not None))
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    device = device_of(model)

    def before_end(tokens: list[int]) -> list[int]:
        return tokens[: next((k for k, token in enumerate(tokens) if token in ends), len(tokens))]

    def answers_to(
        prompts: Sequence[Encoded], max_new_tokens: int, adapter_names: list[str] | None = None, **settings: Any
    ) -> list[str]:
        batch = {name: value.to(device) for name, value in left_padded(prompts, pad).items()}
        width = batch["input_ids"].shape[1]
        config = GenerationConfig(
            max_new_tokens=_room_to_answer(model, width, max_new_tokens, adapter_names is not None),
            pad_token_id=pad,
            eos_token_id=ends or None,
            **settings,
        )
        own = row_arguments(model, adapter_names, batch.pop("prompt_position", None))
        own["generation_config"] = config
        unlearner = unlearner_of(model)
        if not (unlearner.hides_pads and unlearner.enabled):
            size, encoder_size = config.no_repeat_ngram_size, config.encoder_no_repeat_ngram_size
            penalty, rows = config.encoder_repetition_penalty, (batch["input_ids"], batch["attention_mask"])
            own = with_own_tokens(own, size, encoder_size, penalty, *rows)
            batch["input_ids"] = filled_pads(*rows)
        out = generate(**batch, **own)
        tokens = [before_end(row) for row in out[:, width:].tolist()]
        return [str(tokenizer.decode(some, skip_special_tokens=True)) for some in tokens]

    holders: list[Any] = [m for m in {model, bare_model(model)} if hasattr(m, "generation_config")]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        with evaluation_mode(model), unlearner_of(model).cached_prompts():
            yield answers_to
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config


def _virtual_tokens(model: nn.Module, named: bool) -> int:
    unlearner = unlearner_of(model)
    return unlearner.longest_prompt if named else unlearner.virtual_tokens_in_use


def _room_to_answer(model: nn.Module, width: int, max_new_tokens: int, named: bool) -> int:
    """Maximum number of new tokens after a prompt of `width` tokens: `max_new_tokens`, or what positions are left."""
    num_virtual, limit = _virtual_tokens(model, named), max_positions(bare_model(model))
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - num_virtual - width)
    if limit is not None and room < 1:
        both = limit - num_virtual
        answer = max_new_tokens if both - max_new_tokens >= 2 else both // 2
        raise ValueError(
            f"{num_virtual} virtual tokens and a prompt of {width} tokens leave no room in the model's {limit} "
            f"positions to answer; use max_length={both - answer}, which leaves {answer} tokens to an answer."
        )
    return room


def _batches(
    model: nn.Module, lengths: Sequence[int], batch_size: int, max_new_tokens: int, named: bool
) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, the longest first.

    A batch has the room that its longest row leaves, so only rows that all have room for `max_new_tokens` are mixed:
    a row's answer does not depend on the other rows of its batch.
    """
    limit = max_positions(bare_model(model))
    mixed = max(lengths) if limit is None else limit - _virtual_tokens(model, named) - max_new_tokens
    if unlearner_of(model).pads_between and unlearner_of(model).enabled:
        mixed = 0
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(max(length, mixed), []).append(i)
    for _, group in sorted(groups.items(), reverse=True):
        for some in by_length([lengths[i] for i in group], batch_size):
            yield [group[i] for i in some]
