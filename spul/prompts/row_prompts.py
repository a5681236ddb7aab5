"""Prompts of the rows of a batch: one for all, or one per row by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.causal_lm import (
    cache_switch,
    counts_by_mask,
    fails_beyond_positions,
    logits_at,
    max_positions,
    needs_gradient,
)
from ..models.compat import is_sharded
from ..models.compat_checkpointing import is_checkpointing
from ..models.compat_devices import device_of
from .names import NO_PROMPT, check_adapter_names
from .one_pass import MOST_ADDED_TOKENS, joint_logits, tokens_of_prompts_row, waits_for_launches
from .position import check_column, stands_inside
from .probe import checkpoints_prefix, joins_prompt, shares_mixed_prefixes
from .shared_prefix import is_prefix, outgrows_cache, prompt_states, shares_states
from .states import MixedStates, PromptStates, in_front


class RowPrompts:
    """Prompts of the rows of a batch.

    Args:
        model: a prompt-learning PEFT model, its prompt enabled.
        num_rows: B.
        adapter_names: for each row the name of its prompt, `"__base__"` for none; the active one for all unless given.
        prompt_position: for each row the number of its tokens before a prompt that stands inside it, (B,); rows whose
            prompt stands at the start, or that have none, do not use it.

    Raises:
        TypeError: if `adapter_names` is no list of strings.
        ValueError: for another number of names than rows, names that the model does not have, and a prompt inside the
            rows without `prompt_position`.
    """

    def __init__(
        self,
        model: Any,
        num_rows: int,
        adapter_names: Sequence[str] | None = None,
        prompt_position: Tensor | None = None,
    ) -> None:
        self.model, self.num_rows, self.prompt_position = model, num_rows, prompt_position
        if adapter_names is None:
            self.named: list[Any] = [under(model, model.active_adapter)]
            self.index = [0] * num_rows
        else:
            check_adapter_names(model, adapter_names, num_rows)
            different = list(dict.fromkeys(adapter_names))
            self.named = [None if name == NO_PROMPT else under(model, name) for name in different]
            self.index = [different.index(name) for name in adapter_names]
        self.lengths = [0 if one is None else one.active_peft_config.num_virtual_tokens for one in self.named]
        self.inside = [one is not None and stands_inside(one) for one in self.named]
        if self.is_inside:
            check_column(prompt_position, num_rows)
        else:
            self.prompt_position = None

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens of the longest prompt."""
        return max(self.lengths, default=0)

    @property
    def is_prefix(self) -> bool:
        """Whether the prompts are keys and values; PEFT has one type of prompt per model."""
        return any(one is not None and is_prefix(one) for one in self.named)

    @property
    def is_inside(self) -> bool:
        """Whether a prompt stands inside its rows, which then share no keys and values of it."""
        return any(self.inside)

    @property
    def names_a_prompt(self) -> bool:
        """Whether a row has a prompt."""
        return any(one is not None for one in self.named)

    def row_lengths(self, device: torch.device) -> Tensor:
        """Virtual tokens of each row, (B,)."""
        return torch.tensor([self.lengths[i] for i in self.index], device=device)

    def tokens_before(self, attention_mask: Tensor) -> Tensor:
        """Tokens of each row before its prompt, (B,): 0 for prompts at the start.

        Raises:
            ValueError: if they are more than the row has, or below 0.
        """
        if not self.is_inside:
            return torch.zeros(self.num_rows, dtype=torch.long, device=attention_mask.device)
        assert self.prompt_position is not None  # checked above
        is_inside = torch.tensor([self.inside[i] for i in self.index], device=attention_mask.device)
        before = self.prompt_position.to(attention_mask.device).long().where(is_inside, 0)
        lengths = attention_mask.ne(0).sum(dim=1)
        if bool(((before < 0) | (before > lengths)).any()):
            raise ValueError(
                f"prompt_position is {before.tolist()}, and the rows have {lengths.tolist()} tokens; expected for "
                "each row the number of its tokens before the soft prompt, from 0 to all of them."
            )
        return before

    def of_rows(self, rows: Sequence[int]) -> RowPrompts:
        """The prompts of some rows, by their indices."""
        some = copy.copy(self)
        used = sorted({self.index[i] for i in rows})
        some.named, some.lengths = ([one[i] for i in used] for one in (self.named, self.lengths))
        some.inside = [self.inside[i] for i in used]
        if self.prompt_position is not None:
            some.prompt_position = self.prompt_position[list(rows)]
        some.num_rows, some.index = len(rows), [used.index(self.index[i]) for i in rows]
        return some

    def apart(self, attention_mask: Tensor) -> list[tuple[list[int], int]]:
        """Groups of rows that a base with longrope computes apart, and their widths; none where all go together.

        The longest row of a pass, its prompt and pads included, decides on the rotary factors of all. A group has one
        prompt, no column of pads alone, and rows on one side of the switch, so that each has those of it alone.

        Args:
            attention_mask: of right-padded rows, (B, n).

        Raises:
            ValueError: for several groups on a sharded base, whose processes pass it equally often.
        """
        base: Any = self.model.get_base_model()
        switch, changes_factors = cache_switch(base)
        if switch is None or not changes_factors or self.num_virtual_tokens + attention_mask.shape[1] <= switch:
            return []
        lengths = attention_mask.ne(0).sum(dim=1)
        beyond = (lengths + self.row_lengths(lengths.device) > switch).tolist()
        if all(beyond):
            return []
        keys = list(zip(self.index, beyond, strict=True))
        groups = [[row for row, own in enumerate(keys) if own == key] for key in dict.fromkeys(keys)]
        if len(groups) > 1 and is_sharded(base):
            raise ValueError(
                f"{type(base).__name__} changes its rotary factors beyond {switch} positions, and this batch has rows "
                f"on both sides, or of several prompts; a sharded base takes rows of one side under one prompt, since "
                "all of its processes run the same passes. Take batches of one row, or rows that stay on one side "
                "(max_length)."
            )
        return [(rows, max(1, max(lengths[rows].tolist()))) for rows in groups]

    def states(self) -> PromptStates | MixedStates | None:
        """Keys and values of the prompts; None inside the rows, and if the base has not earned to share them."""
        if self.is_inside:
            return None
        found = [None if one is None else prompt_states(one) for one in self.named]
        if any(states is None for states, one in zip(found, self.named, strict=True) if one is not None):
            return None
        if len(found) == 1:
            return found[0]
        mixed = MixedStates(found, self.index)
        return mixed if shares_mixed_prefixes(self.model.get_base_model(), mixed) else None

    def by_prompt(self) -> Iterator[tuple[list[int], RowPrompts]]:
        """Indices of the rows under each prompt, and their prompt: prefixes that cannot be mixed run in groups."""
        for index in range(len(self.named)):
            if rows := [row for row, own in enumerate(self.index) if own == index]:
                yield rows, self.of_rows(rows)

    def shared_states(self, num_tokens: int) -> PromptStates | MixedStates | None:
        """`states` for a forward of rows of `num_tokens`; None also where such a forward keeps no cache.

        Raises:
            ValueError: for prefix tuning under gradient checkpointing, where the base drops the prefix under it.
        """
        if self.is_inside:
            return None
        return self.states() if shares_states(self.model, self.num_virtual_tokens, num_tokens) else None

    def concatenated(self, embeds: Tensor, attention_mask: Tensor, pads_first: bool) -> tuple[Tensor, Tensor]:
        """Embeddings (B, p + n, d) of prompts and rows, and their mask; no pads stand between prompt and tokens.

        Args:
            embeds: the rows' embeddings, (B, n, d).
            attention_mask: (B, n).
            pads_first: whether pads come before prompt and tokens, as in `generate`, or after them.
        """
        longest = self.num_virtual_tokens
        prompts = []
        for one, length in zip(self.named, self.lengths, strict=True):
            row = embeds.new_zeros(1, longest - length, embeds.shape[2])
            prompts.append(row if one is None else torch.cat([row, one.get_prompt(batch_size=1).to(embeds)], dim=1))
        index = torch.tensor(self.index, device=embeds.device)
        in_use = torch.arange(longest, device=embeds.device) >= longest - self.row_lengths(embeds.device)[:, None]
        embeds = torch.cat([torch.cat(prompts)[index], embeds], dim=1)
        mask = torch.cat([in_use.to(attention_mask.dtype), attention_mask], dim=1)
        # A row's tokens have the odd places in their order, and its prompt the even one before the token it precedes.
        tokens = 2 * attention_mask.ne(0).cumsum(dim=1) - 1
        places = torch.cat([2 * self.tokens_before(attention_mask)[:, None].expand(-1, longest), tokens], dim=1)
        order = places.masked_fill(mask.eq(0), -1 if pads_first else 2 * mask.shape[1])
        order = order.argsort(dim=1, stable=True)
        return embeds.take_along_dim(order[..., None], dim=1), mask.gather(1, order)

    def response_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, K, V) at `positions` (B, K) of a right-padded batch (B, n), counted without virtual tokens.

        Raises:
            ValueError: if prompt and rows exceed the model's positions, and for prefix tuning under gradient
                checkpointing, where the base drops the prefix under it.
        """
        if self.names_a_prompt:
            self.check_room(input_ids.shape[1])
        return self._each_apart(RowPrompts._response_logits, input_ids, attention_mask, positions)

    def _response_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        if not self.names_a_prompt:
            base: Any = self.model.get_base_model()
            return logits_at(base, positions, input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        if (in_one_pass := self.single_pass(input_ids.shape[1])) is not None:
            return in_one_pass(self.model.word_embeddings(input_ids), attention_mask, positions)
        return self.shared_logits(input_ids, attention_mask, positions)

    def single_pass(self, num_tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """The way of training on rows of `num_tokens` in one pass of the base that adds the fewest tokens to it.

        None where a pass of its own for the prompt is as fast, where the rows have none, or one each, and where the
        base does not run such a pass rightly. A sharded base is always passed once.
        """
        base: Any = self.model.get_base_model()
        sharded = is_sharded(base)
        if not sharded and not waits_for_launches(device_of(self.model.word_embeddings)):
            return None
        if self.is_inside or self.is_prefix or len(self.named) > 1 or not needs_gradient(self.model):
            return None
        if sharded and cache_switch(base)[0] is not None:  # behind a long batch a process asks for verdicts again
            return self.concatenated_logits
        num_virtual = self.num_virtual_tokens
        # Verdicts first: processes of a sharded base run the same forwards, whatever the shapes of their batches.
        joins = joins_prompt(base, num_virtual)
        is_kept = joins and (not is_checkpointing(base) or checkpoints_prefix(base, num_virtual, joint=True))
        fits = not outgrows_cache(self.model, num_virtual + num_tokens)
        tokens = tokens_of_prompts_row(self.num_rows, num_tokens, num_virtual), self.num_rows * num_virtual
        if sharded:  # always one: a second pass would gather every layer again, and some processes might take none
            return self.joint_logits if is_kept and fits and tokens[0] < tokens[1] else self.concatenated_logits
        if not (joins and fits) or min(tokens) > MOST_ADDED_TOKENS:
            return None
        if tokens[1] <= tokens[0]:
            return self.concatenated_logits
        return self.joint_logits if is_kept else None

    def shared_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """`response_logits` with a pass of its own for the prompt, whose keys and values all rows share."""
        states = self.shared_states(input_ids.shape[1])
        if states is None and self.is_prefix:
            logits = [
                (rows, group.response_logits(input_ids[rows], attention_mask[rows], positions[rows]))
                for rows, group in self.by_prompt()
            ]
            return in_order(logits)
        if states is None:
            return self.concatenated_logits(self.model.word_embeddings(input_ids), attention_mask, positions)
        base: Any = self.model.get_base_model()
        with in_front(base, states, attention_mask) as prefix:
            return logits_at(base, positions, input_ids=input_ids, **prefix)

    def joint_logits(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """`response_logits` from the rows' embeddings (B, n, d), their one prompt a row of the batch."""
        base, prompt = self.model.get_base_model(), self.named[0].get_prompt(batch_size=1)
        return joint_logits(base, embeds, attention_mask, positions, prompt)

    def embedding_logits(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """`response_logits` from the rows' embeddings (B, n, d), of rows that have a prompt."""
        self.check_room(embeds.shape[1])
        return self._each_apart(RowPrompts._embedding_logits, embeds, attention_mask, positions)

    def _embedding_logits(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        states = self.shared_states(embeds.shape[1])
        if states is None:
            return self.concatenated_logits(embeds, attention_mask, positions)
        base: Any = self.model.get_base_model()
        with in_front(base, states, attention_mask) as prefix:
            return logits_at(base, positions, inputs_embeds=embeds, **prefix)

    def _each_apart(
        self,
        logits_of: Callable[[RowPrompts, Tensor, Tensor, Tensor], Tensor],
        tokens: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Logits (B, K, V) by a function of prompts, tokens or their embeddings, mask and positions, see `apart`."""
        if not (groups := self.apart(attention_mask)):
            return logits_of(self, tokens, attention_mask, positions)
        found = []
        for rows, width in groups:
            at = positions[rows].clamp(max=width - 1)  # slots that are not used may lie behind the row
            own = logits_of(self.of_rows(rows), tokens[rows, :width], attention_mask[rows, :width], at)
            found.append((rows, own))
        return in_order(found)

    def check_positions(self, rows: Tensor, attention_mask: Tensor | None, by_column: bool) -> None:
        """Raise where the base fails since prompts and rows (B, n) exceed its positions.

        Pads have positions `by_column`, unless the base counts by the mask.

        Raises:
            ValueError: if they do, and `fails_beyond_positions`.
        """
        base: Any = self.model.get_base_model()
        num_virtual, num_tokens, limit = self.num_virtual_tokens, rows.shape[1], max_positions(base)
        if limit is None or num_virtual + num_tokens <= limit or not fails_beyond_positions(base):
            return
        if attention_mask is not None and (not by_column or counts_by_mask(base)):
            longest = attention_mask.ne(0).sum(dim=1) + self.row_lengths(attention_mask.device)
            num_tokens = int(longest.max()) - num_virtual
        self.check_room(num_tokens)

    def check_room(self, num_tokens: int) -> None:
        """Raise unless the longest prompt and rows of `num_tokens` fit into the model's positions.

        Raises:
            ValueError: if they do not.
        """
        num_virtual, limit = self.num_virtual_tokens, max_positions(self.model.get_base_model())
        if limit is not None and num_virtual + num_tokens > limit:
            raise ValueError(
                f"{num_virtual} virtual tokens and {num_tokens} tokens exceed the model's {limit} positions; "
                + (
                    f"collate with max_length of at most {limit - num_virtual}."
                    if num_virtual < limit
                    else "take fewer virtual tokens."
                )
            )

    def concatenated_logits(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """`response_logits` from the rows' embeddings (B, n, d), with the prompt's beside those of every row."""
        positions = self.moved(positions, attention_mask)
        embeds, mask = self.concatenated(embeds, attention_mask, pads_first=False)
        return logits_at(
            self.model.get_base_model(), positions, inputs_embeds=embeds, attention_mask=mask, use_cache=False
        )

    def moved(self, positions: Tensor, attention_mask: Tensor) -> Tensor:
        """Columns of `concatenated`, pads last, that predict the tokens after `positions` (B, K) of the rows.

        The token after a prompt is predicted by the prompt's last virtual token, all others by the token before them.
        """
        follows = positions >= self.tokens_before(attention_mask)[:, None] - 1
        return positions + self.row_lengths(positions.device)[:, None] * follows


def in_order(groups: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Tensors of groups of rows, with the rows' indices, as one tensor of all rows."""
    order = torch.tensor([row for rows, _ in groups for row in rows], device=groups[0][1].device)
    return torch.cat([tensor for _, tensor in groups])[order.argsort()]


def under(model: Any, adapter_name: str) -> Any:
    """The model with an active prompt of its own: a view that shares all else, so that other threads keep theirs."""
    view = copy.copy(model)
    view.active_adapter = adapter_name
    return view
