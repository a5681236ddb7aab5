"""Gates joined into one, and gates loaded from folders, of any kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..data.checks import checked_strings, checked_texts
from ..records.digests import digest
from ..records.files import find_file
from ..records.weights import file_digest
from .files import SETTINGS_NAME, SavedGate, read_gate
from .gate import KINDS, Gate, as_gate, parts_of
from .names import NameGate
from .state import StateGate
from .text import TextGate
from .thresholds import GateReport

# Gates within gates that a folder may hold; the threshold of gates joined.
DEEPEST, THRESHOLD = 8, 0.0


class AnyGate(Gate):
    """A gate that flags what at least one of several gates flags, and every text on which one of them fails.

    A text's score is the largest distance of a gate's score from that gate's threshold; distances of different kinds
    of gates are in different units. There is no report until one is measured: `gate.report = gate.measure(...)`.

    Args:
        gates: one or more gates, or functions from a list of texts to a bool for each. Their failures are counted in
            the `failures` of each of them.

    Raises:
        TypeError: if one is neither.
        ValueError: if there are none.
    """

    kind = "any"

    def __init__(self, gates: Sequence[Gate | Callable[[list[str]], Any]]) -> None:
        if isinstance(gates, Gate) or callable(gates):
            raise TypeError(f"gates is {gates!r}; expected a list of gates: [{gates!r}].")
        self.gates = [as_gate(gate) for gate in gates]
        if not self.gates:
            raise ValueError("gates is empty; expected at least one.")

    @property
    def threshold(self) -> float:
        """0: a score is a distance from a gate's own threshold. Those of its gates may be assigned, this one not."""
        return THRESHOLD

    @threshold.setter
    def threshold(self, value: float) -> None:
        raise ValueError(
            f"threshold={value!r}: an AnyGate has none of its own; assign those of its gates, gate.gates[0].threshold."
        )

    def parts(self) -> list[Gate]:
        """Itself and the parts of its gates, each once."""
        return [self, *parts_of(self.gates)]

    def decide(self, texts: Sequence[str]) -> np.ndarray:
        """Whether one of the gates flags each text, or fails on it: bool (texts,)."""
        texts = checked_strings(texts)
        return np.logical_or.reduce([gate.flags(texts) for gate in self.gates])

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """The largest of the gates' scores, each less its threshold: float64 (texts,).

        Raises:
            Exception: whatever one of the gates raises.
        """
        texts = checked_texts(texts)
        return np.max([gate.scores(texts) - gate.threshold for gate in self.gates], axis=0)

    def identity(self) -> str:
        """Digest of what its gates decide by."""
        return digest([self._kind_or_class(), [gate.identity() for gate in self.gates]])

    def check_savable(self) -> None:
        """Raise if it, or one of its gates, cannot be saved."""
        super().check_savable()
        for gate in self.gates:
            gate.check_savable()

    def write(self, folder: str | os.PathLike) -> None:
        """Write each gate to a folder of its own, `0`, `1`, ..., within an existing folder, and `gate.json` beside."""
        self.check_savable()
        for i, gate in enumerate(self.gates):
            Path(folder, str(i)).mkdir()
            gate.write(Path(folder, str(i)))
        digests = [file_digest(Path(folder, str(i), SETTINGS_NAME)) for i in range(len(self.gates))]
        self._write(folder, {"gates_sha256": digests})

    @classmethod
    def restored(
        cls, saved: SavedGate, report: GateReport | None, model: Any, tokenizer: Any, depth: int = 0
    ) -> AnyGate:
        """The gate of a saved folder.

        Raises:
            FileNotFoundError: if one of its gates is missing.
            ValueError: if one is damaged, or was saved at another time than the others.
        """
        gates = []
        for hub, saved_digest in _within(saved, depth):
            path = find_file(saved.folder, SETTINGS_NAME, **hub)
            if path is not None and file_digest(path) != saved_digest:
                raise ValueError(
                    f"{path} is not the file that was saved with {saved.path} (gates_sha256); copy or download the "
                    "whole folder again, or save the gate anew."
                )
            gates.append(_load(saved.folder, model, tokenizer, depth + 1, hub))
        gate = cls(gates)
        gate.report = report
        return gate

    def __repr__(self) -> str:
        return f"AnyGate({self.gates})"


KINDS.update({each.kind: each for each in (NameGate, TextGate, StateGate, AnyGate)})


def load(folder: str | os.PathLike, model: Any = None, tokenizer: Any = None, **hub: Any) -> Gate:
    """The gate in a folder that `save` wrote, of any kind.

    Args:
        folder: a local folder or a Hub repository's name.
        model: the base, or any unlearner on it; needed by a `StateGate` alone.
        tokenizer: its tokenizer; likewise.
        hub: `subfolder`, `revision` and other arguments of `hf_hub_download`; locally only `subfolder` counts.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError: if an argument is not one of the Hub's, or `model` is no model.
        ValueError: if a file is damaged, of another kind or of a later version, a `StateGate` has no model or
            tokenizer, or was fit on another base or tokenizer.
    """
    return _load(folder, model, tokenizer, 0, hub)


def needs_base(folder: str | os.PathLike, depth: int = 0, **hub: Any) -> bool:
    """Whether a saved gate, or one within it, needs the base, as a `StateGate` does.

    Args:
        folder: as in `load`.
        depth: how many gates it stands within.
        hub: as in `load`.

    Raises:
        FileNotFoundError: if a gate's settings are missing.
        ValueError: if they are damaged, or of a later version.
    """
    saved = read_gate(folder, **hub)
    if saved.kind != AnyGate.kind:
        return bool(saved.kind == StateGate.kind)
    return any(needs_base(folder, depth + 1, **inner) for inner, _ in _within(saved, depth))


def _within(saved: SavedGate, depth: int) -> list[tuple[dict[str, Any], str]]:
    """Where the gates of a saved `AnyGate` are, as arguments of the Hub's, and the digest saved of each."""
    saved.check(
        {
            "gates_sha256": (lambda value: isinstance(value, list) and value != [], "a digest for each gate"),
            "threshold": (lambda value: value == THRESHOLD, f"{THRESHOLD}"),
        }
    )
    if depth == DEEPEST:
        raise ValueError(f"{saved.path} holds gates within gates within gates, {DEEPEST} deep; expected fewer.")
    top = PurePosixPath(saved.hub.get("subfolder") or "")
    return [({**saved.hub, "subfolder": str(top / str(i))}, one) for i, one in enumerate(saved.fields["gates_sha256"])]


def _load(folder: str | os.PathLike, model: Any, tokenizer: Any, depth: int, hub: dict[str, Any]) -> Gate:
    saved = read_gate(folder, **hub)
    if saved.kind not in KINDS:
        raise ValueError(f"{saved.path}: kind is {saved.kind!r}; expected one of {', '.join(KINDS)}.")
    try:
        report = None if saved.fields["report"] is None else GateReport.from_dict(saved.fields["report"])
    except ValueError as error:
        raise ValueError(f"{saved.path}: {error}") from error
    deeper = {"depth": depth} if saved.kind == AnyGate.kind else {}
    return KINDS[saved.kind].restored(saved, report, model, tokenizer, **deeper)
