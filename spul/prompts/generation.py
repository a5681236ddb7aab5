"""Generation under a prompt: left-padded rows behind a cache filled with the prompt's keys and values."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers import RepetitionPenaltyLogitsProcessor as RepetitionPenalty

from ..models.causal_lm import cache_switch, evaluation_mode, fails_beyond_positions, max_positions
from ..models.compat_checkpointing import unswitched
from ..models.compat_modules import with_evaluated
from .arguments import (
    OF_THE_BATCH,
    changed_settings,
    check_generate_arguments,
    check_no_empty_row,
    check_rows,
    drop_token_types,
    generation_settings,
    mask_from_pads,
    named_arguments,
)
from .pads import filled_pads, with_own_tokens
from .probe import continues_embeddings, continues_prefix
from .row_prompts import RowPrompts, in_order
from .shared_prefix import outgrows_cache
from .states import MixedStates, PromptStates


def generate_prompted(model: PeftModelForCausalLM, input_ids: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """`generate` of transformers under the active prompt, or those named; see `SoftPromptUnlearner.generate`."""
    if input_ids is None:
        check_generate_arguments(kwargs)  # which has inputs_embeds in their place
        raise ValueError("generate needs input_ids (batch, tokens); an empty prompt cannot be continued.")
    check_rows(input_ids, kwargs.get("attention_mask"))
    base: Any = model.get_base_model()
    named = (kwargs.pop("adapter_names", None), kwargs.pop("prompt_position", None))
    prompts = RowPrompts(with_evaluated(model, "prompt_encoder"), len(input_ids), *named)
    kwargs = _named(model, args, kwargs)
    check_generate_arguments(kwargs)
    settings = generation_settings(base, kwargs)
    kwargs = changed_settings(kwargs, use_cache=True)  # a default of False would drop the prompt
    drop_token_types(kwargs)
    given_mask = kwargs.pop("attention_mask", None)
    ids = (settings.pad_token_id, settings.eos_token_id)
    attention_mask = mask_from_pads(input_ids, *ids) if given_mask is None else given_mask
    check_no_empty_row(attention_mask)

    call = _Call(prompts, settings, input_ids, attention_mask, kwargs)
    # Gradient checkpointing, in training mode, would drop the cache and the prompt with it.
    with unswitched(base), evaluation_mode(base), torch.no_grad():
        if not prompts.names_a_prompt:  # checked all the same: what is refused does not depend on the rows
            return _without_prompt(call)
        return _prompted(call)


def generate_disabled(model: PeftModelForCausalLM, input_ids: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """`generate` of the base where the prompt is disabled, by the settings and in the mode of `generate_prompted`."""
    base: Any = model.get_base_model()
    with unswitched(base), evaluation_mode(base):
        return base.generate(input_ids, **_named(model, args, kwargs))


def _named(model: PeftModelForCausalLM, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `generate` after its inputs, by name, with the config that the unlearner has."""
    base: Any = model.get_base_model()
    kwargs = kwargs | named_arguments(base.generate, args)
    own = model.__dict__.get("generation_config")  # set on the unlearner, as the base's would be
    return {**kwargs, "generation_config": kwargs.get("generation_config") or own}


@dataclass(frozen=True)
class _Call:
    """A checked call of `generate`: rows (B, n) and their mask, their prompts, settings, and the call's arguments."""

    prompts: RowPrompts
    settings: GenerationConfig
    input_ids: Tensor
    attention_mask: Tensor
    kwargs: dict[str, Any]

    @property
    def base(self) -> Any:
        """The model under the prompts."""
        return self.prompts.model.get_base_model()

    @property
    def num_returned(self) -> int:
        """Sequences returned for each row."""
        return self.settings.num_return_sequences or 1

    def left_padded(self) -> tuple[Tensor, Tensor]:
        """The rows and their mask, pads first, filled."""
        order = self.attention_mask.ne(0).long().argsort(dim=1, stable=True)
        mask = self.attention_mask.gather(1, order)
        return filled_pads(self.input_ids.gather(1, order), mask), mask

    def as_given(self, out: Any) -> Any:
        """The output of left-padded rows, the inputs in it padded as the caller padded them."""
        inputs = self.input_ids.repeat_interleave(self.num_returned, dim=0)
        if isinstance(out, Tensor):
            return torch.cat([inputs, out[:, inputs.shape[1] :]], dim=1)
        out.sequences = torch.cat([inputs, out.sequences[:, inputs.shape[1] :]], dim=1)
        return out

    def in_new_tokens(self) -> dict[str, Any]:
        """The arguments with limits in new tokens in place of lengths, which count the columns of the whole batch.

        Raises:
            ValueError: if `max_length` leaves no room.
        """
        changes: dict[str, Any] = {}
        settings, width = self.settings, self.input_ids.shape[1]
        if settings.max_new_tokens is None and settings.max_length is not None:
            if settings.max_length <= width:
                raise ValueError(
                    f"max_length={settings.max_length} leaves nothing to generate after {width} tokens; raise it, or "
                    "pass max_new_tokens."
                )
            changes |= {"max_new_tokens": settings.max_length - width, "max_length": None}
        if settings.min_new_tokens is None and settings.min_length:
            changes |= {"min_new_tokens": max(0, settings.min_length - width), "min_length": None}
        return changed_settings(self.kwargs, **changes)

    def with_processors(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments under which rows of a batch are kept from repeating what they are kept from alone.

        From transformers 5.23 on a repetition penalty leaves out as many columns of the tokens as the mask begins with
        zeros, which are those of a prompt that is shorter than another row's, too.
        """
        own = self.settings
        size, encoder_size = own.no_repeat_ngram_size, own.encoder_no_repeat_ngram_size
        kwargs = with_own_tokens(kwargs, size, encoder_size, own.encoder_repetition_penalty, *self.left_padded())
        lengths = {self.prompts.lengths[i] for i in self.prompts.index}
        given = kwargs.get("logits_processor") or []
        penalty = own.repetition_penalty
        if len(lengths) == 1 or penalty in (None, 1.0) or any(type(one) is RepetitionPenalty for one in given):
            return kwargs
        first = RepetitionPenalty(penalty)  # takes the place of transformers' own
        return {**kwargs, "logits_processor": LogitsProcessorList([first, *given])}


def _prompted(call: _Call) -> Any:
    """Generate behind the shared prefix where the base has earned it, else from concatenated embeddings."""
    base, prompts, attention_mask = call.base, call.prompts, call.attention_mask
    num_virtual, width, limit = prompts.num_virtual_tokens, call.input_ids.shape[1], max_positions(base)
    if limit is not None and num_virtual + width >= limit:
        raise ValueError(
            f"{num_virtual} virtual tokens and {width} tokens leave no room in the model's {limit} positions to "
            "generate anything; shorten the input."
        )
    lengths = attention_mask.ne(0).sum(dim=1)
    unequal = len(lengths.unique()) > 1
    totals = lengths + prompts.row_lengths(lengths.device)
    call = _within_positions(call, int(totals.max()))
    longest = num_virtual + width + _max_new_tokens(call.settings, width)
    if groups := _groups_at_switch(call, lengths):
        return _by_group(call, groups)
    states, several = prompts.states(), len(prompts.named) > 1
    uneven = len(totals.unique()) > 1 or not bool(attention_mask.all())
    if states is not None and (prompts.is_prefix or not outgrows_cache(prompts.model, longest)):
        if continues_prefix(base, states, unequal=False):
            crosses = unequal and _crosses_window(base, longest)
            if not unequal or (not crosses and continues_prefix(base, states, unequal=True)):
                return _behind_cache(call, states)
        elif prompts.is_prefix and not several:
            raise ValueError(
                f"{type(base).__name__} does not generate behind a prefix as its forward computes; use "
                "PromptTuningConfig or PromptEncoderConfig, whose virtual tokens are input embeddings."
            )
    if not prompts.is_prefix and continues_embeddings(base, uneven):
        return _concatenated(call)
    if uneven or several:
        return _by_group(call, _of_one_length(call, lengths))
    raise ValueError(
        f"{type(base).__name__} shares no prompt between rows, and its generate takes no embeddings, or does not "
        "continue them as its forward computes, so generate cannot put a prompt in; forward and scoring can."
    )


def _without_prompt(call: _Call) -> Any:
    """Generate rows that have no prompt, padded on either side as those that have one."""
    padded, lengths = not bool(call.attention_mask.all()), call.attention_mask.ne(0).sum(dim=1)
    if groups := _groups_at_switch(call, lengths):
        return _by_group(call, groups)
    if padded and not continues_embeddings(call.base, unequal=True):
        return _by_group(call, _of_one_length(call, lengths))
    ids, mask = call.left_padded()
    return call.as_given(call.base.generate(ids, attention_mask=mask, **call.with_processors(call.kwargs)))


def _behind_cache(call: _Call, states: PromptStates | MixedStates) -> Any:
    """Generate behind a cache that holds the prompts' keys and values."""
    ids, mask = call.left_padded()
    rows = len(ids) * max(call.settings.num_beams or 1, call.num_returned)
    inputs = states.prefix_inputs(call.base, mask, rows)
    return call.as_given(call.base.generate(ids, **inputs, **call.with_processors(call.kwargs)))


def _concatenated(call: _Call) -> Any:
    """Generate from the prompt's embeddings and those of every row, pads in front of both.

    The base fills a cache of its own, and no pads stand between prompt and tokens, which would use up a window.

    Raises:
        ValueError: for `prefill_chunk_size`: transformers cuts chunks of ids, never of embeddings.
    """
    if call.settings.prefill_chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size={call.settings.prefill_chunk_size}: here the prompt stands as embeddings in every "
            "row, which are not taken in chunks; leave it out."
        )
    ids, mask = call.left_padded()
    rows = call.prompts.model.word_embeddings(ids)
    embeds, mask = call.prompts.concatenated(rows, mask, pads_first=True)
    kwargs = call.with_processors(call.in_new_tokens())
    return call.as_given(call.base.generate(ids, inputs_embeds=embeds, attention_mask=mask, **kwargs))


def _of_one_length(call: _Call, lengths: Tensor) -> list[Hashable]:
    """For each row the group of its prompt and length (B,), for families that take no others together.

    Under a prefix, pads between prompt and tokens would use up a sliding window; some families generate otherwise from
    left-padded rows, or have no cache that prompts of different lengths could share.
    """
    return list(zip(call.prompts.index, lengths.tolist(), strict=True))


def _by_group(call: _Call, groups: Sequence[Hashable]) -> Tensor:
    """Generate rows in groups, named for each row, without the columns that are pads of a whole group.

    Raises:
        ValueError: for arguments that see the batch as a whole, or outputs that cannot be joined.
    """
    whole = [name for name in OF_THE_BATCH if call.kwargs.get(name) is not None]
    if call.settings.return_dict_in_generate:
        whole.append("return_dict_in_generate=True")
    if whole:
        raise ValueError(
            f"{type(call.base).__name__} generates rows of different lengths, or under different prompts, in groups "
            f"here, which {', '.join(whole)} cannot follow; pass rows of one length under one prompt, or leave that "
            "out."
        )
    kwargs = call.in_new_tokens()
    settings = generation_settings(call.base, kwargs)
    ids, mask = call.left_padded()
    found: list[tuple[list[int], Tensor]] = []
    for one in dict.fromkeys(groups):
        rows = [row for row, own in enumerate(groups) if own == one]
        width = int(mask[rows].ne(0).sum(dim=1).max())
        group = _Call(call.prompts.of_rows(rows), settings, ids[rows, -width:], mask[rows, -width:], kwargs)
        out = _prompted(group) if group.prompts.names_a_prompt else _without_prompt(group)
        found.append((rows, out[:, width:].view(len(rows), -1, out.shape[1] - width)))
    pad = next((x for x in (settings.pad_token_id, settings.eos_token_id) if x is not None), 0)
    pad = pad[0] if isinstance(pad, (list, tuple)) else pad
    longest = max(new.shape[2] for _, new in found)
    new = in_order([(rows, F.pad(new, (0, longest - new.shape[2]), value=int(pad))) for rows, new in found])
    return torch.cat([call.input_ids[:, None].expand(-1, new.shape[1], -1), new], dim=2).flatten(0, 1)


def _max_new_tokens(settings: GenerationConfig, width: int) -> int:
    """The most tokens that may be generated after rows of `width`."""
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    return 20 if settings.max_length is None else settings.max_length - width  # 20 is transformers' own default


def _within_positions(call: _Call, longest: int) -> _Call:
    """The call with room for its answers, where the base fails beyond its positions: a default length is cut.

    Args:
        call: the call.
        longest: tokens of the longest row, its virtual ones included.

    Raises:
        ValueError: if the caller gave a length that does not fit.
    """
    limit, num_new = max_positions(call.base), _max_new_tokens(call.settings, call.input_ids.shape[1])
    # The last token is not read.
    if limit is None or longest + num_new - 1 <= limit or not fails_beyond_positions(call.base):
        return call
    config = call.kwargs.get("generation_config")
    names = ("max_new_tokens", "max_length")
    if any(call.kwargs.get(name) is not None or getattr(config, name, None) is not None for name in names):
        raise ValueError(
            f"the longest row has {longest} tokens, virtual ones included; {num_new} new tokens exceed the model's "
            f"{limit} positions: generate at most max_new_tokens={limit - longest + 1}."
        )
    kwargs = changed_settings(call.kwargs, max_new_tokens=limit - longest)  # transformers, too, ends at the last one
    return replace(call, settings=generation_settings(call.base, kwargs), kwargs=kwargs)


def _groups_at_switch(call: _Call, lengths: Tensor) -> list[Hashable]:
    """For each row, of some length (B,), its group where the base changes beyond a number of positions; else none.

    With longrope the longest row decides on the rotary factors of all, and pads count as positions of a cache. Rows
    under one prompt that stay on one side go together, as do rows of one length that cross without a prompt.

    Raises:
        ValueError: if a row drops its cache, and its prompt with it, on the way.
    """
    prompts, base, width = call.prompts, call.base, call.input_ids.shape[1]
    switch, changes_factors = cache_switch(base)
    num_new = _max_new_tokens(call.settings, width)
    if switch is None or prompts.num_virtual_tokens + width + num_new <= switch:
        return []
    if not (prompts.is_prefix or changes_factors):
        return []  # nothing changes where the prompt stands as embeddings
    virtual = prompts.row_lengths(lengths.device)
    totals = lengths + virtual
    crosses = virtual.ne(0) & (totals + num_new > switch)
    if not prompts.is_prefix:
        crosses &= totals <= switch
    if bool(crosses.any()):
        row = int(crosses.long().argmax())
        found = f"prompt and input of row {row} are {int(totals[row])} tokens, with new tokens up to "
        found += f"{int(totals[row]) + num_new}"
        if prompts.is_prefix:
            raise ValueError(
                f"{type(base).__name__} drops its cache beyond {switch} positions, and a prefix with it; {found}: "
                "generate fewer, or use PromptTuningConfig or PromptEncoderConfig."
            )
        raise ValueError(
            f"{type(base).__name__} changes its rotary factors beyond {switch} positions and drops its cache, and the "
            f"prompt with it, on the way there; {found}: generate fewer, or pass only rows that are beyond from the "
            "start."
        )
    is_one_group = len(set(prompts.index)) == 1 and bool(call.attention_mask.all())
    if is_one_group or bool((totals > switch).all()):
        return []
    sides = [
        "beyond" if total > switch else "below" if total + num_new <= switch else f"crosses from {total}"
        for total in totals.tolist()
    ]
    return list(zip(prompts.index, sides, strict=True))


def _crosses_window(base: Any, num_tokens: int) -> bool:
    """Whether `num_tokens` (prompt, input and the longest answer) exceed a layer's sliding window, or its chunk."""
    config = base.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    windows = [
        getattr(config, name, None)
        for name, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention"))
        if kinds is None or kind in kinds
    ]
    return any(window is not None and num_tokens > window for window in windows)
