"""Generation under a prompt: left-padded rows behind a cache filled with the prompt's keys and values."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor

from ..models.causal_lm import max_positions
from .shared_prefix import PromptStates, prompt_states


def generate_prompted(model: PeftModelForCausalLM, input_ids: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """`generate` of transformers under the active prompt; see `SoftPromptUnlearner.generate`."""
    if input_ids is None:
        raise ValueError("generate needs input_ids (batch, tokens); an empty prompt cannot be continued.")
    if args:  # transformers' second positional argument
        kwargs["generation_config"], args = args[0], args[1:]
    for name in ("inputs_embeds", "past_key_values", "position_ids"):
        if kwargs.get(name) is not None:
            raise ValueError(f"generate under a soft prompt takes no {name}: pass input_ids and attention_mask.")
    if kwargs.get("use_cache") is False:
        raise ValueError("generate under a soft prompt reads it from the cache; leave out use_cache=False.")
    if kwargs.pop("token_type_ids", None) is not None:
        warnings.warn("a prompt has no token types: token_type_ids are ignored, as in PEFT.", stacklevel=3)
    given_mask = kwargs.pop("attention_mask", None)
    attention_mask = _mask_from_pads(model, input_ids) if given_mask is None else given_mask
    if not bool(attention_mask.any(dim=1).all()):
        raise ValueError("attention_mask has a row of zeros only: there is nothing to continue in it.")

    base: Any = model.get_base_model()
    was_training = base.training
    base.eval()  # gradient checkpointing, in training mode, would drop the cache and the prompt with it
    try:
        with torch.no_grad():
            states, limit = prompt_states(model), max_positions(base)
            if states is None:
                raise ValueError(
                    f"{type(base).__name__} has no plain key/value cache, which generate under a soft prompt needs. "
                    "Score answers with spul.score_completions instead."
                )
            if limit is not None and states.num_virtual_tokens + input_ids.shape[1] >= limit:
                raise ValueError(
                    f"{states.num_virtual_tokens} virtual tokens and {input_ids.shape[1]} tokens leave no room in the "
                    f"model's {limit} positions to generate anything; shorten the input."
                )
            lengths = attention_mask.sum(dim=1)
            if len(lengths.unique()) > 1 and _crosses_window(
                model, states.num_virtual_tokens + input_ids.shape[1], kwargs
            ):
                return _generate_by_length(model, states, input_ids, attention_mask, lengths, args, kwargs)
            return _generate(model, states, input_ids, attention_mask, args, kwargs)
    finally:
        base.train(was_training)


def _generate(
    model: PeftModelForCausalLM,
    states: PromptStates,
    input_ids: Tensor,
    attention_mask: Tensor,
    args: tuple,
    kwargs: dict,
) -> Any:
    order = attention_mask.ne(0).long().argsort(dim=1, stable=True)  # pads first
    left_ids, left_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
    base: Any = model.get_base_model()
    config = kwargs.get("generation_config") or base.generation_config
    beams, returned = (
        kwargs[name] if kwargs.get(name) is not None else (getattr(config, name, None) or 1)
        for name in ("num_beams", "num_return_sequences")
    )
    out = base.generate(
        left_ids,
        *args,
        **states.prefix_inputs(base, left_mask, len(left_ids) * max(beams, returned)),
        **kwargs,
    )
    inputs = input_ids.repeat_interleave(returned, dim=0)  # padded as the caller padded them
    if isinstance(out, Tensor):
        return torch.cat([inputs, out[:, inputs.shape[1] :]], dim=1)
    out.sequences = torch.cat([inputs, out.sequences[:, inputs.shape[1] :]], dim=1)
    return out


def _generate_by_length(
    model: PeftModelForCausalLM,
    states: PromptStates,
    input_ids: Tensor,
    attention_mask: Tensor,
    lengths: Tensor,
    args: tuple,
    kwargs: dict,
) -> Tensor:
    """Generate rows of one length at a time: pads between prompt and tokens would use up a sliding window."""
    outputs: dict[int, Tensor] = {}
    width = input_ids.shape[1]
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        real = attention_mask[rows].ne(0)
        ids = input_ids[rows][real].view(len(rows), length)
        out = _generate(model, states, ids, torch.ones_like(ids), args, kwargs)
        if not isinstance(out, Tensor):
            raise ValueError(
                "rows of unequal length on a sliding-window model are generated in groups, which cannot be joined "
                "under return_dict_in_generate=True; pass rows of one length, or leave that out."
            )
        per_row = len(out) // len(rows)
        for row, new in zip(rows.tolist(), out[:, length:].split(per_row), strict=True):
            outputs[row] = new
    config: Any = kwargs.get("generation_config") or model.generation_config
    pad = next((x for x in (kwargs.get("pad_token_id"), config.pad_token_id, config.eos_token_id) if x is not None), 0)
    pad = pad[0] if isinstance(pad, (list, tuple)) else pad
    longest = max(new.shape[1] for new in outputs.values())
    joined = []
    for row in range(len(input_ids)):
        new = torch.nn.functional.pad(outputs[row], (0, longest - outputs[row].shape[1]), value=int(pad))
        joined.append(torch.cat([input_ids[row].expand(len(new), width), new], dim=1))
    return torch.cat(joined)


def _crosses_window(model: PeftModelForCausalLM, num_tokens: int, kwargs: dict) -> bool:
    """Whether `num_tokens` (prompt and input) and the longest answer exceed a layer's sliding window."""
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return False
    limits = kwargs.get("generation_config") or base.generation_config
    options = [x.get(name) for x in (kwargs, limits.to_dict()) for name in ("max_new_tokens", "max_length")]
    num_new = next((x for x in options if x is not None), 20)  # 20 is transformers' own default
    return num_tokens + num_new > window


def _mask_from_pads(model: PeftModelForCausalLM, input_ids: Tensor) -> Tensor:
    """The mask of rows without one, as in transformers: pad tokens are pads, unless the pad token is also an EOS."""
    config: Any = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in ends:
        return torch.ones_like(input_ids)
    return input_ids.ne(config.pad_token_id).long()
