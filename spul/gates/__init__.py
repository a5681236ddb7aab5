"""Gates: which texts get the prompt; one that fails attaches it."""

from .any_gate import AnyGate, load
from .gate import FunctionGate, Gate, as_gate, flags_of, hard_negatives, prompt_texts
from .gated import GatedUnlearner
from .gated_files import attach_gate
from .names import NameGate
from .probes import Probe
from .state import StateGate
from .states import HiddenStates
from .text import TextGate
from .thresholds import GateReport, Rate

__all__ = [
    "AnyGate",
    "FunctionGate",
    "Gate",
    "GateReport",
    "GatedUnlearner",
    "HiddenStates",
    "NameGate",
    "Probe",
    "Rate",
    "StateGate",
    "TextGate",
    "as_gate",
    "attach_gate",
    "flags_of",
    "hard_negatives",
    "load",
    "prompt_texts",
]
