"""Gates: which texts get the prompt; one that fails attaches it."""

from .gate import FunctionGate, Gate, as_gate, flags_of, hard_negatives
from .thresholds import GateReport, Rate

__all__ = [
    "FunctionGate",
    "Gate",
    "GateReport",
    "Rate",
    "as_gate",
    "flags_of",
    "hard_negatives",
]
