"""The identity of an evaluation, by which a folder's evaluation resumes or is refused, and what is told of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..data.rows import ADAPTER_NAME
from ..models.causal_lm import bare_model
from ..models.unlearner import unlearner_of
from ..records.digests import (
    DigestKey,
    canonical_json,
    digest,
    digest_of_parameters,
    digest_of_rows,
    digest_of_tokenizer,
    fingerprint,
    summarize_rows,
)
from ..records.spul_config import SpulConfig, library_versions, without_local_path
from ..rivals.rival import Rival
from .attacks.changes import is_conversation
from .suite import Suite

FORMAT = 3  # of the files in a folder
SETS = ("rows", "unrelated_texts", "questions", "attacked_names")  # settings with plain digests of rows or names
# Fields of a PEFT config that say where the adapter came from, not what it does.
ORIGINS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def settings_of(suite: Suite, models: Mapping[str, nn.Module], measures: Sequence[str]) -> dict[str, Any]:
    """The settings that distinguish evaluations, as JSON; digests stand for models, rows and texts.

    The digests of rows are plain and confirm a guess of the rows: what is shared has `published` settings.

    Args:
        suite: models, rows and settings.
        models: the given models, by the arguments' names, without wrappers.
        measures: the names of the measures, in their order.
    """
    attacks = dataclasses.asdict(dataclasses.replace(suite.attacks, inputs=None, paraphrase=None))
    names = list(attacks.pop("names"))
    if not attacks["only"]:  # as settings were saved before there was a choice
        del attacks["only"]
    attacks["paraphrase"] = None if suite.attacks.paraphrase is None else _name_of(suite.attacks.paraphrase)
    attacks["inputs"] = None if suite.attacks.inputs is None else sorted(map(str, suite.attacks.inputs))
    question_format, text_field = suite.question_format, suite.collator.encoder.text_field
    read = {ADAPTER_NAME} if text_field is None else {ADAPTER_NAME, text_field}  # beside prompt and completion
    settings = {
        "format": FORMAT,
        "models": {name: digests_of_model(model) for name, model in models.items()},
        "names": {name: getattr(getattr(model, "config", None), "model_type", "") for name, model in models.items()},
        "rows": {
            # An attack of the caller's may read any column.
            name: _in_order(rows, read if suite.attacks.inputs is None else rows.column_names)
            for name, rows in _sets(suite).items()
        },
        "unrelated_texts": _in_order(suite.unrelated_texts),
        "questions": {name: _in_order(rows, rows.column_names) for name, rows in suite.questions.items()},
        "question_format": {"class": type(question_format).__qualname__, **dataclasses.asdict(question_format)},
        "tokenizer": digest_of_tokenizer(suite.collator.tokenizer),
        "generic_completions": suite.collator.generic_completions,
        "max_length": suite.collator.encoder.max_length,
        "text_field": text_field,
        "append_eos": suite.collator.encoder.append_eos,
        "max_new_tokens": suite.max_new_tokens,
        "free_form": suite.is_free_form,
        "dtype": str(next(iter(models["model"].parameters())).dtype).removeprefix("torch."),
        "measures": list(measures),
        "attacks": attacks,
        "attacked_names": {"names": len(names), "digest": digest(names)} if names else None,
        "seed": suite.seed,
        "versions": library_versions() | {"torch": torch.__version__},
    }
    return json.loads(canonical_json(settings))


def published(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the digests of rows and of adapters' settings, a gate's names among them; counts stay."""
    kept = {name: _without_digests(one) if name in SETS else one for name, one in settings.items()}
    models = {name: {k: v for k, v in one.items() if k != "settings"} for name, one in settings["models"].items()}
    return {**kept, "models": models}


def facts_of(suite: Suite, digest_key: DigestKey | None, examples: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Adapter, base and rows of an evaluation for its readers, in the words and digests of the adapter's record.

    Args:
        suite: models, rows and settings.
        digest_key: the key of the training; None leaves out the digests of rows.
        examples: what each attack on the input asks, as `attack_examples` makes it.

    Returns:
        `adapter` (folder or Hub name, with the gates in front of it, or names and kinds of PEFT's adapters; None if
        not known), `adapter_name` (folder or Hub name alone; None if not known, or of several), `weights_sha256` (of
        its file; None if it was not saved as it is, or of several prompts), `base` (name), `base_fingerprint`,
        `weights_changed` (whether no adapter can be disabled), `method` (what is between base and model, in words),
        `is_gated`, `is_trained`, `attack_examples`, `asks_messages` (whether rows are conversations),
        and `rows`: a `DataSummary` as a dict for each set.
    """
    unlearner = unlearner_of(suite.model)
    base: Any = bare_model(suite.model) if unlearner.has_adapter else suite.base
    record = unlearner.spul_config if unlearner.enabled and unlearner.spul_config is not None else SpulConfig()
    kinds = {name: one.get("peft_type", "layers") for name, one in unlearner.adapter_settings().items()}
    words = {name: getattr(kind, "value", kind) for name, kind in kinds.items()}
    in_words = {name: name if kind == name else f"{name} ({kind})" for name, kind in words.items()}  # a rival's alike
    name = unlearner.name if isinstance(unlearner, Rival) else record.name  # a rival has no record
    if unlearner.is_gated:
        gates = [in_words[name] for name, kind in words.items() if kind.endswith(" gate")]
        if len(words) - len(gates) > 1:  # several prompts, of which none is the adapter
            record, name = SpulConfig(), None
        elif record.name:
            record = dataclasses.replace(record, name=", ".join([record.name, *gates]))
    base_name = getattr(base, "name_or_path", None)
    facts = {
        "adapter": record.name or ", ".join(in_words.values()) or None,
        "adapter_name": name,
        "weights_sha256": record.weights_sha256,
        "base": without_local_path(base_name) if base_name else None,
        "base_fingerprint": None if base is None else fingerprint(base),
        "weights_changed": not unlearner.has_adapter,
        "method": unlearner.in_words,
        "is_gated": unlearner.is_gated,
        "is_trained": unlearner.is_trained,
        "attack_examples": dict(examples or {}),
        "asks_messages": is_conversation(suite.splits["test_forget"]),
        "rows": {name: dataclasses.asdict(summarize_rows(rows, digest_key)) for name, rows in _sets(suite).items()},
    }
    return json.loads(canonical_json(facts))


def _sets(suite: Suite) -> dict[str, Any]:
    sets = {**suite.splits, **{f"neighbors: {name}": rows for name, rows in suite.neighbors.items()}}
    return sets if suite.unseen is None else {**sets, "unseen": suite.unseen}


def _in_order(rows: Any, more_columns: Iterable[str] = ()) -> dict[str, Any]:
    return {"rows": len(rows), "digest": digest_of_rows(rows, more_columns)}


def _without_digests(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_digests(one) for name, one in value.items() if name != "digest"}


def digests_of_model(model: nn.Module) -> dict[str, Any]:
    """A digest of a model's weights, and of the active adapters' names and settings.

    Weights alone do not distinguish models: inactive adapters have weights, too, and LoRA's scale is no weight.
    """
    found: dict[str, Any] = {"weights": digest_of_parameters(model.named_parameters())}
    unlearner = unlearner_of(model)
    if not unlearner.has_adapter:
        return found
    configs = unlearner.adapter_settings()
    settings = {name: {k: v for k, v in one.items() if k not in ORIGINS} for name, one in configs.items()}
    return found | {"adapters": list(settings), "settings": digest(settings)}


def _name_of(function: Callable) -> str:
    """The qualified name of a function, or of a callable object's class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
