"""How well it is forgotten, and the rest kept."""

from .embeddings import response_embeddings
from .scoring import greedy_completions, score_completions, summarise

__all__ = ["greedy_completions", "response_embeddings", "score_completions", "summarise"]
