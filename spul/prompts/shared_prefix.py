"""The shared prefix: the prompt runs once, and every row of the batch attends to its keys and values.

A prompt stands in front of a causal model's input, so its keys and values do not depend on the input. Prompt tuning
and P-tuning therefore pass through the model once per step with batch size 1, gradient included, or as a row of the
batch (see `one_pass`); prefix tuning *is* keys and values and needs no pass. Inside `cached_prompts` the states serve
all calls. Gradient checkpointing changes none of this: each layer gets the prompt's keys and values as inputs of its
checkpoint. Where a base has not earned it (see `probe`), the prompt is concatenated to every row instead.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..models.causal_lm import cache_switch, needs_gradient, warn_once
from ..models.compat_cache import prefix_states
from ..models.compat_checkpointing import is_checkpointing
from .configs import holds_states
from .probe import checkpoints_prefix, shares_prefix
from .states import PromptStates, base_version, compute_states

_CACHE = "_cached_prompts"  # the attribute with the states by adapter; views of a model share it
_lock = threading.Lock()
_num_scopes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def prompt_states(model: Any, with_logits: bool = False) -> PromptStates | None:
    """Return the keys and values of the active prompt, batch size 1; None if the base has not earned to share them.

    They are computed anew at every call. Inside `cached_prompts`, and without gradient, they are cached until the
    prompt, a weight or a hook of the base, or autocast changes.

    Args:
        model: a prompt-learning PEFT model.
        with_logits: whether to return the logits at the virtual tokens too.

    Raises:
        ValueError: for prefix tuning on a base without a plain cache.
    """
    base: Any = model.get_base_model()
    if is_prefix(model):
        layers = prefix_states(model)
        if layers is None:
            raise ValueError(f"prefix tuning needs a plain key/value cache, which {type(base).__name__} has not.")
        return PromptStates(layers)
    if not shares_prefix(base, model.active_peft_config.num_virtual_tokens):
        return None
    prompt = model.get_prompt(batch_size=1).to(model.word_embeddings.weight.dtype)
    by_adapter: dict[str, PromptStates] | None = model.__dict__.get(_CACHE)
    if by_adapter is None or needs_gradient(model):
        return compute_states(base, prompt, (), with_logits)
    version = base_version(base, prompt.device.type)
    cached = by_adapter.get(model.active_adapter)
    if cached is None or not cached.matches(prompt, version) or (with_logits and cached.logits is None):
        cached = compute_states(base, prompt, version, with_logits)
        if cached is not None:
            by_adapter[model.active_adapter] = cached
    return cached


@contextmanager
def cached_prompts(model: Any) -> Iterator[None]:
    """Context manager: a prompt passes through the base once for all calls inside, of all threads.

    Args:
        model: an unlearner; its base must not change inside.
    """
    with _lock:
        _num_scopes[model] = _num_scopes.get(model, 0) + 1
        model.__dict__.setdefault(_CACHE, {})
    try:
        yield
    finally:
        with _lock:
            _num_scopes[model] -= 1
            if not _num_scopes[model]:
                model.__dict__.pop(_CACHE, None)


def drop_cached(model: Any, adapter_name: str) -> None:
    """Drop the cached states of a prompt, if there are any."""
    model.__dict__.get(_CACHE, {}).pop(adapter_name, None)


def is_prefix(model: Any) -> bool:
    """Whether the active prompt is keys and values (prefix tuning, cartridges), and no embeddings."""
    return holds_states(model.active_peft_config)


def shares_states(model: Any, num_virtual: int, num_tokens: int) -> bool:
    """Whether a forward of rows of `num_tokens` may run behind a cache that holds the prompt.

    Raises:
        ValueError: for prefix tuning under gradient checkpointing, where the base drops the prefix under it.
    """
    base: Any = model.get_base_model()
    if is_prefix(model):  # it needs no pass, and there is no other way
        if is_checkpointing(base) and not checkpoints_prefix(base, num_virtual, prefix_states(model)):
            raise ValueError(
                f"gradient checkpointing of {type(base).__name__} drops or changes the keys and values that prefix "
                "tuning trains: its layers do not take them again when they are recomputed, or are compiled. Turn it "
                "off (TrainingArguments(gradient_checkpointing=False)), or use PromptTuningConfig or "
                "PromptEncoderConfig."
            )
        return True
    if outgrows_cache(model, num_virtual + num_tokens):
        return False
    return not is_checkpointing(base) or (shares_prefix(base, num_virtual) and checkpoints_prefix(base, num_virtual))


def outgrows_cache(model: Any, num_positions: int) -> bool:
    """Whether virtual tokens and rows, together `num_positions`, may outgrow the keys and values of the prompt's pass.

    Beyond the switch of longrope they differ from those of a whole sequence; see `cache_switch`.
    """
    base: Any = model.get_base_model()
    switch, _ = cache_switch(base)
    if switch is None or num_positions <= switch:
        return False
    warn_once(
        f"{type(base).__name__} changes beyond {switch} positions, where a shared prompt is not the same: the prompt "
        "is concatenated to every row, which is slower."
    )
    return True
