"""How well it is forgotten, and the rest kept."""

from .attacks import usual_attacks
from .embeddings import response_embeddings
from .generation_metrics import RougeL, generate_answers, rouge_l
from .input_attacks import (
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
from .intervals import Interval, bootstrap_interval, joined_interval, seeds_interval
from .leakage import Leakage, auc, auc_interval, compare_with_retrained, priv_leak, true_positive_rate
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
from .model_attacks import Probe, linear_probe, quantised, relearn
from .names import name_loss, rows_at_names
from .numbers import Measurement, Number
from .over_unlearning import (
    TextLosses,
    cluster_neighbours,
    name_neighbours,
    perplexity,
    text_losses,
    topic_neighbours,
)
from .results import Evaluation, join
from .sampled import sampled_answers, sampled_success
from .scoring import greedy_completions, score_completions, summarise
from .soft_suffix import SuffixAttack, soft_suffix
from .suite import AttackSettings
from .tofu import QuestionScores, forget_quality, model_utility, score_questions

__all__ = [
    "JAILBREAKS",
    "AttackSettings",
    "Divergences",
    "Evaluation",
    "Interval",
    "Leakage",
    "Likelihood",
    "Measurement",
    "Number",
    "Probe",
    "QuestionScores",
    "RougeL",
    "SuffixAttack",
    "TextLosses",
    "attack_inputs",
    "attack_scores",
    "auc",
    "auc_interval",
    "bootstrap_interval",
    "cluster_neighbours",
    "compare_with_retrained",
    "diluted",
    "exact_memorisation",
    "extraction_strength",
    "forget_quality",
    "generate_answers",
    "gradient_norm_attack",
    "greedy_completions",
    "join",
    "joined_interval",
    "kl_to",
    "letter_case",
    "linear_probe",
    "loss_attack",
    "min_k_attack",
    "min_k_plus_plus_attack",
    "model_utility",
    "name_loss",
    "name_neighbours",
    "paraphrase",
    "perplexity",
    "priv_leak",
    "probability",
    "quantised",
    "reference_attack",
    "relearn",
    "response_embeddings",
    "response_likelihoods",
    "reworded",
    "rouge_l",
    "rows_at_names",
    "sampled_answers",
    "sampled_success",
    "score_completions",
    "score_questions",
    "seeds_interval",
    "soft_suffix",
    "summarise",
    "text_losses",
    "topic_neighbours",
    "true_positive_rate",
    "truth_ratio",
    "truth_ratio_on_forget",
    "truth_ratio_on_retain",
    "usual_attacks",
    "whitespace_noise",
    "with_prefix",
    "with_suffix",
    "zlib_attack",
]
