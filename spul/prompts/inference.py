"""The ordinary forward of a prompted model, without `is_forget`: PEFT's output, computed from cached states."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftType
from torch import Tensor

from ..losses.positions import has_left_padding, pack_right
from ..losses.terms import IGNORE_INDEX
from ..models.causal_lm import needs_gradient
from ..models.compat import is_checkpointing
from .arguments import CACHES, check_forward_arguments, check_mask
from .shared_prefix import check_prefix_is_kept, outgrows_cache, prompt_states

# Embeddings, and outputs that have virtual tokens: not available from a cached prompt.
_NEEDS_CONCATENATION = ("inputs_embeds", "output_hidden_states", "output_attentions")


def ordinary_forward(
    model: Any,
    concatenated: Callable[..., Any],
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    **kwargs: Any,
) -> Any:
    """PEFT's forward, corrected for left-padded batches; without gradient, from the cached prompt.

    Args:
        model: the unlearner, its prompt enabled.
        concatenated: PEFT's own forward, which puts the prompt in front of every row.
        input_ids: (B, n), padded on either side.
        attention_mask: (B, n).
        labels: (B, n).
        kwargs: further arguments of the base's forward.

    Raises:
        ValueError: for a cache or positions, which do not go with a prompt; if left-padded rows come with arguments
            or outputs tied to positions, which packing moves.
    """
    check_forward_arguments(kwargs)
    embeds = kwargs.get("inputs_embeds") is not None
    if (input_ids is None) != embeds:
        raise ValueError(f"forward takes either input_ids or inputs_embeds; found {'both' if embeds else 'neither'}.")
    check_mask(attention_mask)
    if attention_mask is None or not has_left_padding(attention_mask):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return _forward(model, concatenated, **inputs, **kwargs)
    refused = ("logits_to_keep", "output_hidden_states", "output_attentions", "use_cache", "inputs_embeds")
    tied = [name for name in refused if isinstance(kwargs.get(name), Tensor) or kwargs.get(name)]
    if bad := [*tied, *(["return_dict=False"] if kwargs.get("return_dict") is False else [])]:
        raise ValueError(f"left-padded rows under a prompt take no {', '.join(bad)}; pad on the right.")
    assert input_ids is not None  # embeddings were refused above
    width = input_ids.shape[1]
    columns = torch.arange(width, device=input_ids.device).expand_as(input_ids)
    mask, ids, origin = pack_right(attention_mask, input_ids, columns)
    packed_labels = None if labels is None else pack_right(attention_mask, labels)[1]
    out = _forward(model, concatenated, input_ids=ids, attention_mask=mask, labels=packed_labels, **kwargs)
    back = origin.argsort(dim=1) + (out.logits.shape[1] - width)
    head = out.logits[:, : out.logits.shape[1] - width]
    out.logits = torch.cat([head, out.logits.take_along_dim(back[..., None], dim=1)], dim=1)
    return out


def _forward(model: Any, concatenated: Callable[..., Any], **inputs: Any) -> Any:
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        out = _behind_prefix(model, **inputs)
    else:
        out = _from_cached_prompt(model, **inputs) if _can_use_cached_prompt(model, **inputs) else None
    return concatenated(**inputs) if out is None else out


def _behind_prefix(
    model: Any, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None, **kwargs: Any
) -> Any:
    """The base's forward behind a prefix, as in PEFT, which passes the cache by the name that transformers renames."""
    base: Any = model.get_base_model()
    check_prefix_is_kept(base)
    states = prompt_states(model)
    if states is None:
        return None
    _drop_token_types(kwargs)
    if attention_mask is None:
        rows = kwargs["inputs_embeds"] if input_ids is None else input_ids
        attention_mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
    return base(input_ids=input_ids, labels=labels, **states.prefix_inputs(base, attention_mask), **kwargs)


def _drop_token_types(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("token_type_ids", None) is not None:
        warnings.warn("a prompt has no token types: token_type_ids are ignored, as in PEFT.", stacklevel=5)


def _can_use_cached_prompt(model: Any, input_ids: Tensor | None, labels: Tensor | None, **kwargs: Any) -> bool:
    base: Any = model.get_base_model()
    last = kwargs.get("logits_to_keep", 0)
    routes = kwargs.get("output_router_logits") or getattr(base.config, "output_router_logits", False)
    return (
        input_ids is not None
        and not needs_gradient(model)
        and not any(kwargs.get(name) is not None and kwargs[name] is not False for name in _NEEDS_CONCATENATION)
        and kwargs.get("return_dict") is not False
        and isinstance(last, int)
        and last <= input_ids.shape[1]
        and (labels is None or (last == 0 and hasattr(base, "loss_function")))
        and not routes  # a mixture of experts has a loss over all positions
        and not is_checkpointing(base)
        and not outgrows_cache(model, input_ids.shape[1])
    )


def _from_cached_prompt(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, **kwargs: Any
) -> Any:
    base: Any = model.get_base_model()
    states = prompt_states(model, with_logits=not kwargs.get("logits_to_keep"))
    if states is None:
        return None
    rows = len(input_ids)
    _drop_token_types(kwargs)
    loss_options = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
    returns_cache = kwargs.pop("use_cache", None)
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    out = base(
        input_ids=input_ids,
        **states.prefix_inputs(base, attention_mask),
        use_cache=True,
        **kwargs,
    )
    fields = {"loss": None, **out}  # in the order of every output of transformers: the loss comes first
    if returns_cache is False:
        fields |= {name: None for name in CACHES if name in fields}
    if states.logits is not None and not kwargs.get("logits_to_keep"):
        fields["logits"] = torch.cat([states.logits.expand(rows, -1, -1), out.logits], dim=1)
    if labels is not None:
        fields["loss"] = base.loss_function(
            logits=fields["logits"],
            labels=torch.cat([labels.new_full((rows, states.num_virtual_tokens), IGNORE_INDEX), labels], dim=1),
            vocab_size=base.config.get_text_config().vocab_size,
            **loss_options,
        )
    return type(out)(**fields)
