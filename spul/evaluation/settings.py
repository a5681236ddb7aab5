"""The identity of an evaluation: models, rows and settings, by which a folder's evaluation resumes or is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.unlearner import unlearner_of
from ..records.digests import (
    canonical_json,
    digest,
    digest_of_parameters,
    digest_of_rows,
    digest_of_tokenizer,
)
from ..records.spul_config import library_versions
from .suite import Suite

# Fields of a PEFT config that say where the adapter came from, not what it does.
FORMAT = 2  # of the files in a folder
ORIGINS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def settings_of(suite: Suite, models: Mapping[str, nn.Module], measures: Sequence[str]) -> dict[str, Any]:
    """The settings that distinguish evaluations, as JSON; digests stand for models, rows and texts.

    Args:
        suite: models, rows and settings.
        models: the given models, by the arguments' names, without wrappers.
        measures: the names of the measures, in their order.
    """
    sets = {**suite.splits, **{f"neighbors: {name}": rows for name, rows in suite.neighbors.items()}}
    if suite.unseen is not None:
        sets["unseen"] = suite.unseen
    attacks = dataclasses.asdict(dataclasses.replace(suite.attacks, inputs=None, paraphrase=None))
    attacks["paraphrase"] = None if suite.attacks.paraphrase is None else _name_of(suite.attacks.paraphrase)
    attacks["inputs"] = None if suite.attacks.inputs is None else sorted(map(str, suite.attacks.inputs))
    question_format = suite.question_format
    settings = {
        "format": FORMAT,
        "models": {name: digests_of_model(model) for name, model in models.items()},
        "names": {name: getattr(getattr(model, "config", None), "model_type", "") for name, model in models.items()},
        "rows": {name: {"rows": len(rows), "digest": digest_of_rows(rows)} for name, rows in sets.items()},
        "unrelated_texts": digest_of_rows(suite.unrelated_texts),
        "questions": {name: digest_of_rows(rows) for name, rows in suite.questions.items()},
        "question_format": {"class": type(question_format).__qualname__, **dataclasses.asdict(question_format)},
        "tokenizer": digest_of_tokenizer(suite.collator.tokenizer),
        "generic_completions": suite.collator.generic_completions,
        "max_length": suite.collator.encoder.max_length,
        "text_field": suite.collator.encoder.text_field,
        "append_eos": suite.collator.encoder.append_eos,
        "max_new_tokens": suite.max_new_tokens,
        "free_form": suite.is_free_form,
        "dtype": str(next(iter(models["model"].parameters())).dtype).removeprefix("torch."),
        "measures": list(measures),
        "attacks": attacks,
        "seed": suite.seed,
        "versions": library_versions() | {"torch": torch.__version__},
    }
    return json.loads(canonical_json(settings))


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
