"""Metrics of models on rows, and their intervals."""

from .embeddings import response_embeddings
from .entities import entity_loss, entity_rows
from .free_form import generate_answers, rouge_l
from .intervals import Interval, bootstrap_interval, joined_interval, seeds_interval
from .leakage import Leakage, auc, auc_interval, compare_with_retrained, priv_leak, true_positive_rate
from .likelihood import (
    Likelihood,
    exact_memorization,
    extraction_strength,
    kl_to,
    probability,
    response_likelihoods,
    truth_ratio,
    truth_ratio_on_forget,
    truth_ratio_on_retain,
)
from .membership import (
    attack_scores,
    gradient_norm_attack,
    loss_attack,
    min_k_attack,
    min_k_plus_plus_attack,
    reference_attack,
    zlib_attack,
)
from .running_text import perplexity, text_losses
from .scoring import DivergedError, answer_scores, greedy_completions, score_completions, summarize
from .tofu import forget_quality, model_utility, score_questions

__all__ = [
    "DivergedError",
    "Interval",
    "Leakage",
    "Likelihood",
    "answer_scores",
    "attack_scores",
    "auc",
    "auc_interval",
    "bootstrap_interval",
    "compare_with_retrained",
    "entity_loss",
    "entity_rows",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "generate_answers",
    "gradient_norm_attack",
    "greedy_completions",
    "joined_interval",
    "kl_to",
    "loss_attack",
    "min_k_attack",
    "min_k_plus_plus_attack",
    "model_utility",
    "perplexity",
    "priv_leak",
    "probability",
    "reference_attack",
    "response_embeddings",
    "response_likelihoods",
    "rouge_l",
    "score_completions",
    "score_questions",
    "seeds_interval",
    "summarize",
    "text_losses",
    "true_positive_rate",
    "truth_ratio",
    "truth_ratio_on_forget",
    "truth_ratio_on_retain",
    "zlib_attack",
]
