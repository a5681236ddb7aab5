"""The plan of a measurement: the systems that are compared, the settings to choose among, the rule of the choice."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paper.experiment import Experiment
from paper.runs import Setup

from spul.records.fields import is_count

KINDS = ("model", "prompt", "gated", "lora", "refusal", "guardrail", "examples", "corruption")
TRAINED = ("prompt", "gated", "lora")


@dataclass(frozen=True)
class System:
    """One of the compared systems.

    Args:
        name: as tables call it.
        kind: one of `KINDS`, which says how it is built.
        settings: those that all candidates share. `steps` among them are of a chosen one, in place of the plan's.
        candidates: settings to choose among, on held-out training rows; empty where there is nothing to choose.
        settings_of: name of the system whose chosen settings it has, but for its own `settings`.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    settings_of: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind={self.kind!r}; expected one of {', '.join(KINDS)}.")
        if any("steps" in one for one in self.candidates):
            raise ValueError(f"{self.name}: a candidate has steps; all are tried with the plan's choosing_steps.")
        if "steps" in self.settings and self.kind not in TRAINED:
            raise ValueError(f"{self.name}: steps, and a system of kind {self.kind!r} is not trained; leave them out.")
        for one in (self.settings, *self.candidates):
            share = one.get("forget_size", 1.0)
            if not 0 < share <= 1 or ("forget_size" in one and self.kind not in ("prompt", "gated")):
                raise ValueError(
                    f"{self.name}: forget_size={share!r}, kind={self.kind!r}; expected a share above 0 and up to 1, "
                    "of the forget rows that a prompt trains on."
                )
        steps = self.settings.get("steps", 1)
        if not is_count(steps, least=1):
            raise ValueError(f"{self.name}: steps={steps!r}; expected an integer of at least 1.")
        if self.settings_of is not None and (self.candidates or not self.settings):
            raise ValueError(
                f"{self.name}: settings_of={self.settings_of!r} goes with settings that differ and without candidates."
            )

    def candidate(self, i: int) -> dict[str, Any]:
        """The settings of a candidate, without steps, which are the plan's."""
        return {name: value for name, value in (self.settings | self.candidates[i]).items() if name != "steps"}


@dataclass(frozen=True)
class Plan:
    """A plan, as its file has it.

    Args:
        setup: fields of `paper.runs.Setup` that all seeds share. Without `dataset`, the data is a folder of four
            splits that the command names.
        seeds: of data, memorizing and unlearning.
        choosing_seed: the seed on whose held-out training rows settings are chosen.
        held_out: share of the training rows of each side to choose on.
        choosing_steps: training steps of a candidate.
        steps: training steps of a chosen one whose system does not say.
        margin: retain accuracy that a candidate may lose, as a share.
        penalty: what each point of retain accuracy beyond the margin counts, in points of forget accuracy.
        attacked: number of systems that are attacked, the best by the choice.
        systems: the systems.
        data: name of the data, for a figure.
        test_rows_alone: whether training rows, and test rows with the prompt disabled, are not scored.
    """

    setup: dict[str, Any]
    seeds: list[int]
    choosing_seed: int
    held_out: float
    choosing_steps: int
    steps: int
    margin: float
    penalty: float
    attacked: int
    systems: list[System]
    data: str = "SST-2"
    test_rows_alone: bool = False

    def __post_init__(self) -> None:
        names = [system.name for system in self.systems]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"systems {twice} are in the plan twice.")
        choosing = {system.name: system.kind for system in self.systems if system.candidates}
        for system in self.systems:
            if system.settings_of is not None and choosing.get(system.settings_of) != system.kind:
                raise ValueError(
                    f"{system.name}: settings_of={system.settings_of!r}; expected a system of the plan that has "
                    f"candidates and is of kind {system.kind!r} as well."
                )

    @classmethod
    def read(cls, path: Path) -> Plan:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content | {"systems": [System(**one) for one in content["systems"]]})

    def experiment(self, seed: int, model: str, data_dir: str, folder: Path) -> Experiment:
        """The data and models of a seed; `data_dir` is where the plan's data set lies, or is the data set itself."""
        place = "data_dir" if "dataset" in self.setup else "dataset"
        setup = Setup(**self.setup, **{place: data_dir}, model=model, seed=seed)
        return Experiment(setup, folder / f"{Path(model).name}-{seed}", batch_size=128)

    def system(self, name: str) -> System:
        """The system of a name."""
        return next(system for system in self.systems if system.name == name)

    @property
    def rule(self) -> dict[str, float]:
        """The fields that the lines of trials depend on, beside setup and settings."""
        return {
            name: getattr(self, name) for name in ("choosing_seed", "held_out", "choosing_steps", "margin", "penalty")
        }

    def chooses_by(self, system: System) -> str | None:
        """The name of the system whose candidates give a system its settings; None if nothing is to be chosen."""
        return system.name if system.candidates else system.settings_of

    def settings(self, system: System, chosen: dict[str, Any]) -> dict[str, Any]:
        """The settings to score a system with.

        Args:
            system: one of the plan.
            chosen: `systems` of a choice.
        """
        if system.settings_of is not None:
            return self.settings(self.system(system.settings_of), chosen) | system.settings
        steps = {"steps": self.steps} if system.kind in TRAINED else {}
        return steps | system.settings | (chosen[system.name]["settings"] if system.candidates else {})

    def cost(self, forget: float, retain_loss: float) -> float:
        """The number by which candidates and systems are compared; less is better.

        Args:
            forget: accuracy on forget rows.
            retain_loss: retain accuracy of the base less that of the system, on the same rows.
        """
        return forget + self.penalty * max(0.0, retain_loss - self.margin)


def choose(plan: Plan, trials: list[dict[str, Any]], earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """The chosen settings of each system, and the systems to attack, from the trials on held-out rows.

    Of equal candidates the first of the plan is chosen.

    Args:
        plan: the plan.
        trials: lines of trials.
        earlier: a choice that holds for its systems, whatever the trials.
    """
    chosen: dict[str, Any] = {} if earlier is None else dict(earlier["systems"])
    for system in plan.systems:
        own = sorted((one for one in trials if one["system"] == system.name), key=lambda one: one["candidate"])
        if own and system.name not in chosen:
            best = min(own, key=lambda one: one["cost"])
            chosen[system.name] = {"settings": best["settings"], "held_out": best["scores"], "cost": best["cost"]}
            chosen[system.name]["tried"] = [one["candidate"] for one in own]
    ranked = sorted((name for name in chosen if "cost" in chosen[name]), key=lambda name: chosen[name]["cost"])
    return {"systems": chosen, "attacked": ranked[: plan.attacked]}
