"""The strength of corrupted embeddings: a search by finite differences, or over given ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..records.fields import is_count, is_finite_number
from .corruption import Corruption, EmbeddingCorruption

logger = logging.getLogger(__name__)

# The step of the finite differences as a share of the first strength, as in the authors' program.
SMOOTHING = 0.999
# The lowest strength that is tried.
LEAST = 1e-8

Score = Callable[[EmbeddingCorruption], float]


@dataclass
class Search:
    """Result of a search.

    Attributes:
        tried: each corruption with the score under it, in order.
        target: the score that was aimed at.
    """

    target: float
    tried: list[tuple[Corruption, float]] = field(default_factory=list)

    @property
    def best(self) -> Corruption:
        """The corruption whose score is nearest to the target; of several the first that was tried."""
        return min(self.tried, key=lambda one: abs(one[1] - self.target))[0]

    @property
    def distance(self) -> float:
        """Distance of the best score from the target."""
        return min(abs(score - self.target) for _, score in self.tried)


def search_strength(
    model: EmbeddingCorruption,
    score: Score,
    target: float,
    start: float = 0.1,
    lr: float = 100.0,
    steps: int = 10,
    tolerance: float = 0.02,
) -> Search:
    """Search the strength of noise by zeroth-order optimization, and set the best that was tried.

    ```text
    D(s) = | score(s) - target |        s <- max( s - lr (D(s + e) - D(s - e)) / 2e,  s_0 )        e = 0.999 s_0
    ```

    It ends after `steps`, each of which scores twice, or when a distance is within `tolerance`. Where both scores of a
    step are equal the strength stays, as it would for ever, and the search ends.

    Args:
        model: its `corruption` is of the kind noise; it is changed.
        score: scores the model on *training* rows, such as its accuracy on forget rows that were held out. Never score
            on test rows.
        target: the score of a model that never saw the forget rows, or an estimate: chance, for classes.
        start: s_0, the first and lowest strength.
        lr: step size.
        steps: number of steps, at least 1.
        tolerance: distance at which the search ends.

    Raises:
        ValueError: if the corruption is no noise, or a number is out of range.

    Source: Liu et al., https://arxiv.org/abs/2406.07933, whose program has `lr` 100, `start` 0.1, 10 steps, minimizes
    the score itself, ends below a threshold (0.27, where chance is 0.25) and takes the last strength, not the best
    """
    if model.corruption.kind != "noise":
        raise ValueError(f"the corruption is {model.corruption}; the others have no strength: use search_corruption.")
    are_numbers = all(map(is_finite_number, (start, lr, tolerance)))
    if not are_numbers or min(start, lr) <= 0 or tolerance < 0 or not is_count(steps, least=1):
        raise ValueError(
            f"start={start}, lr={lr}, steps={steps}, tolerance={tolerance}; expected numbers above 0, and a tolerance "
            "of 0 or more."
        )
    found, strength, step = Search(target), start, SMOOTHING * start
    first = model.corruption

    def distance(strength: float) -> float:
        return abs(_tried(found, model, score, dataclasses.replace(first, strength=strength)) - target)

    try:
        for _ in range(steps):
            slope = (distance(strength + step) - distance(max(strength - step, LEAST))) / (2 * step)
            if slope == 0 or found.distance <= tolerance:
                break
            strength = max(strength - lr * slope, start)
    except BaseException:
        model.corruption = first
        raise
    return _finished(found, model, tolerance)


def search_corruption(
    model: EmbeddingCorruption, score: Score, target: float, corruptions: Iterable[Corruption]
) -> Search:
    """Try given corruptions, and set the one whose score is nearest to the target, the first of equally near ones.

    Args:
        model: its `corruption` is changed.
        score: as in `search_strength`, on training rows.
        target: as in `search_strength`.
        corruptions: those to try, the weakest first: of zeros and flipped signs with other numbers of `dims`.

    Raises:
        ValueError: if there are none.
    """
    found, first = Search(target), model.corruption
    try:
        for corruption in corruptions:
            _tried(found, model, score, corruption)
    except BaseException:
        model.corruption = first
        raise
    if not found.tried:
        raise ValueError("corruptions is empty; expected one or more to try.")
    return _finished(found, model)


def _tried(found: Search, model: EmbeddingCorruption, score: Score, corruption: Corruption) -> float:
    model.corruption = corruption
    value = float(score(model))
    if value != value:
        raise ValueError(f"the score under {corruption} is NaN; expected a number.")
    found.tried.append((corruption, value))
    return value


def _finished(found: Search, model: EmbeddingCorruption, tolerance: float | None = None) -> Search:
    model.corruption = found.best
    if tolerance is not None and found.distance > tolerance:
        scores = {one.strength: score for one, score in found.tried}
        low, high = min(scores), max(scores)
        logger.warning(
            "the target %g is not reached: %d strengths from %g to %g were tried, with scores from %g to %g, and the "
            "nearest, of strength %g, is %g away (tolerance %g). %s",
            *(found.target, len(scores), low, high, min(scores.values()), max(scores.values())),
            *(found.best.strength, found.distance, tolerance),
            "No strength changed the score: pass a start= that is ten times as high or more."
            if len(set(scores.values())) == 1
            else "Pass more steps= or another start=, or try given strengths (search_corruption).",
        )
    return found
