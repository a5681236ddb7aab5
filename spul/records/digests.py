"""Digests (SHA-256) of a model's weights, of rows, of a tokenizer, and of settings.

Two digests of rows exist. `summarize_rows` ignores the order and is saved with an adapter; `digest_of_rows` depends on
the order and identifies the rows of an evaluation. Their values never agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.compat import own_parameters, uncompiled


@dataclass
class DataSummary:
    """Number of rows of a set and a digest of them, without the rows.

    Whoever guesses the whole set can confirm the guess by the digest; so can whoever knows all rows but one.

    Args:
        rows: number of rows.
        digest: SHA-256 over the sorted digests of the rows, which does not depend on their order.
    """

    rows: int
    digest: str


# ---- settings ----


def canonical_json(value: Any) -> str:
    """JSON with sorted keys; sets become sorted lists, other objects that JSON lacks their `str`."""
    # A set of strings has another order in each process.
    return json.dumps(value, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x))


def digest(value: Any) -> str:
    """SHA-256 of a value's `canonical_json`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# ---- weights ----


def fingerprint(model: nn.Module, samples_per_tensor: int = 256) -> str | None:
    """Cheap digest of a model's weights, by which another base is noticed.

    Hashes the name, the shape and up to `samples_per_tensor` evenly spaced entries, rounded to bfloat16, of every
    parameter. A checkpoint has one fingerprint in float32 and bfloat16; in float16 or quantized it may have another.
    Another model, another revision and a fine-tuned copy have other fingerprints. Not noticed: changes confined to
    entries between the samples, changes below bfloat16's precision, and changes of buffers.

    Args:
        model: the base model, without adapters.
        samples_per_tensor: maximum number of entries read from each parameter.

    Returns:
        64 hexadecimal digits; None if some weights are not in memory (meta device, disk offload).
    """
    return digest_of_parameters(own_parameters(uncompiled(model)), samples_per_tensor)


def digest_of_parameters(parameters: Iterable[tuple[str, nn.Parameter]], samples_per_tensor: int = 256) -> str | None:
    """Digest of named parameters, as `fingerprint` computes it for a base's own ones."""
    found = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        if parameter.device.type == "meta":
            return None
        flat = parameter.detach().reshape(-1)
        indices = torch.linspace(0, flat.numel() - 1, min(samples_per_tensor, flat.numel()), dtype=torch.float64)
        values = flat[indices.round().long().to(flat.device)]
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.uint8)
        found.update(f"{name}{tuple(parameter.shape)}".encode())
        found.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---- rows ----


def summarize_rows(rows: Iterable[Mapping[str, Any]]) -> DataSummary:
    """Number and digest of rows, in any order.

    Args:
        rows: rows with `prompt` and `completion`, or tokenized ones with `input_ids` and `completion_mask`; other
            columns do not count.
    """
    encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
    digests = bytearray()
    for row in rows:
        content = [row.get(key) for key in ("prompt", "completion")]
        if content[0] is None:
            content = [[int(i) for i in row[key]] for key in ("input_ids", "completion_mask")]
        digests += hashlib.sha256(encode(content).encode()).digest()
    ordered = np.sort(np.frombuffer(digests, dtype="S32"))  # of one width, so that zeros at an end count
    return DataSummary(len(ordered), hashlib.sha256(ordered.tobytes()).hexdigest())


def digest_of_rows(rows: Any) -> str:
    """Digest of rows or texts in their order, on which an evaluation's random draws depend.

    Args:
        rows: texts or rows; of a dataset with a column `prompt`, only `prompt` and `completion` count.
    """
    if "prompt" in getattr(rows, "column_names", ()):
        rows = rows.select_columns(["prompt", "completion"])
    return digest(list(rows))


# ---- tokenizer ----


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all that determines a text's tokens: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
    for changing in ("padding", "truncation"):  # state of the last call
        rules.pop(changing, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([rules, special, tokenizer.chat_template])
