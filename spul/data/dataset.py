"""One data set out of a forget set and a retain set."""

from __future__ import annotations

import json
from collections.abc import Sized
from typing import Any

from datasets import Dataset, concatenate_datasets

SHOWN = 3


def forget_retain_dataset(forget: Dataset, retain: Dataset) -> Dataset:
    """Join a forget set and a retain set into one, marked row by row.

    Args:
        forget: rows in prompt-completion form: columns `prompt` and `completion`, both strings, or both lists of
            `{"role", "content"}` messages. Other columns are carried along.
        retain: rows of the same form.

    Returns:
        All rows, forget rows first, with the columns `is_forget` (bool) and `row_id` (int, the row's place here).

    Raises:
        TypeError: if one is not a `datasets.Dataset`.
        ValueError: if a set is empty or lacks a column, if a prompt is missing or a completion empty, or if a prompt
            stands in both sets, where it would be asked to be forgotten and kept at once.
    """
    prompts: dict[str, list[str]] = {}
    for name, rows in (("forget", forget), ("retain", retain)):
        if not isinstance(rows, Dataset):
            raise TypeError(
                f"{name} is a {type(rows).__name__}; expected a datasets.Dataset: Dataset.from_list([{{'prompt': ..., "
                "'completion': ...}, ...]), or one split of a DatasetDict."
            )
        if len(rows) == 0:
            raise ValueError(f"the {name} set is empty; expected at least one row.")
        if missing := {"prompt", "completion"} - set(rows.column_names):
            raise ValueError(
                f"the {name} set lacks the column(s) {sorted(missing)}; it has {rows.column_names}. "
                "Expected the prompt-completion form: rename or map your columns."
            )
        prompts[name] = _checked_prompts(name, rows)

    kept = set(prompts["retain"])
    if both := [(i, text) for i, text in enumerate(prompts["forget"]) if text in kept]:
        where = {text: i for i, text in reversed(list(enumerate(prompts["retain"])))}
        raise ValueError(
            f"{len(both)} prompt(s) stand in both sets, so that they would be forgotten and kept at once: "
            + "; ".join(f"forget row {i} = retain row {where[text]}: {_short(text)}" for i, text in both[:SHOWN])
            + ". Remove them from one."
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
    """The prompts as comparable strings, after a look at every row."""
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
            + "; ".join(f"row {i}: {_short(rows[i])}" for i in bad_completions[:SHOWN])
            + ". Expected what the model should answer, as text."
        )
    if bad_prompts:
        raise ValueError(
            f"{len(bad_prompts)} row(s) of the {name} set have a prompt that cannot be used: "
            + "; ".join(f"row {i}: {_short(rows[i])}" for i in bad_prompts[:SHOWN])
            + ". Expected prompt and completion to be strings, or both lists of {'role', 'content'} messages."
        )
    return texts


def is_empty(completion: Any) -> bool:
    """Whether a completion says nothing."""
    if isinstance(completion, str):
        return not completion.strip()
    return not completion or not str(completion[-1].get("content") or "").strip()


def _is_text_or_messages(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def _short(value: Any, width: int = 160) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def forget_flags(rows: Any) -> list[bool]:
    """The `is_forget` flags of a training set.

    Raises:
        ValueError: if the rows have none.
    """
    if isinstance(rows, Sized) and hasattr(rows, "column_names"):
        if "is_forget" not in rows.column_names:
            raise ValueError(
                f"train_dataset has the columns {rows.column_names} and no is_forget; make it with "
                "forget_retain_dataset(forget, retain)."
            )
        return [bool(flag) for flag in rows["is_forget"]]  # type: ignore[index]
    return [bool(row["is_forget"]) for row in rows]
