"""Alternate answers of forget rows, written by the model itself, for AltPO."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.checks import check_rows, forget_flags
from ..data.conversations import content_of, last_user_message
from ..data.encoded import Encoded
from ..data.rows import completion_text, normalized, rows_at, shortened, with_column
from ..data.text_encoder import TextEncoder
from ..evaluation.metrics.free_form import answering
from ..models.causal_lm import max_positions
from ..models.unlearner import detached_base
from ..records.fields import is_count, is_finite_number

logger = logging.getLogger(__name__)

# Our own words: the authors have a prompt for each model.
TEMPLATE = (
    "Question: {prompt}\nAnswer: {completion}\n"
    "Another answer to this question, just as plausible, in which every fact is a different one:"
)
STOPS = ("\n", "Question:", "Answer:")
MAX_ROUNDS = 4


def add_alternates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    num: int = 5,
    *,
    column: str = "alternates",
    template: str = TEMPLATE,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Dataset:
    """A data set with alternate answers to its forget rows, sampled from the model: the preferred responses of AltPO.

    As in arXiv 2409.13474 the model that is to forget is asked for other plausible answers, given the question and
    its answer, five times at temperature 1, whatever the model's own generation settings, of which the authors'
    program keeps top-k and top-p. An answer ends at the first line break. One that is empty, the row's own, or there
    already is sampled anew, up to four times. Base models write few that are worth training to: read some.

    Args:
        model: the model before training; adapters are disabled.
        tokenizer: the model's.
        dataset: rows with `prompt`, `completion` and `is_forget`.
        num: alternates of a row, above 0.
        column: name of the new column: a list of texts, empty for retain rows.
        template: the request, with `{prompt}` and `{completion}`; of a conversation the last message of the user. It
            is put to the model through the chat template where rows are conversations.
        max_new_tokens: of an answer.
        temperature: of the sampling, above 0.
        seed: of the sampling; the global state of the random number generators stays as it is.
        batch_size: rows per call of `generate`, each with `num` answers.
        progress: whether to show a progress bar.

    Returns:
        The data set with the column.

    Raises:
        TypeError: if the dataset is no `datasets.Dataset`.
        ValueError: if a column is missing or exists, there are no forget rows, the template lacks a field, a number is
            out of range, a request is longer than the positions, a row gets no alternate, or a transform of the rows
            leaves the column out.
    """
    check_rows(dataset, name="dataset")
    flags = forget_flags(dataset, "dataset")
    if column in dataset.column_names or not any(flags):
        reason = f"has a column {column!r} already" if column in dataset.column_names else "has no forget rows"
        raise ValueError(f"dataset {reason}; expected forget rows without one.")
    with_column(dataset.select([0]), column, [[""]])  # raises where a transform would lose it, before hours of work
    if "{prompt}" not in template or "{completion}" not in template:
        raise ValueError(f"template={template!r}: expected a text with {{prompt}} and {{completion}}.")
    for name, value in (("num", num), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not is_count(value, 1):
            raise ValueError(f"{name}={value!r}: expected a whole number above 0.")
    if not is_finite_number(temperature) or temperature <= 0:
        raise ValueError(f"temperature={temperature!r}: expected a number above 0.")
    indices = [i for i, is_forget in enumerate(flags) if is_forget]
    rows = dict(zip(indices, rows_at(dataset, indices), strict=True))
    requests = {i: Encoded(_request(row, template, tokenizer), []) for i, row in rows.items()}
    found: dict[int, list[str]] = {i: [] for i in indices}
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": num}
    with detached_base(model) as base, answering(base, tokenizer) as answers_to, torch.random.fork_rng():
        torch.manual_seed(seed)
        _check_room(base, list(requests.values()), max_new_tokens)
        for _ in range(MAX_ROUNDS):
            missing = [i for i in indices if len(found[i]) < num]
            starts = range(0, len(missing), batch_size)
            for start in tqdm(starts, "alternates", disable=not progress, leave=False):
                some = missing[start : start + batch_size]
                answers = iter(answers_to([requests[i] for i in some], max_new_tokens, **settings))
                for i in some:
                    _keep(found[i], [next(answers) for _ in range(num)], completion_text(rows[i]["completion"]), num)
    if empty := [i for i in indices if not found[i]]:
        raise ValueError(
            f"{len(empty)} rows, such as {shortened(repr(rows[empty[0]]))}, got no answer other than their own in "
            f"{MAX_ROUNDS} rounds of {num}; pass a higher temperature or another template, or write the column "
            f"{column!r} yourself."
        )
    if fewer := sum(len(texts) < num for texts in found.values()):
        logger.warning("%d of %d forget rows have fewer than %d alternates.", fewer, len(indices), num)
    return with_column(dataset, column, [found.get(i, []) for i in range(len(dataset))])


def _request(row: Mapping[str, Any], template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that ask for another answer to a row."""
    prompt, answer = row["prompt"], completion_text(row["completion"]).strip()
    question = prompt if isinstance(prompt, str) else _last_question(prompt)
    fields = {"{prompt}": question.strip(), "{completion}": answer}
    text = re.sub(
        r"\{prompt\}|\{completion\}", lambda found: fields[found[0]], template
    )  # at once: texts may hold both
    if not isinstance(prompt, str):
        messages = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return TextEncoder(tokenizer).whole_ids(text, tokenizer(text)["input_ids"])


def _last_question(prompt: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last message of the user, or of the last one without any."""
    last = last_user_message(prompt)
    return content_of(prompt[-1 if last is None else last]) or ""


def _check_room(base: Any, requests: Sequence[Encoded], max_new_tokens: int) -> None:
    width, most = max(len(one.prompt_ids) for one in requests), max_positions(base)
    if most is not None and width + max_new_tokens > most:
        raise ValueError(
            f"a request of {width} tokens and an answer of {max_new_tokens} exceed the model's {most} positions; "
            "lower max_new_tokens, or shorten the template or the rows."
        )


def _keep(found: list[str], texts: Sequence[str], own: str, num: int) -> None:
    """Add what is new and neither empty nor the row's own answer, with the white space that its own begins with."""
    lead = own[: len(own) - len(own.lstrip())]
    for text in texts:
        answer = text.lstrip()
        for stop in STOPS:
            answer = answer.partition(stop)[0]
        answer = lead + answer.strip()
        if len(found) < num and normalized(answer) not in ("", normalized(own), *map(normalized, found)):
            found.append(answer)
