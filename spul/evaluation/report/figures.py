"""Figures of an evaluation: the four splits, ROC curves of membership attacks, input attacks, relearning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import roc_curve

from ...data.unlearning_data import SPLITS
from ..aggregation import MEMBERS, UNSEEN, MetricValue, in_all
from ..attacks.inputs import WITHOUT
from ..measures import MEASURES, variant_in_words
from ..metrics.table import metric_of
from ..results import Evaluation
from .plotting import BLACK, BLUE, GRAY, GREEN, panels_of, shared_legend
from .wording import MODEL_LABELS, MODELS, first, knowledge_name, where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"detached": GRAY, "unlearned": GREEN, "retrained": BLUE}
MARKERS = {"detached": "s", "unlearned": "o", "retrained": "*"}
SIZES = {"detached": 5, "unlearned": 6, "retrained": 9}
INTERVAL: dict[str, Any] = {"lw": 1.2, "zorder": 3}


def evaluation_figures(evaluation: Evaluation) -> dict[str, Figure]:
    """The figures of the measures that an evaluation has: `splits`, `roc`, `input_attacks`, `relearning`.

    Left out are those of which nothing can be drawn, as where a model has diverged on one of two sets of rows.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    present = {one.measure for one in evaluation.measurements}
    draws: dict[str, Callable[[Evaluation], Figure]] = {
        "splits": draw_splits,
        "roc": draw_roc,
        "input_attacks": draw_input_attacks,
        "relearning": draw_relearning,
    }
    figures = [one.figure for one in MEASURES.values() if one.figure and one.name in present]
    found = {}
    for name in figures:
        with contextlib.suppress(NothingToDrawError):
            found[name] = draws[name](evaluation)
    return found


def draw_splits(evaluation: Evaluation) -> Figure:
    """The four splits before and after, and retrained: bars with their 95 % intervals.

    The first panel has the accuracy, of free-form rows the probability of the answer; the second, hatched, the share
    of generic answers.

    Raises:
        ValueError: if utility was not measured.
    """
    knowledge = knowledge_name(evaluation)
    found = {
        name: [(model, _by_index(evaluation, name, model)) for model in MODELS] for name in (knowledge, "generic")
    }
    drawn = {name: [(model, some) for model, some in bars if some] for name, bars in found.items()}
    names = [name for name, bars in drawn.items() if bars]
    if not names:
        raise _nothing("utility", evaluation)
    figure, panels = panels_of(len(names), height=3.4)
    for axes, name in zip(panels, names, strict=True):
        metric, width = metric_of(name), 0.8 / len(drawn[name])
        for i, (model, values) in enumerate(drawn[name]):
            x = np.array(list(values)) + (i - (len(drawn[name]) - 1) / 2) * width
            heights = [metric.scale * one.value for one in values.values()]
            look: dict[str, Any] = {"color": COLORS[model], "ec": "white", "hatch": "//" if name == "generic" else ""}
            axes.bar(x, heights, width, label=MODEL_LABELS[model], **look)
            _intervals(axes.vlines, x, list(values.values()), color=BLACK)
        axes.set_xticks(range(len(SPLITS)), [split.replace("_", "\n") for split in SPLITS])
        axes.set_ylabel(metric.axis_label)
        axes.set_ylim(0, 1.03 * metric.scale)
    shared_legend(figure, panels, list(MODEL_LABELS.values()))
    return figure


def _by_index(evaluation: Evaluation, name: str, model: str) -> dict[int, MetricValue]:
    """A model's values on the splits, by the split's index."""
    found = [first(evaluation, measure="utility", rows=rows, name=name, model=model) for rows in SPLITS]
    return {i: one for i, one in enumerate(found) if one is not None}


def draw_roc(evaluation: Evaluation) -> Figure:
    """ROC curves of the membership attacks, a panel each, a line per model and seed, both axes logarithmic.

    They show the share of members that is found at very few false positives. Points at 0 are drawn on the edge, at
    half the share of one row. The dashed line is chance.

    Raises:
        ValueError: if membership was not measured.

    Source: Carlini et al., *Membership Inference Attacks From First Principles*, https://arxiv.org/abs/2112.03570
    """
    found = {(one.model, one.rows, one.seed): one for one in evaluation.measurements if one.measure == "membership"}
    members = [one for key, one in found.items() if key[1] == MEMBERS]
    curves: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray, float]]]] = {}
    for one in members:
        if (other := found.get((one.model, UNSEEN, one.seed))) is None:  # the model diverged on them
            continue
        for attack in in_all(one.per_row, other.per_row):
            both = [np.asarray(each.per_row[attack]) for each in (one, other)]
            if not np.isnan(np.concatenate(both)).any():
                curves.setdefault(attack, {}).setdefault(one.model, []).append(_curve(*both))
    if not curves:
        raise _nothing("membership", evaluation)
    figure, panels = panels_of(len(curves), height=3.3)
    for axes, (attack, by_model) in zip(panels, curves.items(), strict=True):
        edges = []
        for model in MODELS:
            for i, (false, true, edge) in enumerate(by_model.get(model, [])):
                edges.append(edge)
                axes.plot(false, true, color=COLORS[model], lw=1.4, label=MODEL_LABELS[model] if i == 0 else None)
        edge = min(edges)
        axes.plot([edge, 1], [edge, 1], color=BLACK, lw=0.8, ls="--", label="chance")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(edge, 1)
        axes.set_ylim(edge, 1.05)
        axes.set_xlabel("false positive rate (unseen rows)")
        axes.set_ylabel("true positive rate (members)")
        axes.set_title(attack, fontsize=10)
        axes.text(0.97, 0.04, _areas(evaluation, attack), transform=axes.transAxes, ha="right", fontsize=8)
    shared_legend(figure, panels, [*MODEL_LABELS.values(), "chance"])
    return figure


def _curve(members: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """False and true positives, and half of one row's share, the edge of the figure."""
    labels = np.repeat([1, 0], [len(members), len(unseen)])
    false, true, _ = roc_curve(labels, np.concatenate([members, unseen]), drop_intermediate=False)
    edge = 0.5 / max(len(members), len(unseen))
    return np.maximum(false, edge), np.maximum(true, edge), edge


def _areas(evaluation: Evaluation, attack: str) -> str:
    """The areas under the curves, model by model."""
    found = {
        model: first(evaluation, measure="membership", name="auc", attack=attack, model=model) for model in MODELS
    }
    return "\n".join(["AUC", *(f"{model} {one.value:.2f}" for model, one in found.items() if one is not None)])


def draw_input_attacks(evaluation: Evaluation) -> Figure:
    """Knowledge of test forget rows under every attack on the input: dots with 95 % intervals, by model.

    The dashed line is the unlearned model on the unchanged rows.

    Raises:
        ValueError: if no input attack was measured.
    """
    metric = metric_of(knowledge_name(evaluation, "input attack"))
    values = where(evaluation, measure="input attack", rows="test_forget", name=metric.name)
    attacks = list(dict.fromkeys(map(variant_in_words, values)))
    if not attacks:
        raise _nothing("input attack", evaluation)
    figure, (axes,) = panels_of(1, height=0.9 + 0.32 * len(attacks))
    models = [model for model in MODELS if any(one.model == model for one in values)]
    for i, model in enumerate(models):
        of_model = [one for one in values if one.model == model]
        y = np.array([attacks.index(variant_in_words(one)) for one in of_model]) + 0.2 * (i - (len(models) - 1) / 2)
        style: dict[str, Any] = {"color": COLORS[model], "marker": MARKERS[model], "ms": SIZES[model], "ls": ""}
        axes.plot([metric.scale * one.value for one in of_model], y, label=MODEL_LABELS[model], zorder=4, **style)
        _intervals(axes.hlines, y, of_model, color=COLORS[model])
        for one in of_model:
            if model == "unlearned" and one.attack == WITHOUT:
                axes.axvline(metric.scale * one.value, color=GREEN, lw=0.8, ls="--", zorder=1)
    axes.set_yticks(range(len(attacks)), [_shortened(attack) for attack in attacks])
    axes.invert_yaxis()  # the first on top
    axes.set_xlim(-0.03 * metric.scale, 1.03 * metric.scale)
    axes.set_xlabel(f"test forget {metric.axis_label} (lower is better)")
    shared_legend(figure, [axes], list(MODEL_LABELS.values()))
    return figure


def _shortened(attack: str, most: int = 48) -> str:
    name = "the unchanged rows" if attack == WITHOUT else " ".join(attack.split())
    name = name if len(name) <= most else name[: most - 1] + "…"
    return name.replace("$", r"\$")  # matplotlib takes text between two of them for a formula


def draw_relearning(evaluation: Evaluation) -> Figure:
    """Accuracy (of free-form answers probability) on the other forget rows over steps of relearning, a line per model.

    The 95 % interval is a band.

    Raises:
        ValueError: if relearning was not measured, or a measurement has no number of steps.
    """
    metric = metric_of(knowledge_name(evaluation, "relearning"))
    values = where(evaluation, measure="relearning", name=metric.name)
    if not values:
        raise _nothing("relearning", evaluation)
    if any(one.level is None for one in values):
        raise ValueError("a measurement of 'relearning' has level=None; expected its number of steps.")
    figure, (axes,) = panels_of(1, height=3.4)
    ticks = sorted({int(one.level or 0) for one in values})
    for model in MODELS:
        of_model = sorted((one for one in values if one.model == model), key=lambda one: one.level or 0)
        if not of_model:
            continue
        x = [int(one.level or 0) for one in of_model]
        style: dict[str, Any] = {"color": COLORS[model], "marker": MARKERS[model], "ms": SIZES[model], "lw": 1.5}
        axes.plot(x, [metric.scale * one.value for one in of_model], label=MODEL_LABELS[model], **style)
        low, high = ([metric.scale * getattr(one, end) for one in of_model] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=COLORS[model], alpha=0.18, lw=0)  # NaN leaves a gap
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_ylim(-0.03 * metric.scale, 1.03 * metric.scale)
    axes.set_xlabel("steps of relearning")
    axes.set_ylabel(f"train forget {metric.axis_label}\n(lower is better)")
    shared_legend(figure, [axes], list(MODEL_LABELS.values()))
    return figure


def _intervals(lines: Callable[..., Any], along: np.ndarray, values: Sequence[MetricValue], color: str) -> None:
    """Draw the intervals of values that have one, by `axes.vlines` or `axes.hlines`.

    Not as error bars, which are lengths on both sides: a BCa interval need not contain its estimate.
    """
    shown = [(at, one) for at, one in zip(along, values, strict=True) if np.isfinite([one.low, one.high]).all()]
    if shown:
        low, high = ([metric_of(one.name).scale * getattr(one, end) for _, one in shown] for end in ("low", "high"))
        lines([at for at, _ in shown], low, high, color=color, **INTERVAL)


class NothingToDrawError(ValueError):
    """An evaluation has no values of a figure."""


def _nothing(measure: str, evaluation: Evaluation) -> NothingToDrawError:
    present = sorted({one.measure for one in evaluation.measurements})
    return NothingToDrawError(f"the evaluation has nothing to draw of the measure {measure!r}; it has {present}.")
