"""What a saved prompt says about itself: `spul_config.json`, the base's fingerprint, the digests of the data."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .digests import DataSummary, fingerprint
from .files import find_file, write_text

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


SPUL_CONFIG_NAME = "spul_config.json"
LIBRARIES = ("spul", "torch", "transformers", "peft", "datasets", "accelerate")


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
        write_text(Path(folder, SPUL_CONFIG_NAME), text + "\n")

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


def read_spul_config(adapter: str | os.PathLike, **hub: Any) -> SpulConfig:
    """An adapter's `spul_config.json`; an empty record if plain PEFT made it."""
    path = find_file(adapter, SPUL_CONFIG_NAME, **hub)
    return SpulConfig() if path is None else SpulConfig.load(path)


def warn_of_other_weights(base: Any, record: SpulConfig, what: str, advice: str, stacklevel: int) -> None:
    """Warn if the base's weights are not those that a record was made with."""
    if record.base_fingerprint is None:
        return
    here = fingerprint(base)
    if here is not None and here != record.base_fingerprint:
        warnings.warn(
            f"{what} trained on other weights than this base has (fingerprint {record.base_fingerprint[:12]} against "
            f"{here[:12]}): what is loaded may neither forget nor retain here. {advice} If it is the same checkpoint "
            "in float16 or quantized, evaluate before you rely on it.",
            stacklevel=stacklevel,
        )
