"""The unlearning loss: its terms, their weighted sum, and the loss of a batch. Tensors only; imports no model."""

from .batch import LogitsFunction, UnlearnerOutput, batch_loss
from .multiplier import RetainMultiplier
from .positions import has_left_padding, pack_right, response_positions
from .terms import IGNORE_INDEX, NPO, CrossEntropy, GradientAscent, KLAscent, KLDivergence, LossTerm, SimNPO, token_nll
from .unlearning_loss import LossOutput, UnlearningLoss

__all__ = [
    "IGNORE_INDEX",
    "NPO",
    "CrossEntropy",
    "GradientAscent",
    "KLAscent",
    "KLDivergence",
    "LogitsFunction",
    "LossOutput",
    "LossTerm",
    "RetainMultiplier",
    "SimNPO",
    "UnlearnerOutput",
    "UnlearningLoss",
    "batch_loss",
    "has_left_padding",
    "pack_right",
    "response_positions",
    "token_nll",
]
