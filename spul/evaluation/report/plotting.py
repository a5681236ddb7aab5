"""Colors, panels, legends and files of figures; requires matplotlib, opens no window and has no state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colors, which color-blind readers can distinguish.
BLUE, SKY, GREEN, VERMILLION, PINK, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00"
GRAY, BLACK = "#7F7F7F", "#000000"


def save_figure(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write a figure as PNG (150 dpi) and SVG, the same bytes for the same figure; returns the two paths.

    Args:
        figure: the figure.
        path_without_suffix: the path without .png or .svg; folders are created.

    Raises:
        ValueError: if the path ends in .png or .svg.
    """
    import matplotlib

    path = Path(path_without_suffix)
    if path.suffix in (".png", ".svg"):
        raise ValueError(f"{path} ends in {path.suffix}; give it without, since both a PNG and an SVG are written.")
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    # Otherwise an SVG has random ids and the date in it, and differs each time.
    with matplotlib.rc_context({"svg.hashsalt": "spul"}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def require_matplotlib() -> type[Figure]:
    """The class of figures.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("the report's figures need matplotlib: pip install matplotlib") from error
    return matplotlib.figure.Figure


def panels_of(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure 7 inches wide with one panel, or rows of two; unused panels of the last row are removed."""
    lines = (count + 1) // 2
    figure = require_matplotlib()(figsize=(7, height * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, min(count, 2), squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(useOffset=False)
    return figure, grid[:count]


def shared_legend(figure: Figure, panels: Iterable[Axes], order: Sequence[str]) -> None:
    """One legend below all panels, so that it covers nothing."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    names = [name for name in order if name in found]
    figure.legend(
        [found[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
