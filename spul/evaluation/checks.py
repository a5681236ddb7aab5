"""Checks of what `evaluate` is given, before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from datasets import Dataset
from torch import nn

from ..data.checks import check_rows, check_side
from ..data.encoder import RowEncoder
from ..data.formats import PromptFormat
from ..data.row_checks import check_can_be_scored
from ..data.unlearning_data import SPLITS, UnlearningData
from ..models.causal_lm import bare_model, check_model, num_embeddings, unwrapped
from ..models.compat import is_sharded
from ..models.sharding import check_layers_alone
from ..models.unlearner import unlearner_of
from ..records.files import check_can_hold
from .attack_settings import AttackSettings
from .measures import MEASURES
from .metrics.scoring import with_adapter_names

KINDS: dict[str, tuple[Any, str]] = {
    "neighbors": (Mapping, "a dict of data sets: neighbors={'same names': rows}"),
    "questions": (Mapping, "a dict of TOFU's perturbed files: questions={'forget': rows}"),
    "question_format": (PromptFormat, "a PromptFormat"),
    "attacks": (AttackSettings, "AttackSettings(...)"),
    "seed": (Integral, "a whole number"),
    "output_dir": ((str, os.PathLike), "the path of a folder"),
}
LAST_SEED = 2**32 - 1  # that all generators of draws take
QUESTIONS = ("forget", "retain", "real_authors", "world_facts")  # TOFU's perturbed files


def check_names(measures: Sequence[str], questions: Iterable[str] = ()) -> None:
    """Raise unless measures and sets of questions are known.

    Raises:
        TypeError: if `measures` is one name, or `questions` are rows without the name of their set.
        ValueError: if a name is unknown.
    """
    if isinstance(questions, Dataset):
        raise TypeError(
            f"questions is a Dataset; expected a dict of some of {', '.join(QUESTIONS)}: questions={{'forget': rows}}."
        )
    if isinstance(measures, str):
        raise TypeError(f"measures={measures!r} is one name; expected a list: [{measures!r}].")
    if unknown := [name for name in measures if name not in MEASURES]:
        raise ValueError(f"measures {unknown} are not known; expected some of {', '.join(MEASURES)}.")
    if other := sorted(set(questions) - set(QUESTIONS)):
        raise ValueError(f"questions {other}: expected {', '.join(QUESTIONS[:-1])} and {QUESTIONS[-1]}.")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the types of arguments of `evaluate`, and that no set of neighbors has the name of another set.

    Args:
        arguments: some of them, by name; None is none.

    Raises:
        FileExistsError: if `output_dir` is a file, or in one.
        PermissionError: if it may not be written to.
        TypeError: if one is of another type.
        ValueError: if the seed is out of range, neighbors have the name of a split, or `"unseen"`, or `output_dir` is
            empty.
    """
    for name, (kind, expected) in KINDS.items():
        value = arguments.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            shown = f", {value!r:.80}" if isinstance(value, (str, bool, float)) else ""
            raise TypeError(f"{name} is a {type(value).__name__}{shown}; expected {expected}.")
    if (seed := arguments.get("seed")) is not None and not 0 <= seed <= LAST_SEED:
        raise ValueError(f"seed={seed}: expected a whole number from 0 to {LAST_SEED}.")
    if taken := sorted({*SPLITS, "unseen"} & set(arguments.get("neighbors") or ())):
        raise ValueError(f"neighbors {taken} have the name of another set of rows; give them one of their own.")
    if not hasattr(texts := arguments.get("unrelated_texts", ()), "__len__"):
        raise TypeError(f"unrelated_texts is a {type(texts).__name__}; expected a list of texts, [] for none.")
    if (folder := arguments.get("output_dir")) is not None:
        check_can_hold(folder)


def checked_splits(
    splits: UnlearningData | Mapping[str, Dataset], others: Mapping[str, Dataset]
) -> dict[str, Dataset]:
    """The four splits in their order, once they and all other sets of rows are checked.

    Args:
        splits: as in `evaluate`.
        others: the neighbors, and `unseen`.

    Raises:
        TypeError: if the splits, or rows, are of another type.
        ValueError: if a split is missing or unknown, a set has no rows, or a column `is_forget` contradicts a split's
            name.
    """
    if not isinstance(splits, (UnlearningData, Mapping)):
        raise TypeError(f"splits is a {type(splits).__name__}; expected UnlearningData, or a dict of {list(SPLITS)}.")
    sets = {name: splits.rows(name) for name in SPLITS} if isinstance(splits, UnlearningData) else dict(splits)
    if missing := [name for name in SPLITS if name not in sets]:
        raise ValueError(f"splits lack {missing}; they have {list(sets)}.")
    if unknown := [name for name in sets if name not in SPLITS]:
        raise ValueError(
            f"splits have {unknown} beside {list(SPLITS)}; give rows that no model was trained on as unseen=, rows "
            "near the forget rows as neighbors=, and leave out others."
        )
    sets = {name: sets[name] for name in SPLITS}
    for name, rows in {**sets, **others}.items():
        check_rows(rows, name=name)
        if name in sets:
            check_side(rows, name.endswith("_forget"), name)
    return sets


def check_sets_can_be_scored(encoder: RowEncoder, sets: Mapping[str, Any], models: Iterable[nn.Module]) -> None:
    """Check that all rows can be encoded, and that all models embed the tokens of the first ones.

    Args:
        encoder: of the rows.
        sets: all sets of rows, by name: data sets or lists.
        models: without wrappers.

    Raises:
        ValueError: if a row cannot be used, or a token has no embedding.
    """
    sizes = [num for one in models if (num := num_embeddings(one)) is not None]
    for name, rows in sets.items():
        check_can_be_scored(encoder, name, rows, min(sizes, default=None))


def checked_models(given: Mapping[str, Any], measures: Sequence[str]) -> dict[str, nn.Module]:
    """The models that are given, by the arguments' names, without wrappers.

    Args:
        given: `model`, and the others or None.
        measures: the names of the measures.

    Raises:
        TypeError: if one is no model in memory, or is under a prompt of PEFT that the measures do not support.
        ValueError: if one is sharded otherwise than by `shard_layers`, or two share a base.
    """
    for name, one in given.items():
        if one is not None or name == "model":
            check_model(one, name)
    models = {name: unwrapped(one) for name, one in given.items() if one is not None}
    for name, one in models.items():
        if is_sharded(one):
            check_layers_alone(one, name)
        _check_prompt(name, one, measures)
    bare = [bare_model(one) for one in models.values()]
    if len({id(one) for one in bare}) < len(bare):
        raise ValueError(
            f"{', '.join(models)} share a base; load each of them for itself, and leave base= out of them."
        )
    return models


def _check_prompt(name: str, model: nn.Module, measures: Sequence[str]) -> None:
    """Raise if a model is under a prompt of PEFT that the measures do not support."""
    unlearner = unlearner_of(model)
    try:
        unlearner.check_measurable()
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if (
        "soft suffix" in measures
        and name in ("model", "retrained")
        and not (unlearner.follows_embeddings or unlearner.reads_tokens)
    ):
        raise TypeError(
            f"{name} is under a prompt of PEFT, which the soft suffix cannot follow; load it by "
            "SoftPromptUnlearner.from_pretrained, or leave 'soft suffix' out of measures."
        )


def named_sets(
    model: nn.Module, sets: Mapping[str, Dataset], adapter_names: Mapping[str, Sequence[str] | str]
) -> dict[str, Dataset]:
    """The sets of rows with a column that names each row's prompt.

    Args:
        model: the unlearned model, without wrappers.
        sets: all sets of rows, by name.
        adapter_names: as in `evaluate`.

    Raises:
        ValueError: if names are not given for all sets, or do not fit their rows or the model's prompts.
    """
    if not isinstance(adapter_names, Mapping) or set(adapter_names) != set(sets):
        found = (
            f"for {sorted(adapter_names)}"
            if isinstance(adapter_names, Mapping)
            else f"a {type(adapter_names).__name__}"
        )
        raise ValueError(f"adapter_names is {found}; expected a dict with names for each set of rows: {sorted(sets)}.")
    return {name: with_adapter_names(model, rows, adapter_names[name], name) for name, rows in sets.items()}
