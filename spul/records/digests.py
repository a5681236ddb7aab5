"""What a saved prompt says about itself: `spul_config.json`, the base's fingerprint, the digests of the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.compat import own_parameters, uncompiled


@dataclass
class DataSummary:
    """How many rows a set had, and a digest of them; never the rows.

    Args:
        rows: number of rows.
        digest: SHA-256 over the sorted row digests: the same rows in any order give the same digest. Who guesses the
            whole set can confirm the guess, and so can who knows all rows but one.
    """

    rows: int
    digest: str


def fingerprint(model: nn.Module, samples_per_tensor: int = 256) -> str | None:
    """A cheap digest of a model's weights.

    Hashes the name, the shape and up to `samples_per_tensor` evenly spaced entries, rounded to bfloat16, of every
    parameter, so that a checkpoint loaded in float32 or bfloat16 has one fingerprint. It sees another model, another
    revision, a fine-tuned copy. It does not see a change confined to entries between the samples or below bfloat16's
    precision, nor buffers; the same checkpoint in float16 or quantized may have another fingerprint.

    Args:
        model: the base model, without adapters.
        samples_per_tensor: entries read of each parameter.

    Returns:
        64 hexadecimal digits; None if some weights are not in memory (meta device, disk offload).
    """
    return digest_of(own_parameters(uncompiled(model)), samples_per_tensor)


def digest_of(parameters: Iterable[tuple[str, nn.Parameter]], samples_per_tensor: int = 256) -> str | None:
    """The digest of `fingerprint`, of any named parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        if parameter.device.type == "meta":
            return None
        flat = parameter.detach().reshape(-1)
        picked = torch.linspace(0, flat.numel() - 1, min(samples_per_tensor, flat.numel()), dtype=torch.float64)
        values = flat[picked.round().long().to(flat.device)]
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.uint8)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def summarize_rows(rows: Iterable[Mapping[str, Any]]) -> DataSummary:
    """Count and digest rows by their `prompt` and `completion` (or, tokenized, `input_ids` and `completion_mask`)."""
    digests = []
    for row in rows:
        content = [row.get(key) for key in ("prompt", "completion")]
        if content[0] is None:
            content = [[int(i) for i in row[key]] for key in ("input_ids", "completion_mask")]
        digests.append(hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).digest())
    return DataSummary(len(digests), hashlib.sha256(b"".join(sorted(digests))).hexdigest())


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides how texts become tokens: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
    for changing in ("padding", "truncation"):  # as the last call left them
        rules.pop(changing, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest([rules, special, tokenizer.chat_template])


def _digest(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()


def _text(value: Any) -> str:
    """As JSON; a set, which has another order in each process, as a sorted list."""
    return json.dumps(value, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x))


def digest_of_rows(rows: Sequence[Any] | Dataset) -> str:
    """To know the same rows or texts by, in the same order: draws are of places, and seeds are joined row by row."""
    if isinstance(rows, Dataset) and "prompt" in rows.column_names:
        rows = rows.select_columns(["prompt", "completion"])
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()
