"""Attacks that try to get the knowledge back."""

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
from .probe import Probe, linear_probe
from .quantization import quantized
from .relearning import relearn
from .sampling import sampled_answers, sampled_success
from .suffix import SuffixAttack, soft_suffix
from .usual import usual_attacks

__all__ = [
    "JAILBREAKS",
    "Probe",
    "SuffixAttack",
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
