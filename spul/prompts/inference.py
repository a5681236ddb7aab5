"""The ordinary forward of a prompted model, without `is_forget`: PEFT's output, computed from cached states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.positions import has_left_padding, pack_right
from ..losses.terms import IGNORE_INDEX
from ..models.causal_lm import needs_gradient
from .arguments import CACHES, check_forward_arguments, check_rows, drop_token_types
from .row_prompts import RowPrompts, in_order
from .shared_prefix import is_prefix, prompt_states, shares_states
from .states import in_front

# Embeddings, and outputs that have virtual tokens: not available from a cached prompt.
_NEEDS_CONCATENATION = ("inputs_embeds", "output_hidden_states", "output_attentions")
# Outputs that the base's config may ask for in place of the call.
_OF_CONFIG = ("output_hidden_states", "output_attentions")
# What is tied to columns, where rows have prompts of their own.
_NOT_BY_ROW = (*_NEEDS_CONCATENATION, "logits_to_keep", "output_router_logits")


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
            or outputs tied to positions, which packing moves; if prompt and rows exceed positions that the base looks
            up.
    """
    check_forward_arguments(kwargs)
    kwargs = _with_outputs_of_config(model.get_base_model(), kwargs)
    embeds = kwargs.get("inputs_embeds") is not None
    if (input_ids is None) != embeds:
        raise ValueError(f"forward takes either input_ids or inputs_embeds; found {'both' if embeds else 'neither'}.")
    rows = kwargs["inputs_embeds"][..., 0] if input_ids is None else input_ids
    check_rows(rows, attention_mask)
    RowPrompts(model, len(rows)).check_positions(rows, attention_mask, by_column=True)
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


def _with_outputs_of_config(base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not None, and the outputs that the base's config asks for where they do not say."""
    asked = {name: True for name in _OF_CONFIG if getattr(base.config, name, False)}
    return asked | {name: value for name, value in kwargs.items() if value is not None}


def _forward(model: Any, concatenated: Callable[..., Any], **inputs: Any) -> Any:
    if is_prefix(model):
        out = _behind_prefix(model, **inputs)
    else:
        out = _from_cached_prompt(model, **inputs) if _can_use_cached_prompt(model, **inputs) else None
    return concatenated(**inputs) if out is None else out


def _behind_prefix(
    model: Any, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None, **kwargs: Any
) -> Any:
    """The base's forward behind a prefix, as in PEFT, which passes the cache by the name that transformers renames."""
    base: Any = model.get_base_model()
    rows = kwargs["inputs_embeds"] if input_ids is None else input_ids
    shares_states(model, model.active_peft_config.num_virtual_tokens, rows.shape[1])  # raises where it does not
    states = prompt_states(model)
    assert states is not None  # a prefix has states, or raises
    drop_token_types(kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
    with in_front(base, states, attention_mask) as prefix:
        if prefix["use_cache"]:
            del prefix["use_cache"]  # as the base's config says
        return base(input_ids=input_ids, labels=labels, **(prefix | kwargs))


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
        and shares_states(model, model.active_peft_config.num_virtual_tokens, input_ids.shape[1])
    )


def _from_cached_prompt(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, **kwargs: Any
) -> Any:
    base: Any = model.get_base_model()
    states = prompt_states(model, with_logits=not kwargs.get("logits_to_keep"))
    if states is None:
        return None
    rows = len(input_ids)
    drop_token_types(kwargs)
    num_items = kwargs.pop("num_items_in_batch", None)
    returns_cache = kwargs.pop("use_cache", None)
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    with in_front(base, states, attention_mask) as prefix:
        out = base(input_ids=input_ids, **prefix, **kwargs)
    fields = {"loss": None, **out}  # in the order of every output of transformers: the loss comes first
    if returns_cache is False:
        fields |= {name: None for name in CACHES if name in fields}
    if states.logits is not None and not kwargs.get("logits_to_keep"):
        fields["logits"] = torch.cat([states.logits.expand(rows, -1, -1), out.logits], dim=1)
    if labels is not None:
        own = torch.cat([labels.new_full((rows, states.num_virtual_tokens), IGNORE_INDEX), labels], dim=1)
        fields["loss"] = _loss(base, fields["logits"], own, num_items)
    return type(out)(**fields)


def _loss(base: Any, logits: Tensor, labels: Tensor, num_items: Any) -> Tensor:
    """The base's own loss, a sum over `num_items` where they are given."""
    given = {} if num_items is None else {"num_items_in_batch": num_items}
    size = base.config.get_text_config().vocab_size
    return base.loss_function(logits=logits, labels=labels, vocab_size=size, **given)


def _by_prompt(base: Any, prompts: RowPrompts, input_ids: Tensor, attention_mask: Tensor, kwargs: dict) -> Any:
    """The forwards of the rows under each prefix, as one output with logits alone."""
    logits: list[tuple[list[int], Tensor]] = []
    out: Any = None
    for rows, group in prompts.by_prompt():
        states, mask = group.states(), attention_mask[rows]
        if states is None:  # a prefix has states, or raises: these rows have no prompt
            out = base(input_ids=input_ids[rows], attention_mask=mask, use_cache=False, **kwargs)
        else:
            with in_front(base, states, mask) as prefix:
                out = base(input_ids=input_ids[rows], **prefix, **kwargs)
        logits.append((rows, out.logits))
    return type(out)(logits=in_order(logits))


def named_forward(
    model: Any,
    adapter_names: Sequence[str] | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    prompt_position: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """A forward in which each row has the prompt of its name, or none; or the active one, inside the rows.

    Returns:
        The base's output, without a cache; its logits (B, n, V) are at the rows' own tokens, and each predicts the
        row's next token. Its loss, with `labels`, is the base's own; a label at a row's first token is not used.

    Raises:
        TypeError: for names that are no list of strings.
        ValueError: for other names than the model has, arguments or outputs that are tied to columns, and prompts and
            rows that exceed positions that the base looks up.
    """
    check_forward_arguments(kwargs)
    base: Any = model.get_base_model()
    kwargs = _with_outputs_of_config(base, kwargs)
    found = [name for name in _NOT_BY_ROW if isinstance(kwargs.get(name), Tensor) or kwargs.get(name)]
    found += ["return_dict=False"] if kwargs.get("return_dict") is False else []
    if labels is not None and getattr(base.config, "output_router_logits", False):
        found.append("labels of a mixture of experts whose loss has a term over all positions")
    if input_ids is None or found:
        raise ValueError(
            "forward with adapter_names, or under a prompt inside the rows, takes input_ids and returns logits at all "
            f"of them; found {', '.join(found) or 'no input_ids'}: leave that out, give it as False where the base's "
            "config asks for it, or choose one prompt at the start of the rows by set_adapter."
        )
    check_rows(input_ids, attention_mask)
    if not input_ids.shape[1]:
        raise ValueError("input_ids has rows of no tokens; such a forward returns logits at the tokens.")
    drop_token_types(kwargs)
    kwargs.pop("use_cache", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    prompts = RowPrompts(model, len(input_ids), adapter_names, prompt_position)
    if prompts.names_a_prompt:
        prompts.check_positions(input_ids, attention_mask, by_column=False)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    mask, ids, origin = pack_right(mask, input_ids, columns)
    if groups := prompts.apart(mask):
        logits = []
        for rows, width in groups:
            out = _packed_forward(prompts.of_rows(rows), ids[rows, :width], mask[rows, :width], kwargs)
            logits.append((rows, F.pad(out.logits, (0, 0, 0, ids.shape[1] - width))))
        out = type(out)(logits=in_order(logits))
    else:
        out = _packed_forward(prompts, ids, mask, kwargs)
    out.logits = out.logits.take_along_dim(origin.argsort(dim=1)[..., None], dim=1)
    fields = {"loss": None, **out}
    fields |= {name: None for name in CACHES if name in fields}  # `in out` would count old names, too
    if labels is not None:
        # Pads in front of a row would put a label next to the wrong logits.
        packed_labels, packed = labels.gather(1, origin), out.logits.take_along_dim(origin[..., None], dim=1)
        fields["loss"] = _loss(base, packed, packed_labels, num_items)
    return type(out)(**fields)


def _packed_forward(prompts: RowPrompts, ids: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Any:
    """The base's output for right-padded rows (B, n), each under its prompt; logits (B, n, V) at its own tokens."""
    base: Any = prompts.model.get_base_model()
    states = prompts.shared_states(ids.shape[1]) if prompts.names_a_prompt else None
    if not prompts.names_a_prompt:
        out = base(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs)
    elif states is None and prompts.is_prefix:
        out = _by_prompt(base, prompts, ids, mask, kwargs)
    elif states is None:
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        embeds, full = prompts.concatenated(prompts.model.word_embeddings(ids), mask, pads_first=False)
        out = base(inputs_embeds=embeds, attention_mask=full, use_cache=False, **kwargs)
        out.logits = out.logits.take_along_dim(prompts.moved(columns, mask)[..., None], dim=1)
    else:
        with in_front(base, states, mask) as prefix:
            out = base(input_ids=ids, **prefix, **kwargs)
    return out
