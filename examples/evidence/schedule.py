"""Jobs of a measurement: which may begin, in which order, and a choice as soon as a system's trials have ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evidence.jobs import attacks_of
from evidence.plan import TRAINED, Plan, choose

Record = dict[str, Any]
STAGES = ("choose", "score", "all")
MEMORIZED = ("base", "retrained")


@dataclass(frozen=True)
class Job:
    """A job of a worker, known by its key.

    Args:
        kind: `memorize`, `trial`, `score` or `attack`.
        seed: of the experiment.
        system: name of the system, or of the model to memorize.
        part: number of a trial's candidate, or name of an attack.
    """

    kind: str
    seed: int
    system: str
    part: int | str | None = None

    @property
    def key(self) -> str:
        return json.dumps([self.kind, self.seed, self.system, self.part])


class Schedule:
    """Jobs of a stage.

    A system is chosen once each of its trials has ended, and its scores are ready then; what one trial of a system
    failed at does not keep the others from being compared. The best systems are attacked once all are chosen, whether
    they are among `wanted` or not.

    Args:
        plan: the plan.
        stage: one of `STAGES`.
        wanted: seeds to score each system on, by its name.
        attacked_seeds: seeds to attack the best systems on.
        choice: that of earlier calls; its systems are not tried.
        known: lines of earlier calls, whose jobs are done.
        attacked: names of systems to attack in place of the best.

    Raises:
        ValueError: if a line of an earlier call has other settings than its job would have now.
    """

    def __init__(
        self,
        plan: Plan,
        stage: str,
        wanted: Mapping[str, Sequence[int]],
        attacked_seeds: Sequence[int] = (),
        choice: Record | None = None,
        known: Sequence[Record] = (),
        attacked: Sequence[str] | None = None,
    ) -> None:
        self.plan, self.stage, self.wanted, self.attacked_seeds = plan, stage, wanted, attacked_seeds
        self.attacked = attacked
        self.choice: Record = choose(plan, [], choice)
        self.done = {record["job"] for record in known}
        self.begun: dict[str, Job] = {}
        self.failed: set[str] = set()
        self._trials = [record for record in known if record.get("candidate") is not None]
        self._choose()
        for record in known:
            self._check(record)

    def _check(self, record: Record) -> None:
        if "settings" not in record or record["system"] not in {system.name for system in self.plan.systems}:
            return
        system, candidate = self.plan.system(record["system"]), record.get("candidate")
        if candidate is not None:
            expected = system.candidate(candidate) if candidate < len(system.candidates) else None
        elif self.plan.chooses_by(system) in {None, *self.choice["systems"]}:
            expected = self.plan.settings(system, self.choice["systems"])
        else:
            return
        if record["settings"] != expected:
            raise ValueError(
                f"{record['job']} was done with {record['settings']}; by the plan and the choice it has {expected}. "
                "Take another --output-dir."
            )

    # ---- what there is to do ----

    @cached_property
    def trials(self) -> dict[str, list[Job]]:
        """Trials of each system that is to be chosen."""
        needed = {self.plan.chooses_by(self.plan.system(name)) for name in self.wanted} - {None}
        names = [system.name for system in self.plan.systems if system.name in needed]
        return {
            name: [
                Job("trial", self.plan.choosing_seed, name, i) for i in range(len(self.plan.system(name).candidates))
            ]
            for name in names
            if self.stage != "score" and name not in self.choice["systems"]
        }

    @property
    def undecided(self) -> list[str]:
        """Systems with trials that have not ended."""
        over = self.done | self.failed
        return [name for name, some in self.trials.items() if not all(job.key in over for job in some)]

    def jobs(self) -> list[Job]:
        """All jobs that are known of so far, done or not, the first first."""
        own: list[Job] = [job for some in self.trials.values() for job in some]
        if self.stage != "choose":
            own += [Job("score", seed, name) for name, seeds in self.wanted.items() for seed in seeds]
            if self.attacked_seeds and not self.undecided:
                own += self._attacks()
        own = list(dict.fromkeys(own))
        memorizing = [job for one in own if (job := self._memorizing(one)) is not None]
        order, first = {job: i for i, job in enumerate(own)}, self.plan.choosing_seed
        return [
            *sorted(set(memorizing), key=lambda job: (MEMORIZED.index(job.system), job.seed != first, job.seed)),
            *sorted(own, key=lambda job: (*self._urgency(job), order[job])),
        ]

    def _attacks(self) -> Iterator[Job]:
        for seed in self.attacked_seeds:
            for name in self.choice["attacked"] if self.attacked is None else self.attacked:
                yield Job("score", seed, name)  # which stores the adapter
                for part in attacks_of(self.plan.system(name)):
                    yield Job("attack", seed, name, part)

    def _memorizing(self, job: Job) -> Job | None:
        """The job that makes the model that a job begins with."""
        system = self.plan.system(job.system)
        name = system.settings["name"] if system.kind == "model" else "base"
        return Job("memorize", job.seed, name) if name in MEMORIZED else None

    # ---- the order ----

    def _steps(self, name: str) -> int:
        """Training steps of a system's scores, 0 if it is not trained."""
        system = self.plan.system(name)
        return system.settings.get("steps", self.plan.steps) if system.kind in TRAINED else 0

    def _urgency(self, job: Job) -> tuple[bool, int, int, int]:
        """The lower, the earlier.

        The longest runs take as long as everything else, so they and what they wait for come first. What needs no
        training is soon done, and goes before the rest. Attacks, with the scores that only they need, wait until
        nothing else is left to do: beside the longest runs they would share the device with them.
        """
        followers = [name for name in self.wanted if self.plan.chooses_by(self.plan.system(name)) == job.system]
        steps = self._steps(job.system)
        if job.kind == "trial" and self.stage == "all":
            steps = max(map(self._steps, followers), default=0)
        group = 0 if steps > self.plan.steps else 1 if steps == 0 else 2
        return self._is_late(job), group, -steps, job.kind == "score"

    def _is_late(self, job: Job) -> bool:
        return job.kind == "attack" or (job.kind == "score" and job.seed not in self.wanted.get(job.system, ()))

    def _is_ready(self, job: Job) -> bool:
        if job.kind == "memorize":
            return True
        if (memorizing := self._memorizing(job)) is not None and memorizing.key not in self.done:
            return False
        if job.kind == "attack":
            return Job("score", job.seed, job.system).key in self.done
        chosen_by = self.plan.chooses_by(self.plan.system(job.system))
        return job.kind == "trial" or chosen_by is None or chosen_by in self.choice["systems"]

    def waiting(self) -> list[Job]:
        """Jobs that are not done and have not begun, the first first."""
        return [job for job in self.jobs() if job.key not in self.done | self.failed | set(self.begun)]

    def ready(self) -> list[Job]:
        """Those of them that can begin."""
        found = [job for job in self.waiting() if self._is_ready(job)]
        early = [job for job in found if not self._is_late(job)]
        return early if early or not all(map(self._is_late, self.begun.values())) else found

    def settings(self, job: Job) -> Record | None:
        """The settings that a job scores or attacks a system with; None for other jobs."""
        if job.kind not in ("score", "attack"):
            return None
        return self.plan.settings(self.plan.system(job.system), self.choice["systems"])

    # ---- what has happened ----

    def begin(self, job: Job) -> None:
        """Note that a job has begun."""
        self.begun[job.key] = job

    def end(self, job: Job, record: Record | None) -> list[str]:
        """Note that a job has ended, with its line or, failed, without one; returns the systems chosen by that."""
        del self.begun[job.key]
        (self.failed if record is None else self.done).add(job.key)
        if job.kind == "trial" and record is not None:
            self._trials.append(record)
        return self._choose() if job.kind == "trial" else []

    def _choose(self) -> list[str]:
        before, open_ones = set(self.choice["systems"]), self.undecided
        decided = [one for one in self._trials if one["system"] in self.trials and one["system"] not in open_ones]
        self.choice = choose(self.plan, decided, self.choice)
        return [name for name in self.choice["systems"] if name not in before]
