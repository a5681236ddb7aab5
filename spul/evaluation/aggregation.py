"""What was measured, row by row, and what it amounts to: numbers with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import binomtest

from .metrics.intervals import Interval, bootstrap_interval, joined_interval, seeds_interval
from .metrics.leakage import auc, auc_interval, compare_with_retrained, true_positive_rate
from .metrics.likelihood import truth_ratio_on_forget, truth_ratio_on_retain
from .metrics.tofu import forget_quality, model_utility

MEMBERS, UNSEEN = "train_forget", "unseen"
NUM_RESAMPLES = 2_000
# Better high on what is kept and low on what is forgotten.
KNOWLEDGE = (
    *("accuracy", "f1", "probability", "rouge_l_recall", "rouge_l_f1", "extraction_strength", "exact_memorization"),
    *("choice_probability", "success"),
)
CLOSE_TO_BASE = ("reverse_kl", "forward_kl", "perplexity")
SHARES = ("accuracy", "generic")
# What a number can be; an interval does not reach beyond.
BOUNDS = {
    **dict.fromkeys((*KNOWLEDGE, *SHARES, "auc", "true_positive_rate", "reversed_true_positive_rate"), (0.0, 1.0)),
    **dict.fromkeys(("truth_ratio_on_forget", "truth_ratio_on_retain", "model_utility"), (0.0, 1.0)),
    **dict.fromkeys(("forget_quality", "majority", "shuffled"), (0.0, 1.0)),
    **dict.fromkeys(("loss", *CLOSE_TO_BASE), (0.0, math.inf)),
    "auc_difference": (-1.0, 1.0),
}
# What is said of an attack: the number's name, from scores of members and others, and the sign that they are given.
MEMBERSHIP = (
    ("auc", auc, 1),
    ("true_positive_rate", true_positive_rate, 1),
    ("reversed_true_positive_rate", true_positive_rate, -1),
)
CLASSES = ("true", "predicted")  # per row the place of a label among the classes; not numbers of their own


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model on one set of rows.

    Attributes:
        measure: what was done: `"utility"`, `"kl"`, `"membership"`, `"input attack"`, ...
        rows: the set: `"test_forget"`, ...
        model: `"unlearned"`, `"detached"` or `"retrained"`.
        variant: which attack, how many steps, ...; empty where there is one only.
        per_row: by name, a number for each row, in the rows' order.
        overall: by name, numbers that exist once for all rows.
        num_rows: how many rows.
        digest: of the rows, to know the same ones by.
        seed: which of several joined evaluations this is from.
    """

    measure: str
    rows: str
    model: str
    variant: str = ""
    per_row: dict[str, list[float]] = field(default_factory=dict)
    overall: dict[str, float] = field(default_factory=dict)
    num_rows: int = 0
    digest: str = ""
    seed: int = 0

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is of: measure, rows, model, variant."""
        return self.measure, self.rows, self.model, self.variant


def name_of_key(key: tuple[str, str, str, str]) -> str:
    """A key in words, as in `left_out`."""
    return " ".join(filter(None, key))


Groups = dict[tuple[str, str, str, str], list[Measurement]]
"""Measurements of each key, one for each seed."""


@dataclass(frozen=True)
class Number:
    """One number of an evaluation, with its confidence interval.

    Attributes:
        measure, rows, model, variant: see `Measurement`.
        name: `"accuracy"`, `"auc"`, ...
        value: the number.
        low: lower end of the 95 % interval; NaN where there is none.
        high: its upper end; likewise.
        over: what the interval is over: `"rows"`, `"seeds"`, `"rows and seeds"`, or `""` without one.
        num_rows: how many rows.
        num_seeds: how many evaluations were joined.
        better: `"low"`, `"high"`, `"0"`, `"as retrained"`, or `""` for controls and what is neither.
        note: a verdict in words.
    """

    measure: str
    rows: str
    model: str
    variant: str
    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    over: str = ""
    num_rows: int = 0
    num_seeds: int = 1
    better: str = ""
    note: str = ""


def numbers_of(measurements: Sequence[Measurement]) -> list[Number]:
    """What measurements amount to: means and scores with their intervals, and comparisons with the retrained model."""
    groups: Groups = {}
    for one in measurements:
        groups.setdefault(one.key, []).append(one)
    found: list[Number] = []
    for seeds in groups.values():
        if seeds[0].measure == "membership":
            if seeds[0].rows == MEMBERS:
                found += _membership(seeds, groups)
            continue
        found += _means(seeds)
        if seeds[0].measure == "questions":
            found += _truth_ratio(seeds)
            if seeds[0].rows == "forget":
                found += _forget_quality(seeds, groups)
    return found + _model_utilities(groups)


# ---- means ----


def _means(seeds: Sequence[Measurement]) -> list[Number]:
    """Of each name that a measurement has."""
    found = []
    for name in seeds[0].per_row:
        if name in CLASSES:
            continue
        if name == "nats":
            found.append(_number(seeds, "perplexity", _perplexity(seeds)))
        else:
            found.append(_number(seeds, name, _mean(name, [one.per_row[name] for one in seeds], seeds)))
    if "true" in seeds[0].per_row:
        found.append(_number(seeds, "f1", _f1(seeds)))
    for name in seeds[0].overall:
        values = [one.overall[name] for one in seeds]
        interval, over = _over_seeds(values)
        if name in SHARES and set(values) == {values[0]} and not math.isnan(values[0]):
            interval, over = _share(values[0], min(one.num_rows for one in seeds)), "rows"
        found.append(_number(seeds, name, (interval, over)))
    return found


def _mean(name: str, values: Sequence[Sequence[float]], seeds: Sequence[Measurement]) -> tuple[Interval, str]:
    if any(np.isnan(one).any() for one in values):  # a model that has diverged: say so, and go on
        return Interval(math.nan, math.nan, math.nan), ""
    num, first = min(map(len, values)), values[0][0]
    # All alike, under all seeds: neither rows that are drawn nor the seeds tell more, and each row counts once.
    is_share = BOUNDS.get(name) == (0.0, 1.0) and first in (0, 1)
    if is_share and num > 1 and all(set(one) == {first} for one in values):
        return _share(first, num), "rows"
    if len(values) == 1:
        return bootstrap_interval(values[0], num_resamples=NUM_RESAMPLES), "rows"
    if len({one.digest for one in seeds}) == 1:
        return joined_interval(values), "rows and seeds"
    return _over_seeds([float(np.mean(one)) for one in values])


def _share(value: float, num_rows: int) -> Interval:
    """A share of rows of which no more is known, with Wilson's interval."""
    ends = binomtest(round(value * num_rows), num_rows).proportion_ci(method="wilson")
    return Interval(value, float(ends.low), float(ends.high))


def _over_seeds(values: Sequence[float]) -> tuple[Interval, str]:
    """Of a number that each seed has once."""
    if np.isnan(values).any():
        return Interval(math.nan, math.nan, math.nan), ""
    return seeds_interval(values), "seeds"


def _statistic(seeds: Sequence[Measurement], names: Sequence[str], statistic: Any) -> tuple[Interval, str]:
    """A number that is no mean, of some per-row columns; rows are drawn with all of their columns."""
    columns = [[np.asarray(one.per_row[name]) for name in names] for one in seeds]
    if len(seeds) > 1:
        return _over_seeds([statistic(*of_seed) for of_seed in columns])
    places = np.arange(len(columns[0][0]))

    def of_drawn(drawn: np.ndarray) -> float:
        return statistic(*(column[drawn.astype(int)] for column in columns[0]))

    return bootstrap_interval(places, statistic=of_drawn, num_resamples=NUM_RESAMPLES // 4), "rows"


def _f1(seeds: Sequence[Measurement]) -> tuple[Interval, str]:
    """Weighted by the classes' frequency, as scikit-learn's; written out since it is computed thousands of times."""

    def f1(true: np.ndarray, predicted: np.ndarray) -> float:
        num = int(max(true.max(), predicted.max())) + 1
        known = predicted >= 0
        support, said = (
            np.bincount(true.astype(int), minlength=num),
            np.bincount(predicted[known].astype(int), minlength=num),
        )
        right = np.bincount(true[true == predicted].astype(int), minlength=num)
        of_class = 2 * right / np.maximum(support + said, 1)
        return float((of_class * support).sum() / support.sum())

    return _statistic(seeds, CLASSES, f1)


def _perplexity(seeds: Sequence[Measurement]) -> tuple[Interval, str]:
    return _statistic(seeds, ("nats", "tokens"), lambda nats, tokens: float(np.exp(nats.sum() / tokens.sum())))


def _truth_ratio(seeds: Sequence[Measurement]) -> list[Number]:
    """Of TOFU's questions, as one number for sets that are forgotten or kept."""
    on_forget = seeds[0].rows == "forget"
    as_one = truth_ratio_on_forget if on_forget else truth_ratio_on_retain
    found = _statistic(seeds, ("truth_ratio",), as_one)
    return [_number(seeds, f"truth_ratio_on_{'forget' if on_forget else 'retain'}", found)]


# ---- against the retrained model ----


def _membership(seeds: Sequence[Measurement], groups: Groups) -> list[Number]:
    """AUC and true positives of each attack on one model, and how far the AUC is from the retrained model's."""
    measure, rows, model, _ = seeds[0].key
    unseen = groups.get((measure, UNSEEN, model, ""))
    if unseen is None:  # the model diverged on them, as `left_out` says
        return []
    theirs, their_unseen = (groups.get((measure, some, "retrained", "")) for some in (rows, UNSEEN))
    found = []
    for attack in seeds[0].per_row:
        pairs = _scores(seeds, unseen, attack)
        for name, statistic, sign in MEMBERSHIP:
            signed = [(sign * members, sign * others) for members, others in pairs]
            each = [float(statistic(*pair)) for pair in signed]
            interval, over = _over_seeds(each)
            if len(signed) == 1:
                interval, over = (_auc if statistic is auc else _rate)(*signed[0]), "rows"
            elif statistic is true_positive_rate and set(each) in ({0.0}, {1.0}):
                rates = [_rate(*pair) for pair in signed]  # alike: what one of them tells, at its widest
                ends = np.fmin.reduce([one.low for one in rates]), np.fmax.reduce([one.high for one in rates])
                interval, over = Interval(each[0], *map(float, ends)), "rows"
            found.append(_number(seeds, name, (interval, over), attack))
        if model == "retrained" or theirs is None or their_unseen is None or attack not in theirs[0].per_row:
            continue
        compared = [
            compare_with_retrained(*pair, *other, num_resamples=NUM_RESAMPLES)
            for pair, other in zip(pairs, _scores(theirs, their_unseen, attack), strict=True)
        ]
        verdict = ", ".join(dict.fromkeys(one.verdict for one in compared))
        at_one = "" if all(one.retrained_auc < 1 for one in compared) else "the retrained model's AUC is 1"
        for name, values, note in (
            ("auc_difference", [one.difference for one in compared], verdict),
            ("priv_leak", [one.priv_leak for one in compared], at_one),
        ):
            interval, over = (values[0], "rows") if len(values) == 1 else _over_seeds([one.estimate for one in values])
            found.append(_number(seeds, name, (interval, over), attack, note))
    return found


def _auc(members: np.ndarray, others: np.ndarray) -> Interval:
    return auc_interval(members, others, num_resamples=NUM_RESAMPLES)


def _rate(members: np.ndarray, others: np.ndarray) -> Interval:
    """True positives; a rate of 0 or 1 may be so in all draws, so its interval is at least Wilson's over members."""
    found = bootstrap_interval(members, others, statistic=true_positive_rate, num_resamples=NUM_RESAMPLES)
    if found.estimate not in (0, 1) or len(members) == 1:
        return found
    share = _share(found.estimate, len(members))
    return Interval(found.estimate, float(np.fmin(found.low, share.low)), float(np.fmax(found.high, share.high)))


def _scores(
    members: Sequence[Measurement], unseen: Sequence[Measurement], attack: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """An attack's scores of members and of unseen rows, for each seed."""
    return [
        (np.asarray(one.per_row[attack]), np.asarray(other.per_row[attack]))
        for one, other in zip(members, unseen, strict=True)
    ]


def _forget_quality(seeds: Sequence[Measurement], groups: Groups) -> list[Number]:
    measure, rows, model, variant = seeds[0].key
    theirs = groups.get((measure, rows, "retrained", variant))
    if model == "retrained" or theirs is None:
        return []
    values = [
        forget_quality(np.asarray(one.per_row["truth_ratio"]), np.asarray(other.per_row["truth_ratio"]))
        for one, other in zip(seeds, theirs, strict=True)
    ]
    return [_number(seeds, "forget_quality", _over_seeds(values))]


def _model_utilities(groups: Groups) -> list[Number]:
    found = []
    for model in dict.fromkeys(key[2] for key in groups if key[0] == "questions"):
        sets = [groups.get(("questions", rows, model, ""), []) for rows in ("retain", "real_authors", "world_facts")]
        if not all(sets):
            continue
        seeds = [_utility(of_seed) for of_seed in zip(*sets, strict=True)]
        if len(seeds) == 1:
            places = [np.arange(len(one.per_row["truth_ratio"])) for (one,) in sets]
            interval = bootstrap_interval(*places, statistic=seeds[0], num_resamples=NUM_RESAMPLES // 4)
            found.append(_number(sets[0], "model_utility", (interval, "rows")))
        else:
            found.append(_number(sets[0], "model_utility", _over_seeds([utility() for utility in seeds])))
    return found


def _utility(sets: Sequence[Measurement]) -> Callable[..., float]:
    """TOFU's model utility of one seed, of drawn places in each set, or of all questions."""
    columns = [{name: np.asarray(values) for name, values in one.per_row.items()} for one in sets]

    def utility(*drawn: np.ndarray) -> float:
        parts: Any = [places.astype(int) for places in drawn] or [slice(None)] * len(columns)
        scores = [
            {name: values[part] for name, values in of_set.items()}
            for of_set, part in zip(columns, parts, strict=True)
        ]
        return model_utility(*scores)["model_utility"]

    return utility


# ---- how a number is put down ----


def _number(
    seeds: Sequence[Measurement], name: str, found: tuple[Interval, str], variant: str | None = None, note: str = ""
) -> Number:
    one, (interval, over) = seeds[0], found
    if math.isnan(interval.low):
        over = ""
    low, high = (
        float(end) for end in np.clip([interval.low, interval.high], *BOUNDS.get(name, (-math.inf, math.inf)))
    )
    return Number(
        one.measure,
        one.rows,
        one.model,
        one.variant if variant is None else variant,
        name,
        interval.estimate,
        low,
        high,
        over,
        num_rows=one.num_rows,
        num_seeds=len(seeds),
        better=better(one, name),
        note=note,
    )


def better(one: Measurement, name: str) -> str:
    """Which way a number of the unlearned model is better; controls are what they are."""
    if one.model != "unlearned":
        return ""
    if name in ("auc", "true_positive_rate", "reversed_true_positive_rate"):
        return "as retrained"
    if name in ("auc_difference", "priv_leak"):
        return "0"
    if name in ("forget_quality", "model_utility", "truth_ratio_on_forget", "truth_ratio_on_retain"):
        return "high"
    if name in CLOSE_TO_BASE:
        return "low"
    is_forget = one.rows in ("train_forget", "test_forget", "forget") and one.measure != "neighbors"
    if name in KNOWLEDGE:
        return "low" if is_forget else "high"
    if name == "generic":
        return "high" if is_forget else "low"
    if name == "loss" and not is_forget:
        return "low"
    return ""
