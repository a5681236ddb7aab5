"""Search of alpha, beta and the number of virtual tokens by trained and scored trials."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from ..evaluation.metrics.scoring import DivergedError
from ..losses.unlearning_loss import UnlearningLoss
from ..records.fields import is_count


@dataclass(frozen=True)
class Candidate:
    """The settings of one trial.

    Args:
        alpha: weight of the retain term.
        beta: weight of the KL term.
        num_virtual_tokens: p.
    """

    alpha: float
    beta: float
    num_virtual_tokens: int

    def loss(self) -> UnlearningLoss:
        """SPUL's loss with these weights."""
        return UnlearningLoss(alpha=self.alpha, beta=self.beta)


@dataclass(frozen=True)
class Trial:
    """A candidate and its scores, both in 0..1.

    Args:
        candidate: the settings.
        retain: accuracy on retain rows; higher is better.
        forget: accuracy on forget rows; lower is better.
    """

    candidate: Candidate
    retain: float
    forget: float

    def to_dict(self) -> dict[str, Any]:
        """As flat, plain data."""
        return {**asdict(self.candidate), "retain": self.retain, "forget": self.forget}


@dataclass(frozen=True)
class SearchResult:
    """The trials of a search and the best of them.

    Args:
        trials: all trials, in their order.
        front: the Pareto front, highest retain accuracy first.
        best: the trial with the lowest forget accuracy of those with at least `min_retain`; None if there is none.
        min_retain: the bound on retain accuracy.
    """

    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    best: Trial | None
    min_retain: float


def search(
    train_and_score: Callable[[Candidate], tuple[float, float]],
    min_retain: float,
    num_trials: int = 20,
    *,
    alphas: Sequence[float] = (0.1, 0.5, 1.0),
    betas: Sequence[float] = (0.0, 0.1, 0.5, 1.0),
    num_virtual_tokens: Sequence[int] = (10, 20, 30, 40, 50),
    seed: int = 0,
    storage: str | os.PathLike | None = None,
    progress: bool = True,
) -> SearchResult:
    """Search alpha, beta and p for the best trade-offs of forgetting and retaining, with Optuna.

    Score on rows that are used neither for training nor for the results that you report. The sampler is Optuna's
    multi-objective TPE; no combination is trained twice.

    Args:
        train_and_score: trains a prompt with a candidate's settings and returns its accuracy on retain and on forget
            rows, both in 0..1. A `DivergedError`, which `score_completions` raises for a diverged model, counts as the
            worst scores, 0 and 1.
        min_retain: lowest acceptable retain accuracy, in 0..1, such as the base's minus 0.01.
        num_trials: number of combinations to try, those in `storage` included; at most all of them are tried.
        alphas: values of alpha to choose from; by default those of the paper (SPUL), as for the next two.
        betas: values of beta.
        num_virtual_tokens: values of p.
        seed: of the sampler.
        storage: a journal file of the trials; a search with the same file resumes.
        progress: whether to show a progress bar.

    Returns:
        The trials, the Pareto front, and the best trial within the bound.

    Raises:
        ValueError: if there are no values to choose from, a value is out of range, a score is not in 0..1, or
            `storage` holds a search over other values.
        ImportError: if Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("searching needs Optuna: pip install optuna") from error
    space = _checked_space(alphas, betas, num_virtual_tokens)
    if not 0 <= min_retain <= 1 or num_trials < 1:
        raise ValueError(
            f"min_retain={min_retain!r}, num_trials={num_trials!r}; expected an accuracy in 0..1 and at least 1 trial."
        )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        trials = _tried(_study(space, seed, storage), space, train_and_score, num_trials, seed, progress)
    finally:
        optuna.logging.set_verbosity(verbosity)
    front = [trials[i] for i in reversed(pareto_front([(trial.retain, trial.forget) for trial in trials]))]
    within = [t for t in trials if t.retain >= min_retain]
    best = min(within, key=lambda t: (t.forget, -t.retain)) if within else None
    return SearchResult(trials, tuple(front), best, min_retain)


def _checked_space(
    alphas: Sequence[float], betas: Sequence[float], num_virtual_tokens: Sequence[int]
) -> dict[str, list[Any]]:
    """The values to choose from, by the fields of `Candidate`; raises before anything is trained."""
    space: dict[str, list[Any]] = {
        "alpha": list(alphas),
        "beta": list(betas),
        "num_virtual_tokens": list(num_virtual_tokens),
    }
    if empty := [name for name, values in space.items() if not values]:
        raise ValueError(f"there is nothing to choose from for {', '.join(empty)}.")
    if bad := [p for p in num_virtual_tokens if not is_count(p, 1)]:
        raise ValueError(
            f"num_virtual_tokens={list(num_virtual_tokens)}: expected whole numbers from 1, got {bad[0]!r}."
        )
    for alpha, beta in itertools.product(alphas, betas):
        UnlearningLoss(alpha=alpha, beta=beta)
    return space


def _study(space: Mapping[str, list[Any]], seed: int, storage: str | os.PathLike | None) -> Any:
    """Optuna's study of these values, that of the journal file if there is one."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.create_study(
        storage=None if storage is None else JournalStorage(JournalFileBackend(os.fspath(storage))),
        study_name="spul",
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=seed),
        load_if_exists=True,
    )
    if (other := study.user_attrs.get("space", space)) != space:
        raise ValueError(
            f"storage={os.fspath(storage or '')!r} holds a search over {other}, not {space}; use another."
        )
    study.set_user_attr("space", space)
    return study


def _tried(
    study: Any,
    space: Mapping[str, list[Any]],
    train_and_score: Callable[[Candidate], tuple[float, float]],
    num_trials: int,
    seed: int,
    progress: bool,
) -> tuple[Trial, ...]:
    """The trials of a study, once there are as many as wanted, or one of each combination."""
    known: dict[Candidate, Trial] = {}
    for done in study.trials:
        if done.state.name == "COMPLETE":
            candidate = Candidate(**done.params)
            known[candidate] = Trial(candidate, *done.values)

    def objective(trial: Any) -> tuple[float, float]:
        candidate = Candidate(**{name: trial.suggest_categorical(name, values) for name, values in space.items()})
        if candidate not in known:
            try:
                scores = train_and_score(candidate)
            except (DivergedError, FloatingPointError):  # found by scoring, or by training
                scores = (0.0, 1.0)
            if not all(0 <= score <= 1 for score in scores):
                raise ValueError(f"train_and_score returned {scores}; expected two accuracies in 0..1.")
            known[candidate] = Trial(candidate, *scores)
        return known[candidate].retain, known[candidate].forget

    everything = [Candidate(*values) for values in itertools.product(*space.values())]
    random.Random(seed).shuffle(everything)
    wanted = min(num_trials, len(set(everything)))
    with tqdm(total=wanted, initial=min(len(known), wanted), desc="search", disable=not progress) as bar:
        while len(known) < wanted:
            before = len(known)
            study.optimize(objective, n_trials=1)
            if len(known) == before:  # the sampler repeated a combination: give it another
                untried = next(candidate for candidate in everything if candidate not in known)
                study.enqueue_trial(asdict(untried))
            bar.update(len(known) - before)
    return tuple(known.values())


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, ordered by the first coordinate.

    A point beats another if it is at least as good in both coordinates and better in one. Of equal points on the
    front, all count.

    Args:
        points: (to be maximized, to be minimized), such as accuracy on retain and on forget rows.

    Raises:
        ValueError: if a coordinate is NaN.
    """
    if bad := [i for i, point in enumerate(points) if any(map(math.isnan, point))]:
        raise ValueError(f"the point(s) {bad} have a coordinate that is NaN; leave them out.")
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        if not front or points[i][1] < points[front[-1]][1] or tuple(points[i]) == tuple(points[front[-1]]):
            front.append(i)
    return sorted(front, key=lambda i: (points[i][0], i))
