"""How well it is forgotten, and the rest kept."""

from .scoring import greedy_completions, score_completions, summarise

__all__ = ["greedy_completions", "score_completions", "summarise"]
