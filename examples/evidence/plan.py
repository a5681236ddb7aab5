"""The plan of a measurement: the systems that are compared, the settings to choose among, the rule of the choice."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paper.experiment import Experiment
from paper.runs import Setup

KINDS = ("model", "prompt", "gated", "lora", "refusal", "guardrail", "examples", "corruption")
TRAINED = ("prompt", "gated", "lora")


@dataclass(frozen=True)
class System:
    """One of the compared systems.

    Args:
        name: as tables call it.
        kind: one of `KINDS`, which says how it is built.
        settings: those that all candidates share.
        candidates: settings to choose among, on held-out training rows; empty where there is nothing to choose.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind={self.kind!r}; expected one of {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Plan:
    """A plan, as its file has it.

    Args:
        setup: fields of `paper.runs.Setup` that all seeds share.
        seeds: of data, memorizing and unlearning.
        choosing_seed: the seed on whose held-out training rows settings are chosen.
        held_out: share of the training rows of each side to choose on.
        choosing_steps: training steps of a candidate.
        steps: training steps of a chosen one.
        margin: retain accuracy that a candidate may lose, as a share.
        penalty: what each point of retain accuracy beyond the margin counts, in points of forget accuracy.
        attacked: number of systems that are attacked, the best by the choice.
        systems: the systems.
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

    @classmethod
    def read(cls, path: Path) -> Plan:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content | {"systems": [System(**one) for one in content["systems"]]})

    def experiment(self, seed: int, model: str, data_dir: str, folder: Path) -> Experiment:
        """The data and models of a seed."""
        setup = Setup(**self.setup, model=model, data_dir=data_dir, seed=seed)
        return Experiment(setup, folder / f"{Path(model).name}-{seed}", batch_size=128)

    def cost(self, forget: float, retain_loss: float) -> float:
        """The number by which candidates and systems are compared; less is better.

        Args:
            forget: accuracy on forget rows.
            retain_loss: retain accuracy of the base less that of the system, on the same rows.
        """
        return forget + self.penalty * max(0.0, retain_loss - self.margin)


def choose(plan: Plan, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The chosen settings of each system, and the systems to attack, from the trials on held-out rows.

    Of equal candidates the first of the plan is chosen.
    """
    chosen: dict[str, Any] = {}
    for system in plan.systems:
        own = sorted((one for one in trials if one["system"] == system.name), key=lambda one: one["candidate"])
        if own:
            best = min(own, key=lambda one: one["cost"])
            chosen[system.name] = {"settings": best["settings"], "held_out": best["scores"], "cost": best["cost"]}
    ranked = sorted(chosen, key=lambda name: chosen[name]["cost"])
    return {"systems": chosen, "attacked": ranked[: plan.attacked]}
