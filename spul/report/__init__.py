"""Results as tables and figures, beside the published ones; the report of an evaluation; the model card."""

from .evaluation_card import add_to_card, card_metrics
from .evaluation_figures import draw_input_attacks, draw_relearning, draw_roc, draw_splits, evaluation_figures
from .evaluation_report import evaluation_markdown, write_report
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
    "add_to_card",
    "aggregate",
    "card_metrics",
    "cost_table",
    "draw_forget_size",
    "draw_input_attacks",
    "draw_prompt_length",
    "draw_relearning",
    "draw_roc",
    "draw_splits",
    "draw_tradeoff",
    "draw_tsne",
    "draw_tsne_coordinates",
    "evaluation_figures",
    "evaluation_markdown",
    "generic_table",
    "main_table",
    "pareto_front",
    "published_rows",
    "read_runs",
    "save_figure",
    "score_table",
    "tsne_coordinates",
    "write_report",
]
