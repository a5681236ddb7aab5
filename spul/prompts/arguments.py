"""Arguments of `forward` and `generate` under a prompt: honored, or refused before the base runs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ..models.compat_cache import CHUNKS_FOLLOW_CACHE
from ..records.messages import warn

CACHES = ("past_key_values", "cache", "cache_params")
_POSITIONS = ("position_ids", "cache_position")
_IGNORED_BY_PEFT = ("task_ids", "alora_offsets")  # taken for every adapter, without effect on these prompts
_OF_FORWARD = (*CACHES, *_POSITIONS, *_IGNORED_BY_PEFT)
_OF_GENERATE = ("inputs_embeds", *_OF_FORWARD)
# Methods of transformers that PEFT would take from the base, and that generate without the prompt.
METHODS_OF_THE_BASE = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
    "heal_tokens",
)
# Methods of PEFT's other adapters.
METHODS_OF_WEIGHTS = ("merge_and_unload", "merge_adapter", "unmerge_adapter", "unload", "add_weighted_adapter")
# Arguments of `generate` that see all rows at once, or their number in the batch.
OF_THE_BATCH = ("prefix_allowed_tokens_fn", "logits_processor", "stopping_criteria", "streamer")
_PLAIN_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


def check_forward_arguments(kwargs: dict[str, Any]) -> None:
    """Raise for arguments under which the prompt would be missing or doubled; remove those that are None.

    Raises:
        ValueError: for a cache, positions, and what PEFT takes and ignores.
    """
    for name in _pop_given(kwargs, _OF_FORWARD):
        if name in CACHES:
            raise ValueError(
                f"forward under a soft prompt takes no {name}: it would put the prompt in again. Pass all tokens so "
                "far as input_ids, or call generate, which keeps a cache."
            )
        raise ValueError(f"forward under a soft prompt takes no {name}: pass input_ids and attention_mask.")


def check_generate_arguments(kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `generate` that do not go with a prompt; remove those that are None.

    Raises:
        ValueError: for a cache, embeddings, positions, decoding by a function of the caller's own or with an
            assistant, and where the model is to be another one's assistant.
    """
    config = kwargs.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generation_config is a {type(config).__name__}; expected a GenerationConfig, such as "
            "GenerationConfig(max_new_tokens=8), or its settings as arguments."
        )
    if getattr(config, "is_assistant", False):
        raise ValueError("a model under a soft prompt cannot be the assistant_model of another; pass its base.")
    for name in ("assistant_model", "custom_generate"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"generate under a soft prompt takes no {name}: it decodes by greedy search, sampling or beams; leave "
                "it out."
            )
    for name in _pop_given(kwargs, _OF_GENERATE):
        raise ValueError(f"generate under a soft prompt takes no {name}: pass input_ids and attention_mask.")
    if kwargs.get("use_cache") is False:
        raise ValueError("generate under a soft prompt reads it from the cache; leave out use_cache=False.")


def _pop_given(kwargs: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Remove arguments of these names from a call, and name those that were given: that are not None."""
    return [name for name in names if kwargs.pop(name, None) is not None]


def drop_token_types(kwargs: dict[str, Any]) -> None:
    """Drop the `token_type_ids` of a call, which a prompt has none of, with a warning as PEFT's."""
    if kwargs.pop("token_type_ids", None) is not None:
        warn("a prompt has no token types: token_type_ids are ignored, as in PEFT.")


def named_arguments(generate: Callable[..., Any], args: tuple) -> dict[str, Any]:
    """`args`, which follow the inputs in a call of `generate`, by their names."""
    names = list(inspect.signature(generate).parameters)[1:]
    return dict(zip(names, args, strict=False))


def mask_from_pads(input_ids: Tensor, pad: int | None, end: int | list[int] | None) -> Tensor:
    """The mask of rows (B, n) without one, as in transformers: pad tokens are pads, unless the pad token is an end.

    Args:
        input_ids: the rows.
        pad: the pad token; all tokens count without one.
        end: the end-of-sequence token, or several.
    """
    if pad is None or pad in (end if isinstance(end, (list, tuple)) else [end]):
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()


def check_rows(input_ids: Any, attention_mask: Any) -> None:
    """Raise unless ids are rows (B, n), and so is their mask, where there is one: the prompt's columns come in front.

    Args:
        input_ids: the ids, or another tensor of their shape.
        attention_mask: the mask, or None.

    Raises:
        TypeError: if they are no tensors.
        ValueError: for other shapes, and without rows.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids is a {type(input_ids).__name__}; expected a tensor (batch, tokens).")
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or not shape[0]:
        raise ValueError(f"input_ids has the shape {shape}; expected (batch, tokens), with a row or more.")
    if attention_mask is not None and tuple(getattr(attention_mask, "shape", ())) != shape:
        found = tuple(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
        raise ValueError(
            f"attention_mask under a soft prompt is (batch, tokens), as input_ids are, {shape}; found {found}."
        )


def check_no_empty_row(attention_mask: Tensor) -> None:
    """Raise if a row of a batch that is to be continued has no tokens.

    Raises:
        ValueError: if there is one.
    """
    if not bool(attention_mask.any(dim=1).all()):
        raise ValueError("attention_mask has a row of zeros only: there is nothing to continue in it.")


def generation_settings(base: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    """The settings that `generate` of the base would work by: the arguments, then a given config, then the base's own.

    Args:
        base: the base.
        kwargs: arguments of `generate`, with `generation_config` among them.

    Raises:
        ValueError: if they choose a cache, or a way of decoding that looks beyond the prompt's.
    """
    given = kwargs.get("generation_config")
    merged = GenerationConfig() if given is None else copy.deepcopy(given)
    for name, value in base.generation_config.to_dict().items():
        if value is not None and getattr(merged, name, None) is None:
            setattr(merged, name, value)
    for name in set(kwargs) & set(merged.to_dict()):
        setattr(merged, name, kwargs[name])
    # "hybrid" is what older configs of sliding-window models hold; transformers drops it.
    if merged.cache_implementation not in (None, "hybrid"):
        raise ValueError(
            f"cache_implementation={merged.cache_implementation!r}: generate under a soft prompt keeps the prompt in "
            "a cache of its own; leave out cache_implementation, in the arguments and in every generation_config."
        )
    if merged.num_beams is None:
        merged.num_beams = 1
    if min(merged.num_beams, 1 if merged.num_return_sequences is None else merged.num_return_sequences) < 1:
        raise ValueError(
            f"num_beams={merged.num_beams}, num_return_sequences={merged.num_return_sequences}; expected at least 1."
        )
    if (mode := merged.get_generation_mode()) not in _PLAIN_MODES:
        raise ValueError(
            f"generate under a soft prompt does not decode by {mode.value.replace('_', ' ')}; it decodes by greedy "
            "search, sampling or beams: leave out the setting that chooses another way."
        )
    if merged.guidance_scale not in (None, 1, 1.0):
        raise ValueError(
            f"guidance_scale={merged.guidance_scale}: it compares with a pass that has no soft prompt; leave it out."
        )
    if merged.prefill_chunk_size is not None and not CHUNKS_FOLLOW_CACHE:
        raise ValueError(
            f"prefill_chunk_size={merged.prefill_chunk_size}: transformers below 5.23 leaves a prompt out of chunks; "
            "leave it out, or install a newer transformers."
        )
    if merged.token_healing:
        raise ValueError("token_healing generates without the soft prompt; leave it out.")
    return merged


def changed_settings(kwargs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Arguments of `generate` with other settings: in the given config if there is one, which is copied."""
    given = kwargs.get("generation_config")
    if given is None:
        return {**kwargs, **changes}
    given = copy.deepcopy(given)
    for name, value in changes.items():
        setattr(given, name, value)
    return {**{name: value for name, value in kwargs.items() if name not in changes}, "generation_config": given}
