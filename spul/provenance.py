"""What a saved prompt says about itself: `spul_config.json`, the base's fingerprint, the digests of the data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

SPUL_CONFIG_NAME = "spul_config.json"
# What PEFT puts between a module and its parameters.
WRAPPERS = r"\.((base_layer|original_module|token_adapter)\.)+"
LIBRARIES = ("spul", "torch", "transformers", "peft", "datasets", "accelerate")


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


@dataclass
class SpulConfig:
    """The content of `spul_config.json`; every field may be unknown (None).

    Args:
        loss: the loss's terms and weights, as `UnlearningLoss.to_dict`.
        generic_completions: the responses that forget rows were trained to.
        base_model_name_or_path: the base's name.
        base_fingerprint: as `fingerprint`.
        forget: summary of the forget set.
        retain: summary of the retain set.
        combined_from: for a prompt that was made of others, the summary of each one's forget set, None where it is not
            known.
        metrics: what was measured: split to measure to number, `{"test_forget": {"accuracy": 0.02}}`.
        versions: library versions.
    """

    loss: dict[str, Any] | None = None
    generic_completions: list[str] | None = None
    base_model_name_or_path: str | None = None
    base_fingerprint: str | None = None
    forget: DataSummary | None = None
    retain: DataSummary | None = None
    combined_from: list[DataSummary | None] | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `spul_config.json` into a folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, default=repr)
        Path(folder, SPUL_CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> SpulConfig:
        """Read a `spul_config.json`; fields that this version does not know are left out."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(cls)}
        config = cls(**{key: value for key, value in data.items() if key in known})
        config.forget, config.retain = _summary(data.get("forget")), _summary(data.get("retain"))
        if config.combined_from is not None:
            config.combined_from = [_summary(part) for part in data["combined_from"]]
        return config


def _summary(data: dict[str, Any] | None) -> DataSummary | None:
    """A summary as it was read; fields that this version does not know are left out."""
    return None if data is None else DataSummary(data["rows"], data["digest"])


def requests_of(records: Iterable[SpulConfig]) -> list[DataSummary | None]:
    """The forget set of each request; what was combined or fused itself counts as what it was made of."""
    found: list[DataSummary | None] = []
    for record in records:
        found += [record.forget] if record.combined_from is None else record.combined_from
    return found


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that a prompt depends on."""
    return {name: version(name) for name in LIBRARIES}


def fingerprint(model: nn.Module, samples_per_tensor: int = 256) -> str | None:
    """A cheap digest of a model's weights.

    Hashes the name, the shape and up to `samples_per_tensor` evenly spaced entries, rounded to bfloat16, of every
    parameter, so that a checkpoint loaded in float32 or bfloat16 has one fingerprint. It sees another model, another
    revision, a fine-tuned copy. It does not see a change confined to entries between the samples or below bfloat16's
    precision, nor buffers; the same checkpoint in float16 or quantised may have another fingerprint.

    Args:
        model: the base model, without adapters.
        samples_per_tensor: entries read of each parameter.

    Returns:
        64 hexadecimal digits; None if some weights are not in memory (meta device, disk offload).
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper would change the names
    return digest_of(own_parameters(model), samples_per_tensor)


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


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters by the names that they have without PEFT's adapters, and none of the adapters'."""
    adapters = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapters += [f"{name}.{layer}." for layer in module.adapter_layer_names]
        elif isinstance(module, ModulesToSaveWrapper):
            adapters.append(f"{name}.modules_to_save.")
    prefixes = tuple(adapters)
    for name, parameter in model.named_parameters():
        if not name.startswith(prefixes):
            yield re.sub(WRAPPERS, ".", name), parameter


def summarise_rows(rows: Iterable[Mapping[str, Any]]) -> DataSummary:
    """Count and digest rows by their `prompt` and `completion` (or, tokenised, `input_ids` and `completion_mask`)."""
    digests = []
    for row in rows:
        content = [row.get(key) for key in ("prompt", "completion")]
        if content[0] is None:
            content = [[int(i) for i in row[key]] for key in ("input_ids", "completion_mask")]
        digests.append(hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).digest())
    return DataSummary(len(digests), hashlib.sha256(b"".join(sorted(digests))).hexdigest())
