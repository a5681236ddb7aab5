"""The unlearning loss: its terms, their weighted sum, and the loss of a batch. Tensors only; imports no model."""

from .batch import LogitsFunction, UnlearnerOutput, batch_loss
from .multiplier import RetainMultiplier
from .positions import has_left_padding, pack_right, response_positions, token_positions
from .preference import DPO, NPO, SimNPO
from .reweighted import WGA, SatImp
from .states import RMU, StateDistance, StateTerm
from .suppressed import CEU, UNDIAL
from .terms import IGNORE_INDEX, CrossEntropy, GradientAscent, KLAscent, KLDivergence, LossTerm, token_kl, token_nll
from .unlearning_loss import LossOutput, UnlearningLoss, num_forget_rows

__all__ = [
    "CEU",
    "DPO",
    "IGNORE_INDEX",
    "NPO",
    "RMU",
    "UNDIAL",
    "WGA",
    "CrossEntropy",
    "GradientAscent",
    "KLAscent",
    "KLDivergence",
    "LogitsFunction",
    "LossOutput",
    "LossTerm",
    "RetainMultiplier",
    "SatImp",
    "SimNPO",
    "StateDistance",
    "StateTerm",
    "UnlearnerOutput",
    "UnlearningLoss",
    "batch_loss",
    "has_left_padding",
    "num_forget_rows",
    "pack_right",
    "response_positions",
    "token_kl",
    "token_nll",
    "token_positions",
]
