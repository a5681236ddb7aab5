"""Attacks that try to recover forgotten answers."""

from .disguises import letters_apart, look_alikes, misspelt
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
from .queries import FILLER, chained, in_document, mixed_query
from .relearning import relearn
from .sampling import sampled_answers, sampled_success
from .suffix import soft_suffix
from .usual import InputAttacks, usual_attacks

__all__ = [
    "FILLER",
    "JAILBREAKS",
    "InputAttacks",
    "attack_inputs",
    "chained",
    "diluted",
    "in_document",
    "letter_case",
    "letters_apart",
    "linear_probe",
    "look_alikes",
    "misspelt",
    "mixed_query",
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
