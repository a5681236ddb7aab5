"""The training set: forget and retain rows joined, with a flag and a number for each row."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset, concatenate_datasets

from .checks import check_rows
from .rows import SHOWN, is_empty, shortened


def forget_retain_dataset(forget: Dataset, retain: Dataset) -> Dataset:
    """Join a forget set and a retain set into one data set.

    Args:
        forget: rows in prompt-completion form: columns `prompt` and `completion`, both strings, or both lists of
            `{"role", "content"}` messages. Other columns stay.
        retain: rows of the same form.

    Returns:
        All rows, forget rows first, with the columns `is_forget` (bool) and `row_id` (int, from 0).

    Raises:
        TypeError: if one is not a `datasets.Dataset`.
        ValueError: if a set is empty or lacks a column, a prompt is missing, a completion is empty, or a prompt is in
            both sets.
    """
    prompts: dict[str, list[str]] = {}
    for name, rows in (("forget", forget), ("retain", retain)):
        check_rows(rows, name=name)
        prompts[name] = _checked_prompts(name, rows)

    retained = {text: i for i, text in reversed(list(enumerate(prompts["retain"])))}
    if both := [(i, text) for i, text in enumerate(prompts["forget"]) if text in retained]:
        shown = "; ".join(
            f"forget row {i} = retain row {retained[text]}: {shortened(repr(text))}" for i, text in both[:SHOWN]
        )
        raise ValueError(
            f"{len(both)} prompt(s) are in both sets and would be forgotten and retained at once: {shown}. Remove "
            "them from one."
        )
    forget, retain = (
        rows.remove_columns([name for name in ("is_forget", "row_id") if name in rows.column_names])
        for rows in (forget, retain)
    )
    forget = forget.add_column("is_forget", [True] * len(forget))
    retain = retain.add_column("is_forget", [False] * len(retain))
    joined = concatenate_datasets([forget, retain])
    return joined.add_column("row_id", list(range(len(joined))))


def _checked_prompts(name: str, rows: Dataset) -> list[str]:
    """The prompts as comparable strings, after a check of every row."""
    texts, bad_prompts, bad_completions = [], [], []
    for i, (prompt, completion) in enumerate(zip(rows["prompt"], rows["completion"], strict=True)):
        if (
            not _is_text_or_messages(prompt)
            or not (_is_text_or_messages(completion) or completion in (None, []))
            or isinstance(prompt, str) != isinstance(completion, str)
        ):
            bad_prompts.append(i)
        if completion is None or (_is_text_or_messages(completion) and is_empty(completion)) or completion == []:
            bad_completions.append(i)
        texts.append(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))
    if bad_completions:
        raise ValueError(
            f"{len(bad_completions)} row(s) of the {name} set have an empty completion: "
            + "; ".join(f"row {i}: {shortened(repr(rows[i]))}" for i in bad_completions[:SHOWN])
            + ". Expected the answer, as text or messages."
        )
    if bad_prompts:
        raise ValueError(
            f"{len(bad_prompts)} row(s) of the {name} set have a prompt that cannot be used: "
            + "; ".join(f"row {i}: {shortened(repr(rows[i]))}" for i in bad_prompts[:SHOWN])
            + ". Expected prompt and completion to be strings, or both lists of {'role', 'content'} messages."
        )
    return texts


def _is_text_or_messages(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)
