"""From per-row measurements to metric values with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from .metrics.intervals import Interval, bootstrap_interval, joined_interval, seeds_interval
from .metrics.leakage import auc, auc_interval, compare_with_retrained, true_positive_rate
from .metrics.likelihood import truth_ratio_on_forget, truth_ratio_on_retain
from .metrics.running_text import perplexity
from .metrics.table import SHARE, metric_of
from .metrics.tofu import forget_quality, model_utility

MEMBERS, UNSEEN = "train_forget", "unseen"
FORGET_ROWS = ("train_forget", "test_forget", "forget")
NUM_RESAMPLES = 2_000
# The metrics of a membership attack, each from scores of members and of unseen rows times a sign.
MEMBERSHIP = (
    ("auc", auc, 1),
    ("true_positive_rate", true_positive_rate, 1),
    ("reversed_true_positive_rate", true_positive_rate, -1),
)
CLASSES = ("true", "predicted")  # per row the index of a class; F1 is computed from them
UNKNOWN = Interval(math.nan, math.nan, math.nan)


class Key(NamedTuple):
    """The identity of a measurement; for the fields see `Measurement`."""

    measure: str
    rows: str
    model: str
    attack: str = ""
    level: int | None = None


@dataclass(frozen=True)
class Measurement:
    """The scores of one model on one set of rows.

    Attributes:
        measure: the measure: `"utility"`, `"kl"`, `"membership"`, `"input attack"`, ...
        rows: the set of rows: `"test_forget"`, ...
        model: `"unlearned"`, `"detached"` or `"retrained"`.
        attack: the attack, where a measure has several; else empty.
        level: its number of steps, bits, tries or turns (`Measure.unit`); None without.
        per_row: by metric, a list with a score for each row, in the rows' order.
        overall: by metric, scores that exist once for all rows.
        num_rows: number of rows.
        digest: digest of the rows, by which the same rows are recognized under several seeds.
        seed: index of the evaluation among joined ones.
    """

    measure: str
    rows: str
    model: str
    attack: str = ""
    level: int | None = None
    per_row: Mapping[str, Any] = field(default_factory=dict)
    overall: Mapping[str, float] = field(default_factory=dict)
    num_rows: int = 0
    digest: str = ""
    seed: int = 0

    @property
    def key(self) -> Key:
        """Measure, rows, model, attack and level."""
        return Key(self.measure, self.rows, self.model, self.attack, self.level)


@dataclass(frozen=True)
class MetricValue:
    """A metric of an evaluation with its confidence interval.

    Attributes:
        measure, rows, model, attack, level: see `Measurement`.
        name: the metric: `"accuracy"`, `"auc"`, ...
        value: the estimate.
        low: lower end of the 95 % interval; NaN where there is none.
        high: upper end; likewise.
        over: what the interval is over: `"rows"`, `"seeds"`, `"rows and seeds"`, or `""` without one.
        num_rows: number of rows.
        num_seeds: number of joined evaluations.
        better: `"low"`, `"high"`, `"0"`, `"as retrained"`, or `""` for controls and metrics without a direction.
        note: a verdict in words.
    """

    measure: str
    rows: str
    model: str
    attack: str
    level: int | None
    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    over: str = ""
    num_rows: int = 0
    num_seeds: int = 1
    better: str = ""
    note: str = ""

    @property
    def key(self) -> Key:
        """Measure, rows, model, attack and level, as of its measurements."""
        return Key(self.measure, self.rows, self.model, self.attack, self.level)


def in_words(attack: str, level: int | None, unit: tuple[str, str]) -> str:
    """An attack and its level with the singular or plural unit: `"diluted, 4 turns"`, `"8 bit"`."""
    number = "" if level is None else f"{level} {unit[level != 1]}".rstrip()
    return ", ".join(filter(None, (attack, number)))


def in_all(first: Iterable[str], *others: Container[str]) -> list[str]:
    """The names of scores that all seeds have; `join` lists the others."""
    return [name for name in first if all(name in other for other in others)]


def seeds_by_key(measurements: Iterable[Measurement]) -> dict[Key, list[Measurement]]:
    """The measurements of all seeds, by what was measured."""
    found: dict[Key, list[Measurement]] = {}
    for one in measurements:
        found.setdefault(one.key, []).append(one)
    return found


def aggregate(measurements: Sequence[Measurement]) -> list[MetricValue]:
    """The metrics of measurements, with intervals, and comparisons with the retrained model."""
    by_key, found = seeds_by_key(measurements), list[MetricValue]()
    for key, seeds in by_key.items():
        if key.measure == "membership":
            if key.rows == MEMBERS:
                found += _membership(seeds, by_key)
            continue
        found += _of_rows(seeds) + _of_set(seeds)
        if key.measure == "questions":
            found.append(_truth_ratio(seeds))
            if key.rows == "forget":
                found += _forget_quality(seeds, by_key)
    return found + _model_utilities(by_key)


# ---- metric values ----


def _value(
    seeds: Sequence[Measurement],
    name: str,
    interval: Interval,
    over: str,
    attack: str | None = None,
    note: str = "",
) -> MetricValue:
    """A metric value of the first seed's key; without an interval where its ends are NaN."""
    one, metric = seeds[0], metric_of(name)
    low, high = (float(end) for end in np.clip([interval.low, interval.high], *metric.bounds))
    is_forget = one.rows in FORGET_ROWS and one.measure != "neighbors"
    return MetricValue(
        *(one.measure, one.rows, one.model, one.attack if attack is None else attack, one.level),
        *(name, interval.estimate, low, high),
        over="" if math.isnan(interval.low) else over,
        num_rows=one.num_rows,
        num_seeds=len(seeds),
        better="" if one.model != "unlearned" else metric.on_forget if is_forget else metric.on_retain,
        note=note,
    )


def _over_seeds(values: Sequence[float]) -> Interval:
    """The interval over seeds of a number that each seed has once."""
    return UNKNOWN if np.isnan(values).any() else seeds_interval(values)


def _share(value: float, num_rows: int) -> Interval:
    """Wilson's interval of a share of rows."""
    ends = binomtest(round(value * num_rows), num_rows).proportion_ci(method="wilson")
    return Interval(value, float(ends.low), float(ends.high))


def _of_rows(seeds: Sequence[Measurement]) -> list[MetricValue]:
    """Means of per-row scores; perplexity and F1 instead of the columns that they are computed from."""
    columns = in_all(*(one.per_row for one in seeds))
    found = []
    for name in columns:
        if name == "nats":
            found.append(_statistic(seeds, "perplexity", ("nats", "tokens"), _perplexity))
        elif name not in CLASSES:
            found.append(_mean(seeds, name))
    if "true" in columns:
        found.append(_statistic(seeds, "f1", CLASSES, _f1))
    return found


def _mean(seeds: Sequence[Measurement], name: str) -> MetricValue:
    """The mean of a per-row score; NaN where a model has diverged."""
    values = [one.per_row[name] for one in seeds]
    if any(np.isnan(one).any() for one in values):
        return _value(seeds, name, UNKNOWN, "")
    num, first = min(map(len, values)), values[0][0]
    # All rows alike under all seeds: resampling rows or seeds has no spread, and each row counts once.
    is_share = metric_of(name).bounds == SHARE and first in (0, 1)
    if is_share and all(set(one) == {first} for one in values):
        return _value(seeds, name, _share(first, num), "rows")
    if len(values) == 1:
        return _value(seeds, name, bootstrap_interval(values[0], num_resamples=NUM_RESAMPLES), "rows")
    if len({one.digest for one in seeds}) == 1:
        return _value(seeds, name, joined_interval(values), "rows and seeds")
    return _value(seeds, name, _over_seeds([float(np.mean(one)) for one in values]), "seeds")


def _of_set(seeds: Sequence[Measurement]) -> list[MetricValue]:
    """Scores that exist once for all rows; an interval over rows for shares of rows, if alike under all seeds."""
    found = []
    for name in in_all(*(one.overall for one in seeds)):
        values = [one.overall[name] for one in seeds]
        if metric_of(name).counts_rows and set(values) == {values[0]} and not math.isnan(values[0]):
            found.append(_value(seeds, name, _share(values[0], min(one.num_rows for one in seeds)), "rows"))
        else:
            found.append(_value(seeds, name, _over_seeds(values), "seeds"))
    return found


def _statistic(
    seeds: Sequence[Measurement], name: str, columns: Sequence[str], statistic: Callable[..., float]
) -> MetricValue:
    """A statistic of several per-row columns, resampled together."""
    per_seed = [[np.asarray(one.per_row[column]) for column in columns] for one in seeds]
    if len(seeds) > 1:
        return _value(seeds, name, _over_seeds([statistic(*arrays) for arrays in per_seed]), "seeds")

    def of_drawn(drawn: np.ndarray) -> float:
        return statistic(*(array[drawn.astype(int)] for array in per_seed[0]))

    indices = np.arange(len(per_seed[0][0]))
    interval = bootstrap_interval(indices, statistic=of_drawn, num_resamples=NUM_RESAMPLES // 4)
    return _value(seeds, name, interval, "rows")


def _f1(true: np.ndarray, predicted: np.ndarray) -> float:
    """F1 weighted by the classes' frequency, as scikit-learn's, but fast enough to be resampled."""
    num = int(max(true.max(), predicted.max())) + 1
    support = np.bincount(true.astype(int), minlength=num)
    num_predicted = np.bincount(predicted[predicted >= 0].astype(int), minlength=num)
    right = np.bincount(true[true == predicted].astype(int), minlength=num)
    of_class = 2 * right / np.maximum(support + num_predicted, 1)
    return float((of_class * support).sum() / support.sum())


def _perplexity(nats: np.ndarray, tokens: np.ndarray) -> float:
    return perplexity({"nats": nats, "tokens": tokens})


# ---- membership ----


def _membership(seeds: Sequence[Measurement], by_key: Mapping[Key, list[Measurement]]) -> list[MetricValue]:
    """AUC and true-positive rates of each attack on one model, and the AUC's distance from the retrained model's."""
    unseen = by_key.get(seeds[0].key._replace(rows=UNSEEN))
    if unseen is None:  # the model diverged on them; see `Evaluation.skipped`
        return []
    retrained = seeds[0].key._replace(model="retrained")
    theirs, their_unseen = by_key.get(retrained), by_key.get(retrained._replace(rows=UNSEEN))
    found = []
    for attack in in_all(*(one.per_row for one in (*seeds, *unseen))):
        pairs = _scores(seeds, unseen, attack)
        if _are_unknown(pairs):
            found += [_value(seeds, name, UNKNOWN, "", attack) for name, *_ in MEMBERSHIP]
            continue
        for name, statistic, sign in MEMBERSHIP:
            signed = [(sign * members, sign * others) for members, others in pairs]
            rates = [float(statistic(*pair)) for pair in signed]
            if len(signed) == 1:
                interval, over = (_auc if statistic is auc else _rate)(*signed[0]), "rows"
            elif statistic is true_positive_rate and set(rates) in ({0.0}, {1.0}):
                interval, over = _widest([_rate(*pair) for pair in signed]), "rows"
            else:
                interval, over = _over_seeds(rates), "seeds"
            found.append(_value(seeds, name, interval, over, attack))
        if seeds[0].model == "retrained" or not theirs or not their_unseen:
            continue
        if not all(attack in one.per_row for one in (*theirs, *their_unseen)):
            continue
        others = _scores(theirs, their_unseen, attack)
        if _are_unknown(others):
            continue
        compared = [
            compare_with_retrained(*pair, *other, num_resamples=NUM_RESAMPLES)
            for pair, other in zip(pairs, others, strict=True)
        ]
        verdict = ", ".join(dict.fromkeys(one.verdict for one in compared))
        at_one = "" if all(one.retrained_auc < 1 for one in compared) else "the retrained model's AUC is 1"
        for name, intervals, note in (
            ("auc_difference", [one.difference for one in compared], verdict),
            ("priv_leak", [one.priv_leak for one in compared], at_one),
        ):
            if len(intervals) == 1:
                found.append(_value(seeds, name, intervals[0], "rows", attack, note))
            else:
                over_seeds = _over_seeds([one.estimate for one in intervals])
                found.append(_value(seeds, name, over_seeds, "seeds", attack, note))
    return found


def _scores(
    members: Sequence[Measurement], unseen: Sequence[Measurement], attack: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """An attack's scores of members and of unseen rows, for each seed."""
    return [
        (np.asarray(one.per_row[attack]), np.asarray(other.per_row[attack]))
        for one, other in zip(members, unseen, strict=True)
    ]


def _are_unknown(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether a score is NaN, as an earlier version had them of a model that has diverged."""
    return any(bool(np.isnan(scores).any()) for pair in pairs for scores in pair)


def _auc(members: np.ndarray, others: np.ndarray) -> Interval:
    return auc_interval(members, others, num_resamples=NUM_RESAMPLES)


def _rate(members: np.ndarray, others: np.ndarray) -> Interval:
    """A true-positive rate. One of 0 or 1 may be alike in all resamples: its interval is at least Wilson's."""
    found = bootstrap_interval(members, others, statistic=true_positive_rate, num_resamples=NUM_RESAMPLES)
    if found.estimate not in (0, 1) or len(members) == 1:
        return found
    return _widest([found, _share(found.estimate, len(members))])


def _widest(intervals: Sequence[Interval]) -> Interval:
    """The first estimate, with the lowest and the highest end of all intervals that have ends."""
    low, high = np.fmin.reduce([one.low for one in intervals]), np.fmax.reduce([one.high for one in intervals])
    return Interval(intervals[0].estimate, float(low), float(high))


# ---- TOFU ----


def _truth_ratio(seeds: Sequence[Measurement]) -> MetricValue:
    if seeds[0].rows == "forget":
        return _statistic(seeds, "truth_ratio_on_forget", ("truth_ratio",), truth_ratio_on_forget)
    return _statistic(seeds, "truth_ratio_on_retain", ("truth_ratio",), truth_ratio_on_retain)


def _forget_quality(seeds: Sequence[Measurement], by_key: Mapping[Key, list[Measurement]]) -> list[MetricValue]:
    theirs = by_key.get(seeds[0].key._replace(model="retrained"))
    if seeds[0].model == "retrained" or theirs is None:
        return []
    found = []
    for ratio, name in (("truth_ratio", "forget_quality"), ("truth_ratio_geometric", "forget_quality_geometric")):
        if any(ratio not in one.per_row for one in (*seeds, *theirs)):
            continue  # measured before this ratio was
        values = [
            forget_quality(np.asarray(one.per_row[ratio]), np.asarray(other.per_row[ratio]))
            for one, other in zip(seeds, theirs, strict=True)
        ]
        found.append(_value(seeds, name, _over_seeds(values), "seeds"))
    return found


def _model_utilities(by_key: Mapping[Key, list[Measurement]]) -> list[MetricValue]:
    found = []
    for model in dict.fromkeys(key.model for key in by_key if key.measure == "questions"):
        sets = [by_key.get(Key("questions", rows, model), []) for rows in ("retain", "real_authors", "world_facts")]
        if not all(sets):
            continue
        seeds = [_utility(of_seed) for of_seed in zip(*sets, strict=True)]
        if len(seeds) > 1:
            interval, over = _over_seeds([utility() for utility in seeds]), "seeds"
        else:
            indices = [np.arange(len(one.per_row["truth_ratio"])) for (one,) in sets]
            interval = bootstrap_interval(*indices, statistic=seeds[0], num_resamples=NUM_RESAMPLES // 4)
            over = "rows"
        found.append(_value(sets[0], "model_utility", interval, over))
    return found


def _utility(sets: Sequence[Measurement]) -> Callable[..., float]:
    """TOFU's model utility of one seed: of drawn indices of each set, or of all questions."""
    columns = [{name: np.asarray(values) for name, values in one.per_row.items()} for one in sets]

    def utility(*drawn: np.ndarray) -> float:
        parts: Any = [indices.astype(int) for indices in drawn] or [slice(None)] * len(columns)
        scores = [
            {name: values[part] for name, values in of_set.items()}
            for of_set, part in zip(columns, parts, strict=True)
        ]
        return model_utility(*scores)["model_utility"]

    return utility
