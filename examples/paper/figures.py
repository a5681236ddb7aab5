"""Figures of stored runs and of embeddings. They need matplotlib, and open no window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from paper.tables import Group, Run, aggregate, partition
from spul.data import SPLITS
from spul.evaluation.report.plotting import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    VERMILLION,
    panels_of,
    shared_legend,
)
from spul.training.settings_search import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PERPLEXITY = 30.0  # of t-SNE: about how many neighbors count; a third of the other rows where that is less
# Color by family of methods, marker by method.
METHOD_STYLES = {
    "vanilla": (GRAY, "v"),
    "base": (GRAY, "s"),
    "retrained": (GRAY, "*"),
    "GA": (VERMILLION, "o"),
    "GA+KL": (VERMILLION, "^"),
    "GA+GD": (VERMILLION, "s"),
    "RL": (PINK, "o"),
    "NPO": (BLUE, "o"),
    "NPO+KL": (BLUE, "^"),
    "NPO+GD": (BLUE, "s"),
    "SimNPO": (SKY, "o"),
    "SimNPO+KL": (SKY, "^"),
    "SimNPO+GD": (SKY, "s"),
    "SPUL": (GREEN, "D"),
    "EUL": (ORANGE, "D"),
    "SPUL detached": (GRAY, "X"),
    "EUL detached": (GRAY, "P"),
}

REFERENCE_METHODS = ("vanilla", "base", "retrained", "SPUL detached", "EUL detached")
"""Models without unlearning, shown for comparison only."""

GROUP_COLORS = {"retain": BLUE, "forget": ORANGE}
LABEL_MARKERS = "o^sDvPX*<>"


def draw_tradeoff(runs: Sequence[Run], measure: str = "accuracy", split: str = "test") -> Figure:
    """Forgetting against retaining: every run a point, and the Pareto front of the methods; a panel per data set and
    model.

    The front goes through the ringed points, which no other run of the panel beats on both axes; between them it is
    a stair, since nothing in between was measured. `REFERENCE_METHODS` are not part of it.

    Args:
        runs: stored runs.
        measure: `accuracy` or `f1`.
        split: `test` or `train`.

    Raises:
        ValueError: if there are no runs, a run lacks the score, or `measure` or `split` is another.
    """
    if measure not in ("accuracy", "f1") or split not in ("train", "test"):
        raise ValueError(
            f"measure={measure!r}, split={split!r}; expected the measure accuracy or f1, which are better the higher "
            "on retain rows and the lower on forget rows, and the split train or test."
        )
    parts = partition(runs, ("dataset", "model"))
    styles = _styles(runs)
    figure, panels = panels_of(len(parts), height=4.2)
    for axes, (key, members) in zip(panels, parts, strict=True):
        for i, (method, of_method) in enumerate(_by_method(members, styles)):
            color, marker = styles[method]
            xy = [_forget_retain(run, measure, split) for run in of_method]
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 9 if marker == "*" else 7}
            x, y = zip(*xy, strict=True)
            axes.plot(x, y, ls="", mec="white", mew=0.6, label=method, zorder=3 + i / 100, **style)
        xy = [_forget_retain(run, measure, split) for run in members if run["method"] not in REFERENCE_METHODS]
        front = [xy[i] for i in pareto_front([(retain, forget) for forget, retain in xy])]
        if front:
            stair: dict[str, Any] = {"drawstyle": "steps-post", "color": BLACK, "lw": 1, "zorder": 2}
            ring: dict[str, Any] = {"marker": "o", "ms": 11, "mfc": "none", "mec": BLACK, "mew": 0.8}
            x, y = zip(*front, strict=True)
            axes.plot(x, y, label="Pareto front", **stair, **ring)
        name = {"accuracy": "accuracy", "f1": "F1"}[measure]
        axes.set_xlabel(f"{split} forget {name}, % (lower is better)")
        axes.set_ylabel(f"{split} retain {name}, % (higher is better)")
        axes.margins(0.08)
        axes.set_title(_title(key), fontsize=10)
    shared_legend(figure, panels, [*styles, "Pareto front"])
    return figure


def draw_prompt_length(runs: Sequence[Run]) -> Figure:
    """Accuracy on the four splits over the number of virtual tokens: means, and bands of ± one standard deviation
    over seeds; a panel per data set and model.

    Args:
        runs: stored runs of one method, with `num_virtual_tokens` in their settings.

    Raises:
        ValueError: if there are no runs, one has no `num_virtual_tokens`, or two of a panel agree in it and in seed.
    """
    parts = partition(runs, ("dataset", "model"))
    figure, panels = panels_of(len(parts), height=3.6)
    for axes, (key, members) in zip(panels, parts, strict=True):
        groups = aggregate(members, ("num_virtual_tokens",))
        for split in SPLITS:
            style: dict[str, Any] = {
                "color": GROUP_COLORS[split.split("_")[1]],
                "ls": "-" if split.startswith("test") else "--",
            }
            marker = "o" if split.startswith("test") else "s"
            _line(axes, groups, "num_virtual_tokens", split, split.replace("_", " "), marker=marker, **style)
        axes.set_xlabel("virtual tokens (number)")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(-3, 103)
        axes.set_xticks(sorted(group.key["num_virtual_tokens"] for group in groups))
        axes.set_title(_title(key), fontsize=10)
    shared_legend(figure, panels, [split.replace("_", " ") for split in SPLITS])
    return figure


def draw_forget_size(runs: Sequence[Run]) -> Figure:
    """Accuracy on the test splits over the share of the forget set that was to be forgotten: a line per method, with
    a band of ± one standard deviation over seeds; two panels per data set and model.

    Args:
        runs: stored runs with `forget_size` in their settings, a share above 0 and up to 1.

    Raises:
        ValueError: if there are no runs, one has no `forget_size` or one that is no such share, or two agree in
            method, `forget_size` and seed.
    """
    parts = partition(runs, ("dataset", "model"))
    styles = _styles(runs)
    figure, panels = panels_of(2 * len(parts), height=3.4)
    for i, (key, members) in enumerate(parts):
        for axes, split in zip(panels[2 * i : 2 * i + 2], ("test_retain", "test_forget"), strict=True):
            sizes = set()
            for method, of_method in _by_method(members, styles):
                groups = aggregate(of_method, ("forget_size",))
                sizes |= {group.key["forget_size"] for group in groups}
                color, marker = styles[method]
                _line(axes, groups, "forget_size", split, method, scale=100, color=color, marker=marker)
            if bad := [size for size in sizes if not 0 < size <= 1]:
                raise ValueError(f"forget_size {bad}; expected shares of the forget set, above 0 and up to 1.")
            axes.set_xlabel("forget set used, % of its rows")
            better = "lower" if split == "test_forget" else "higher"
            axes.set_ylabel(f"{split.replace('_', ' ')} accuracy, %\n({better} is better)")
            axes.set_ylim(-3, 103)
            axes.set_xticks([100 * size for size in sorted(sizes)])
            axes.set_title(_title(key), fontsize=10)
    shared_legend(figure, panels, list(styles))
    return figure


def tsne_coordinates(
    embeddings: Mapping[str, np.ndarray],
    is_forget: Sequence[bool],
    labels: Sequence[str],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """t-SNE of embeddings in two dimensions, as rows that JSON can hold: `panel`, `x`, `y`, `is_forget`, `label`.

    Args:
        embeddings: by panel, such as before and after, each of shape (n, d).
        is_forget: one flag a row, n.
        labels: one label a row, n.
        seed: seed of the t-SNE.

    Raises:
        ValueError: if there are no embeddings, shapes do not agree, or there are fewer than 4 rows or 2 dimensions.
    """
    from sklearn.manifold import TSNE

    if not embeddings:
        raise ValueError("there are no embeddings; expected at least one panel, such as {'after': array of (n, d)}.")
    rows: list[dict[str, Any]] = []
    for panel, values in embeddings.items():
        values = np.asarray(values, dtype=np.float32)
        n = len(labels)
        if values.ndim != 2 or len(values) != n or len(is_forget) != n or n < 4 or values.shape[1] < 2:
            raise ValueError(
                f"embeddings {panel!r} have the shape {values.shape}, with {len(is_forget)} flags and {n} labels; "
                "expected (n, d) with a flag and a label a row, at least 4 rows and 2 dimensions."
            )
        tsne = TSNE(init="pca", perplexity=min(PERPLEXITY, (n - 1) / 3), random_state=seed)
        for (x, y), flag, label in zip(tsne.fit_transform(values).tolist(), is_forget, labels, strict=True):
            rows.append({"panel": panel, "x": x, "y": y, "is_forget": bool(flag), "label": str(label)})
    return rows


def draw_tsne(
    embeddings: Mapping[str, np.ndarray], is_forget: Sequence[bool], labels: Sequence[str], seed: int = 0
) -> Figure:
    """Embeddings in two dimensions: a panel each, colored by retain and forget, the marker by label.

    To save what is drawn, take `tsne_coordinates` and `draw_tsne_coordinates` instead.

    Args:
        embeddings: by panel, such as before and after, each of shape (n, d).
        is_forget: one flag a row, n.
        labels: one label a row, n; at most 10 different ones.
        seed: seed of the t-SNE.

    Raises:
        ValueError: as in `tsne_coordinates`; if there are more than 10 different labels.
    """
    return draw_tsne_coordinates(tsne_coordinates(embeddings, is_forget, labels, seed))


def draw_tsne_coordinates(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure of `draw_tsne` from the rows of `tsne_coordinates`.

    Raises:
        ValueError: if there are no rows, or more than 10 different labels.
    """
    if not rows:
        raise ValueError("there are no rows to draw; expected those of tsne_coordinates.")
    names = list(dict.fromkeys(row["label"] for row in rows))
    if len(names) > len(LABEL_MARKERS):
        raise ValueError(f"there are {len(names)} different labels, and {len(LABEL_MARKERS)} markers.")
    titles = list(dict.fromkeys(row["panel"] for row in rows))
    figure, panels = panels_of(len(titles), height=3.4)
    for axes, title in zip(panels, titles, strict=True):
        for group, color in GROUP_COLORS.items():  # forget rows, which are fewer, lie on top
            for label, marker in zip(names, LABEL_MARKERS, strict=False):
                found = [
                    r for r in rows if (r["panel"], r["label"], r["is_forget"]) == (title, label, group == "forget")
                ]
                if found:
                    x, y = [row["x"] for row in found], [row["y"] for row in found]
                    axes.scatter(x, y, s=22, c=color, marker=marker, ec="white", lw=0.4, label=f"{group}, {label}")
        axes.set_xlabel("t-SNE 1 (no unit)")
        axes.set_ylabel("t-SNE 2 (no unit)")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(title, fontsize=10)
    shared_legend(figure, panels, [f"{group}, {label}" for group in GROUP_COLORS for label in names])
    return figure


def _line(
    axes: Axes, groups: Sequence[Group], key: str, split: str, label: str, scale: float = 1, **style: Any
) -> None:
    """Mean accuracy in % over a setting, and a band of ± the standard deviation where there is one."""
    for group in groups:
        if not isinstance(group.key[key], int | float) or "accuracy" not in group.scores.get(split, {}):
            raise ValueError(
                f"the runs with {key}={group.key[key]!r} have scores of {sorted(group.scores)}; expected a number as "
                f"{key}, and the accuracy of {split}. Leave out the runs that do not have them."
            )
    groups = sorted(groups, key=lambda group: group.key[key])
    x = [scale * group.key[key] for group in groups]
    found = [group.scores[split]["accuracy"] for group in groups]
    mean = np.array([100 * summary.mean for summary in found])
    # NaN leaves a gap: one seed has no standard deviation.
    sd = np.array([np.nan if summary.sd is None else 100 * summary.sd for summary in found])
    axes.plot(x, mean, label=label, ms=5, lw=1.5, **style)
    axes.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.18, lw=0)


def _styles(runs: Iterable[Run]) -> dict[str, tuple[str, str]]:
    """Color and marker of every method, in the order of legends: the known ones, then others as they come."""
    there = dict.fromkeys(run["method"] for run in runs)
    known = {method: style for method, style in METHOD_STYLES.items() if method in there}
    others = [method for method in there if method not in METHOD_STYLES]
    spare = [(color, marker) for marker in "Php<>d" for color in (ORANGE, BLACK)]
    if len(others) > len(spare):
        raise ValueError(f"{len(others)} methods have no style of their own, and {len(spare)} can be distinguished.")
    return known | dict(zip(others, spare, strict=False))


def _by_method(runs: Iterable[Run], styles: Mapping[str, Any]) -> list[tuple[str, list[Run]]]:
    """The runs of every method, in the order of the styles."""
    found = {key["method"]: members for key, members in partition(runs, ("method",))}
    return [(method, found[method]) for method in styles if method in found]


def _forget_retain(run: Run, measure: str, split: str) -> tuple[float, float]:
    """A run's scores on forget and retain rows, in %."""
    scores = [run["scores"].get(f"{split}_{group}", {}).get(measure) for group in ("forget", "retain")]
    if None in scores:
        raise ValueError(
            f"the run of {run['method']}, seed {run['seed']}, lacks the {measure} of {split}_forget or {split}_retain."
        )
    return 100 * scores[0], 100 * scores[1]


def _title(key: Mapping[str, Any]) -> str:
    title = ", ".join(map(str, key.values()))
    return title if len(title) <= 36 else title.replace(", ", ",\n", 1)  # so that neighbors do not meet
