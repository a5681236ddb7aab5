"""How well it is forgotten, and the rest kept."""

from .embeddings import response_embeddings
from .generation_metrics import RougeL, generate_answers, rouge_l
from .intervals import Interval, bootstrap_interval, joined_interval
from .leakage import Leakage, auc, compare_with_retrained, priv_leak, true_positive_rate
from .likelihood import (
    Divergences,
    Likelihood,
    exact_memorisation,
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
from .names import name_loss, rows_at_names
from .scoring import greedy_completions, score_completions, summarise
from .tofu import QuestionScores, forget_quality, model_utility, score_questions

__all__ = [
    "Divergences",
    "Interval",
    "Leakage",
    "Likelihood",
    "QuestionScores",
    "RougeL",
    "attack_scores",
    "auc",
    "bootstrap_interval",
    "compare_with_retrained",
    "exact_memorisation",
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
    "name_loss",
    "priv_leak",
    "probability",
    "reference_attack",
    "response_embeddings",
    "response_likelihoods",
    "rouge_l",
    "rows_at_names",
    "score_completions",
    "score_questions",
    "summarise",
    "true_positive_rate",
    "truth_ratio",
    "truth_ratio_on_forget",
    "truth_ratio_on_retain",
    "zlib_attack",
]
