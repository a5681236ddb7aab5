"""The record `spul_config.json` that is saved with a prompt or with unlearning layers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .digests import DataSummary, RewrittenRows, fingerprint
from .fields import check_fields, check_format, plain_metrics, read_object
from .files import find_file, write_text
from .messages import warn
from .weights import file_digest

if TYPE_CHECKING:
    from torch import nn

SPUL_CONFIG_NAME = "spul_config.json"
FORMAT_VERSION = 2  # of spul_config.json; higher once a field's meaning changes. 2: digests of rows are keyed
LIBRARIES = ("spul", "torch", "transformers", "peft", "datasets", "accelerate")


@dataclass
class SpulConfig:
    """Content of `spul_config.json`: how a prompt or unlearning layers were trained, and their metrics.

    Args:
        loss: the loss's terms and weights, as `UnlearningLoss.to_dict`; None if not known.
        generic_completions: the responses that forget rows were trained to; None if not known.
        base_model_name_or_path: the base's name; None if not known.
        base_fingerprint: `fingerprint` of the base; None if not known.
        forget: summary of the forget set, its digest keyed by the owner's secret; None if not known.
        retain: summary of the retain set, likewise; None if not known.
        rewritten: rewritten rows that were trained on as well, which `forget` and `retain` do not count; written only
            where there were any.
        combined_from: of a prompt or layers that several requests were combined into: the summary of each request's
            forget set, None where not known.
        prompt_position: where the prompt stands in each row, `"start"` or `"message"`; the latter alone is written.
        metrics: metric values by split and name, `{"test_forget": {"accuracy": 0.02}}`.
        versions: library versions by name.
        weights_sha256: SHA-256 of the weights' file beside the record, set by `save_pretrained`; None if not known.
        replaced_weights_sha256: SHA-256 of the weights that a save is about to replace; None once it has.
        unknown: fields of other versions, which are saved again as they were.
        name: folder (its last part) or Hub name that the adapter was last saved to or loaded from; not saved.
    """

    loss: dict[str, Any] | None = None
    generic_completions: list[str] | None = None
    base_model_name_or_path: str | None = None
    base_fingerprint: str | None = None
    forget: DataSummary | None = None
    retain: DataSummary | None = None
    rewritten: RewrittenRows | None = None
    combined_from: list[DataSummary | None] | None = None
    prompt_position: str = "start"
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    weights_sha256: str | None = None
    replaced_weights_sha256: str | None = None
    unknown: dict[str, Any] = field(default_factory=dict)
    name: str | None = field(default=None, compare=False)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `spul_config.json` into a folder; of a local base's path, its last part only.

        Raises:
            ValueError: if a field has another type than documented, or a value out of range.
        """
        data = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        del data["name"]
        data |= {name: value for name, value in data.pop("unknown").items() if name not in data}
        check_fields(data, f"the {type(self).__name__} to save")
        data["metrics"] = plain_metrics(self.metrics)
        if self.base_model_name_or_path is not None:
            data["base_model_name_or_path"] = without_local_path(self.base_model_name_or_path)
        if self.prompt_position == "start":
            del data["prompt_position"]
        for name in ("rewritten", "replaced_weights_sha256"):
            if data[name] is None:
                del data[name]
        text = json.dumps(data, indent=2, ensure_ascii=False, default=_plain)
        write_text(Path(folder, SPUL_CONFIG_NAME), text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> SpulConfig:
        """Read a `spul_config.json`; fields that this version does not know are kept in `unknown`.

        Digests of rows in a record of format 1 are plain, and are dropped; the counts stay.

        Raises:
            ValueError: if it is not JSON, of a later format, or a field has another type or range than documented.
        """
        data = read_object(path)
        found = data.pop("format_version", 1)  # records of the first versions have none
        check_format(found, FORMAT_VERSION, path)
        check_fields(data, str(path))
        known = {f.name for f in dataclasses.fields(cls)} - {"unknown", "name"}
        config = cls(**{key: value for key, value in data.items() if key in known})
        config.unknown = {key: value for key, value in data.items() if key not in known}
        config.forget, config.retain = (_summary(data.get(name), found) for name in ("forget", "retain"))
        if (made := data.get("rewritten")) is not None:
            config.rewritten = RewrittenRows(made["forget"], made["retain"], made["ways"])
        if config.combined_from is not None:
            config.combined_from = [_summary(part, found) for part in data["combined_from"]]
        return config

    def save_with_weights(self, folder: Path, target: Path, weights: str) -> None:
        """Write the record of weights that are in a scratch folder, before they are moved to their target.

        A process killed between the two moves leaves new weights with an old record, or the reverse. So the record in
        the target, if there is one, is first replaced by this one, which then names the weights of both saves.

        Args:
            folder: the scratch folder, with the new weights.
            target: the folder that its files are about to be moved to.
            weights: name of the weights' file.
        """
        self.weights_sha256, self.name = file_digest(folder / weights), without_local_path(os.fspath(target))
        self.save(folder)
        if (target / SPUL_CONFIG_NAME).is_file() and (target / weights).is_file():
            dataclasses.replace(self, replaced_weights_sha256=file_digest(target / weights)).save(target)

    def take_weights_of(self, other: SpulConfig) -> None:
        """Take what another record says of its weights, where they are loaded into those of this one."""
        self.metrics, self.weights_sha256, self.name = other.metrics, other.weights_sha256, other.name

    def check_weights(self, path: str | os.PathLike) -> None:
        """Raise if a weights' file is not the one that this record describes.

        Args:
            path: the file; records without a digest are accepted.

        Raises:
            ValueError: if its SHA-256 is another.

        Warns:
            UserWarning: if the file predates the record, as after an interrupted save.
        """
        if self.weights_sha256 is None:
            return
        found = file_digest(path)
        if found == self.replaced_weights_sha256 != self.weights_sha256:
            warn(
                f"{path} is older than the {SPUL_CONFIG_NAME} beside it, as after an interrupted save: data and "
                "metrics there may not be those of these weights. Save again, or take another checkpoint.",
            )
        elif found != self.weights_sha256:
            raise ValueError(
                f"{path} has the SHA-256 {found[:12]}..., but weights_sha256 in {SPUL_CONFIG_NAME} is "
                f"{self.weights_sha256[:12]}...: the weights are damaged, or not those that the record describes. "
                "Copy or download the whole folder again; if you changed them on purpose, remove weights_sha256."
            )

    def set_base(self, base: nn.Module) -> None:
        """Fill in the base's name, its fingerprint unless there is one, and the installed versions, before saving."""
        self.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        self.versions = library_versions()
        if self.base_fingerprint is None:
            self.base_fingerprint = fingerprint(base)

    def warn_if_base_differs(self, base: nn.Module, loaded: str, advice: str) -> None:
        """Warn if the base's weights are not the ones trained on, as far as fingerprints show.

        Args:
            base: the base to run on.
            loaded: subject and verb of the message, such as `"the prompt in 'folder' was"`.
            advice: a sentence on what to do.
        """
        if self.base_fingerprint is None:
            return
        found = fingerprint(base)
        if found is not None and found != self.base_fingerprint:
            warn(
                f"{loaded} trained on other weights than this base has (fingerprint {self.base_fingerprint[:12]}, "
                f"this base's {found[:12]}) and may neither forget nor retain here. {advice} If it is the same "
                "checkpoint in float16 or quantized, evaluate before you rely on it.",
            )


def without_local_path(name: str) -> str:
    """A model's name; the last part of a local folder's path, whose other parts tell about the user's machine."""
    if os.path.isdir(name) or os.path.isabs(name) or name.startswith("~"):
        return os.path.basename(os.path.abspath(name))
    return PureWindowsPath(name).name if PureWindowsPath(name).drive else name


def _plain(value: Any) -> Any:
    """Plain form of what JSON cannot hold: numbers of NumPy and torch, and options of terms that are not spul's."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _summary(data: dict[str, Any] | None, format_version: int) -> DataSummary | None:
    if data is None:
        return None
    return DataSummary(data["rows"], data.get("digest") if format_version > 1 else None)  # no fields of later versions


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
    config = SpulConfig() if path is None else SpulConfig.load(path)
    config.name = without_local_path(os.fspath(adapter))
    return config
