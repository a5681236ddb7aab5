"""Learning rate of a prompt, by its kind and the base's width."""

from __future__ import annotations

from typing import Any

from peft import PeftType

from ..models.unlearner import unlearner_of
from ..prompts.discriminative import DiscriminativeStart
from ..prompts.starts import Start

# Rate times width, for AdamW and batches of 32: from the rates by which prompts of 30 forgot on small-lm (width 256:
# prompt tuning 0.05, prefix tuning 0.03), on SmolLM2 (width 576: prefix tuning from fitted keys 0.03), and the paper's
# P-tuning of LLaMA-2-7B (width 4,096: 1e-4).
RATE_TIMES_WIDTH = {"rows": 12.8, "keys and values": 7.7, "fitted keys": 17.3, "encoder": 0.41}
HIGHEST = 0.1


def default_learning_rate(unlearner: Any, start: Start | None = None) -> float:
    """Learning rate to begin with for a `SoftPromptUnlearner`: by the kind of its prompt and the base's width.

    An Adam step moves each of the d numbers of a row by about the rate, and a product with it sums d of them: the rate
    falls as 1/d (Yang et al., arXiv 2203.03466). What is trained sets the rest: rows themselves (prompt tuning), keys
    and values (prefix tuning), or the weights of an encoder (P-tuning, prefix tuning with a projection), which take
    smaller steps. It is a rule through few points, not a search: `spul.training.search` finds better ones.

    Args:
        unlearner: an unlearner with a soft prompt.
        start: what the prompt began as, if it is a `DiscriminativeStart`: its fitted keys take larger steps.

    Returns:
        The peak rate for AdamW under a schedule with warm-up, such as cosine; at most 0.1.

    Raises:
        TypeError: if the model is under no soft prompt.
    """
    config: Any = getattr(unlearner_of(unlearner).called_model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        raise TypeError(
            f"unlearner is a {type(unlearner).__name__}; expected a SoftPromptUnlearner. Layers, LoRA and whole "
            "models have rates of their own: see the page on methods."
        )
    base = unlearner_of(unlearner).get_base_model()
    kind = "rows" if config.peft_type == PeftType.PROMPT_TUNING else "keys and values"
    if isinstance(start, DiscriminativeStart):
        kind = "fitted keys"
    if config.peft_type == PeftType.P_TUNING or getattr(config, "prefix_projection", False):
        kind = "encoder"
    return min(HIGHEST, RATE_TIMES_WIDTH[kind] / base.config.get_text_config().hidden_size)
