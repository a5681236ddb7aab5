"""Report, figures and model card of an evaluation."""

from .card import add_to_card, card_metrics, hub_results
from .figures import draw_input_attacks, draw_relearning, draw_roc, draw_splits, evaluation_figures
from .plotting import save_figure
from .report import evaluation_markdown, write_report

__all__ = [
    "add_to_card",
    "card_metrics",
    "draw_input_attacks",
    "draw_relearning",
    "draw_roc",
    "draw_splits",
    "evaluation_figures",
    "evaluation_markdown",
    "hub_results",
    "save_figure",
    "write_report",
]
