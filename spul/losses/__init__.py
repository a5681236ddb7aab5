"""What is asked for: terms, their composition, and the loss of a batch. Tensors only; no model is known here."""

from .batch import LogitsAt, UnlearnerOutput, batch_loss
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
    "LogitsAt",
    "LossOutput",
    "LossTerm",
    "SimNPO",
    "UnlearnerOutput",
    "UnlearningLoss",
    "batch_loss",
    "has_left_padding",
    "pack_right",
    "response_positions",
    "token_nll",
]
