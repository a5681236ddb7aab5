"""The record `spul_config.json` that is saved with a prompt or with unlearning layers."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from .digests import DataSummary, fingerprint
from .files import find_file, write_text

SPUL_CONFIG_NAME = "spul_config.json"
LIBRARIES = ("spul", "torch", "transformers", "peft", "datasets", "accelerate")


@dataclass
class SpulConfig:
    """Content of `spul_config.json`: how a prompt or unlearning layers were trained, and their metrics.

    Args:
        loss: the loss's terms and weights, as `UnlearningLoss.to_dict`; None if not known.
        generic_completions: the responses that forget rows were trained to; None if not known.
        base_model_name_or_path: the base's name; None if not known.
        base_fingerprint: `fingerprint` of the base; None if not known.
        forget: summary of the forget set; None if not known.
        retain: summary of the retain set; None if not known.
        combined_from: of a prompt or layers that several requests were combined into: the summary of each request's
            forget set, None where not known.
        metrics: metric values by split and name, `{"test_forget": {"accuracy": 0.02}}`.
        versions: library versions by name.
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
        write_text(Path(folder, SPUL_CONFIG_NAME), text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> SpulConfig:
        """Read a `spul_config.json`; fields that this version does not know are ignored."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(cls)}
        config = cls(**{key: value for key, value in data.items() if key in known})
        config.forget, config.retain = _summary(data.get("forget")), _summary(data.get("retain"))
        if config.combined_from is not None:
            config.combined_from = [_summary(part) for part in data["combined_from"]]
        return config

    def set_base(self, base: nn.Module) -> None:
        """Fill in the base's name, its fingerprint unless there is one, and the installed versions, before saving."""
        self.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        self.versions = library_versions()
        if self.base_fingerprint is None:
            self.base_fingerprint = fingerprint(base)

    def warn_if_base_differs(self, base: nn.Module, loaded: str, advice: str, stacklevel: int) -> None:
        """Warn if the base's weights are not the ones trained on, as far as fingerprints show.

        Args:
            base: the base to run on.
            loaded: subject and verb of the message, such as `"the prompt in 'folder' was"`.
            advice: a sentence on what to do.
            stacklevel: as in `warnings.warn`, counted from this method's caller.
        """
        if self.base_fingerprint is None:
            return
        found = fingerprint(base)
        if found is not None and found != self.base_fingerprint:
            warnings.warn(
                f"{loaded} trained on other weights than this base has (fingerprint {self.base_fingerprint[:12]}, "
                f"this base's {found[:12]}) and may neither forget nor retain here. {advice} If it is the same "
                "checkpoint in float16 or quantized, evaluate before you rely on it.",
                stacklevel=stacklevel + 1,
            )


def _summary(data: dict[str, Any] | None) -> DataSummary | None:
    return None if data is None else DataSummary(data["rows"], data["digest"])  # ignores fields of later versions


def requests_of(records: Iterable[SpulConfig]) -> list[DataSummary | None]:
    """Summary of each request's forget set; a combined record counts as the requests that it was combined from."""
    found: list[DataSummary | None] = []
    for record in records:
        found += [record.forget] if record.combined_from is None else record.combined_from
    return found


def library_versions() -> dict[str, str]:
    """Installed versions of `LIBRARIES`, by name."""
    return {name: version(name) for name in LIBRARIES}


def read_spul_config(adapter: str | os.PathLike, **hub: Any) -> SpulConfig:
    """Record of a saved adapter, local or on the Hub; an empty one if plain PEFT saved it.

    Args:
        adapter: a local folder or a Hub repository's name.
        hub: arguments of `find_file`.
    """
    path = find_file(adapter, SPUL_CONFIG_NAME, **hub)
    return SpulConfig() if path is None else SpulConfig.load(path)
