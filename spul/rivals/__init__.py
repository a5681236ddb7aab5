"""Rivals that train nothing: a refusal, an instruction, examples or corrupted embeddings in front of a frozen base."""

from .corruption import Corruption, EmbeddingCorruption
from .examples import InContextUnlearning
from .guardrail import GuardrailPrompt, guardrail_instruction
from .refusal import FixedRefusal
from .rival import Rival
from .search import Search, search_corruption, search_strength

__all__ = [
    "Corruption",
    "EmbeddingCorruption",
    "FixedRefusal",
    "GuardrailPrompt",
    "InContextUnlearning",
    "Rival",
    "Search",
    "guardrail_instruction",
    "search_corruption",
    "search_strength",
]
