"""Results as tables and figures, beside the published ones; the model card."""

from .figures import (
    draw_forget_size,
    draw_prompt_length,
    draw_tradeoff,
    draw_tsne,
    draw_tsne_coordinates,
    save_figure,
    tsne_coordinates,
)
from .published import PublishedRow, published_rows
from .tables import aggregate, cost_table, generic_table, main_table, pareto_front, read_runs, score_table

__all__ = [
    "PublishedRow",
    "aggregate",
    "cost_table",
    "draw_forget_size",
    "draw_prompt_length",
    "draw_tradeoff",
    "draw_tsne",
    "draw_tsne_coordinates",
    "generic_table",
    "main_table",
    "pareto_front",
    "published_rows",
    "read_runs",
    "save_figure",
    "score_table",
    "tsne_coordinates",
]
