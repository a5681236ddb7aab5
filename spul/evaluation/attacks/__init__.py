"""Attacks that try to recover forgotten answers."""

from .inputs import (
    JAILBREAKS,
    attack_inputs,
    diluted,
    letter_case,
    paraphrase,
    reworded,
    whitespace_noise,
    with_prefix,
    with_suffix,
)
from .probe import linear_probe
from .quantization import quantized
from .relearning import relearn
from .sampling import sampled_answers, sampled_success
from .suffix import soft_suffix
from .usual import InputAttacks, usual_attacks

__all__ = [
    "JAILBREAKS",
    "InputAttacks",
    "attack_inputs",
    "diluted",
    "letter_case",
    "linear_probe",
    "paraphrase",
    "quantized",
    "relearn",
    "reworded",
    "sampled_answers",
    "sampled_success",
    "soft_suffix",
    "usual_attacks",
    "whitespace_noise",
    "with_prefix",
    "with_suffix",
]
