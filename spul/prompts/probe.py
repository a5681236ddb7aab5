"""Probes of a base: what it computes behind a shared prompt is compared with what it computes without sharing.

A base earns the shared prefix at first use, by a few random tokens (`verdicts`). Families change their forward and
their cache from version to version, and remote code does as it likes: a base that drops a given cache would answer
without the prompt, and nothing would tell.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..models.causal_lm import cache_switch, evaluation_mode, max_positions
from ..models.compat import is_compiled
from ..models.compat_cache import LayerStates, prefix_states
from ..models.compat_checkpointing import switching
from ..models.compat_devices import device_of
from .one_pass import joint_logits
from .states import MixedStates, PromptStates, compute_states, in_front
from .verdicts import ERRORS, close, earned

NUM_TOKENS, NUM_PADS, NUM_NEW = 8, 3, 3


def shares_prefix(base: Any, num_virtual: int) -> bool:
    """Whether rows behind the keys and values of a prompt have the logits that they have behind its embeddings."""

    def compare() -> bool:
        prompt, ids, mask = _probe(base, num_virtual)
        states = compute_states(base, prompt)
        if states is None:
            return False
        found = base(input_ids=ids, use_cache=True, **states.prefix_inputs(base, mask)).logits
        return _rows_agree(base, found, *_concatenated_and_alone(base, prompt, ids))

    return earned(
        base,
        ("prefix", num_virtual),
        compare,
        f"{type(base).__name__} has no plain key/value cache, or computes otherwise behind a shared prompt: the "
        "prompt is concatenated to every row, which is slower.",
    )


def joins_prompt(base: Any, num_virtual: int) -> bool:
    """Whether rows have the same logits where their prompt is a row of the batch, see `one_pass`.

    A compiled base passes for none.
    """

    def compare() -> bool:
        if is_compiled(base) or not shares_prefix(base, num_virtual):
            return False
        prompt, ids, mask = _probe(base, num_virtual)
        found = _all_joint_logits(base, base.get_input_embeddings()(ids), mask, prompt)
        return _rows_agree(base, found, *_concatenated_and_alone(base, prompt, ids))

    return earned(base, ("joint", num_virtual), compare)


def shares_mixed_prefixes(base: Any, states: MixedStates) -> bool:
    """Whether rows behind prompts of different lengths have the logits that they have alone.

    Args:
        base: the base, which shares the prefix.
        states: of the batch; the probe is made of its longest prompt, a shorter one and none.
    """

    def compare() -> bool:
        longest = max(states.each(), key=lambda one: one.num_virtual_tokens)
        shorter = [one for one in states.each() if one is not longest][:1]
        mixed = MixedStates([longest, *shorter, None], range(2 + len(shorter)))
        _, ids, mask = _probe(base, states.num_virtual_tokens)
        ids, mask = ids[:1].expand(len(mixed.index), -1), mask[:1].expand(len(mixed.index), -1)
        found = base(input_ids=ids, use_cache=True, **mixed.prefix_inputs(base, mask)).logits
        alone = base(input_ids=ids[:1], use_cache=False).logits
        for row, one in zip(found.split(1), mixed.states, strict=True):
            expected = base(input_ids=ids[:1], **_prefix(base, one, mask[:1])).logits
            # A row without a prompt is as far from the longest one's as it can be.
            against = alone if one is not None else found[:1]
            if not close(base, row, expected, against):
                return False
        return True

    return earned(
        base,
        ("mixed", states.num_virtual_tokens),
        compare,
        f"{type(base).__name__} computes otherwise for rows behind prompts of different lengths: the prompts are "
        "concatenated to the rows, which is slower.",
    )


def checkpoints_prefix(
    base: Any, num_virtual: int, prefix: list[LayerStates] | None = None, joint: bool = False
) -> bool:
    """Whether rows behind a prompt have the logits and gradients under gradient checkpointing that they have without.

    Args:
        base: the base in training mode, under checkpointing, which shares the prefix.
        num_virtual: number of virtual tokens.
        prefix: the keys and values of a prefix, which are trained themselves; else a prompt of embeddings is.
        joint: whether the prompt is a row of the batch.
    """

    def passes(prompt: Tensor, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        leaves: list[Tensor] = []

        def trained(tensor: Tensor) -> Tensor:
            leaves.append(tensor.detach().clone().requires_grad_())
            return leaves[-1]

        if joint:
            logits = _all_joint_logits(base, rows, mask, trained(prompt))[mask.bool()]
        else:
            if prefix is None:
                states = compute_states(base, trained(prompt))
            else:
                leaves_of = [LayerStates(trained(one.keys), trained(one.values), one.seen) for one in prefix]
                states = PromptStates(leaves_of)
            if states is None:  # it has them in evaluation mode
                raise RuntimeError("its layers return no keys and values under gradient checkpointing")
            with in_front(base, states, mask) as inputs:
                logits = base(inputs_embeds=rows, **inputs).logits[mask.bool()]
        logits.double().tanh().sum().backward()  # into these leaves alone; reentrant checkpointing takes no others
        return logits.detach(), torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])

    def compare() -> bool:
        if is_compiled(base):
            return False  # functions of layers change from call to call, and would be compiled each time
        with torch.inference_mode(False):
            prompt, ids, mask = _probe(base, num_virtual)
            rows = base.get_input_embeddings()(ids)  # without gradients, so without noise
            alone = base(inputs_embeds=rows, attention_mask=mask, use_cache=False).logits[mask.bool()]
            with torch.enable_grad():
                found = passes(prompt, rows, mask)
                with evaluation_mode(base):  # in which nothing is checkpointed
                    expected = passes(prompt, rows, mask)
        without = alone, torch.zeros_like(expected[1])
        return all(close(base, *one) for one in zip(found, expected, without, strict=True))

    otherwise = (
        f"{type(base).__name__} loses or changes a shared prompt under gradient checkpointing, computes otherwise in "
        "training than in evaluation mode, or is compiled: the prompt is concatenated to every row, which is slower."
    )
    kind = ("checkpointing", num_virtual, prefix is not None, joint)
    # Under a prefix, the caller raises; a joint pass has another one to fall back on.
    return earned(base, kind, compare, "" if joint or prefix is not None else otherwise, in_evaluation=False)


def continues_prefix(base: Any, states: PromptStates | MixedStates, unequal: bool) -> bool:
    """Whether `generate` behind a filled cache has the logits of a forward, token by token.

    Args:
        base: the base, which shares the prefix.
        states: of a batch; the probe is made of its longest prompt, and of a row without one if prompts are mixed.
        unequal: whether rows are of unequal length, which pads between prompt and tokens make equal.
    """
    is_mixed = isinstance(states, MixedStates)

    def compare() -> bool:
        longest = next(one for one in states.each() if one.num_virtual_tokens == states.num_virtual_tokens)
        _, ids, mask = _left_padded_probe(base, states.num_virtual_tokens, unequal)
        prompts: list[PromptStates | None] = [longest, longest]
        if is_mixed:  # without a prompt, a row has no pads between prompt and tokens
            prompts, ids, mask = [*prompts, None], ids[[0, 1, 1]], mask[[0, 1, 1]]
        batch = MixedStates(prompts, range(len(ids))) if is_mixed else longest
        found = _forced_logits(base, ids, **batch.prefix_inputs(base, mask, len(ids)))
        for row, prompt in enumerate(prompts):
            own = _forced(ids[row][mask[row].bool()])[None]
            # What a lost prompt would make of a row; and of the row without one, the longest prompt.
            expected, without = (
                base(input_ids=own, **_prefix(base, one, own)).logits[:, -NUM_NEW - 1 : -1]
                for one in (prompt, None if prompt is not None else longest)
            )
            if not close(base, found[row : row + 1], expected, without):
                return False
        return True

    rows = "rows of unequal length" if unequal else "rows"
    rows += ", some with another prompt," if is_mixed else ""
    return earned(
        base,
        ("generate", states.num_virtual_tokens, unequal, is_mixed),
        compare,
        f"{type(base).__name__} generates otherwise for {rows} behind a shared prompt than its forward computes: the "
        "prompt is concatenated to every row, which is slower.",
    )


def continues_embeddings(base: Any, unequal: bool) -> bool:
    """Whether `generate` from embeddings, left-padded if `unequal`, has the logits of a forward of each row alone."""

    def compare() -> bool:
        _, ids, mask = _left_padded_probe(base, 0, unequal)
        embeds = base.get_input_embeddings()(ids)
        found = _forced_logits(base, ids, inputs_embeds=embeds, attention_mask=mask)
        for row in range(len(ids)):
            own = _forced(ids[row][mask[row].bool()])[None]
            expected = base(input_ids=own, use_cache=False).logits[:, -NUM_NEW - 1 : -1]
            # A shift by a position, or the loss of a token, would make as much of a difference as this.
            other = base(input_ids=own[:, 1:], use_cache=False).logits[:, -NUM_NEW - 1 : -1]
            if not close(base, found[row : row + 1], expected, other):
                return False
        return True

    return earned(base, ("embeddings", unequal), compare)


@torch.no_grad()
def check_prefix(model: Any) -> None:
    """Raise unless the base takes the active prefix as the keys and values of its layers, by a forward.

    Raises:
        ValueError: if it does not: it caches another number of heads or another width (multi-query and multi-head
            latent attention), or layers without keys and values (Mamba, linear attention), or drops a given cache.
    """
    base: Any = model.get_base_model()
    token = torch.zeros((1, 2), dtype=torch.long, device=device_of(model.word_embeddings))
    cause: Exception | None = None
    try:
        with switching, evaluation_mode(base):
            states = prefix_states(model)
            if states is not None:
                inputs = PromptStates(states).prefix_inputs(base, torch.ones_like(token))
                found = base(input_ids=token, use_cache=True, **inputs).logits
                if not torch.equal(found, base(input_ids=token, use_cache=False).logits):
                    return
    except torch.OutOfMemoryError:
        raise
    except ERRORS as error:
        cause = error
    heads, width = model.active_peft_config.num_attention_heads, model.active_peft_config.token_dim
    raise ValueError(
        f"prefix tuning cannot serve {type(base).__name__}: its layers do not take {heads} heads of {width // heads} "
        f"keys and values each, as the prefix has{'' if cause is None else f' ({cause})'}. Multi-query and latent "
        "attention, and layers without a plain key/value cache, differ so. Use PromptTuningConfig or "
        "PromptEncoderConfig, whose virtual tokens are input embeddings."
    ) from cause


# ---- how a probe is made ----


def _probe(base: Any, num_virtual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of random tokens as a prompt (1, p, d), and two rows (2, n) with their mask, the second padded."""
    embedding = base.get_input_embeddings()
    # Beyond the switch of longrope nothing is shared, and no verdict sought.
    limits = [limit for limit in (max_positions(base), cache_switch(base)[0]) if limit is not None]
    room = max(1, min([NUM_TOKENS, *(limit - num_virtual - NUM_NEW for limit in limits)]))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.weight.shape[0], (1, num_virtual + room), generator=generator)
    ids = ids.to(device_of(embedding))
    row = ids[:, num_virtual:]
    mask = torch.ones_like(row).repeat(2, 1)
    mask[1, max(1, room - NUM_PADS) :] = 0
    return embedding(ids[:, :num_virtual]), row.repeat(2, 1), mask


def _concatenated_and_alone(base: Any, prompt: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (1, n, V) of a probe's first row behind its prompt's embeddings, and without them; nothing is cached."""
    embeds = base.get_input_embeddings()(ids[:1])
    together = torch.cat([prompt, embeds], dim=1)
    behind = base(inputs_embeds=together, use_cache=False).logits[:, prompt.shape[1] :]
    return behind, base(inputs_embeds=embeds, use_cache=False).logits


def _all_joint_logits(base: Any, rows: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
    """Logits (B, n, V) at every position of rows (B, n, d) whose prompt is a row of their batch."""
    return joint_logits(base, rows, mask, torch.arange(mask.shape[1], device=mask.device).expand_as(mask), prompt)


def _left_padded_probe(base: Any, num_virtual: int, unequal: bool) -> tuple[Tensor, Tensor, Tensor]:
    prompt, ids, mask = _probe(base, num_virtual)
    return prompt, ids, mask.flip(1) if unequal else torch.ones_like(mask)


def _prefix(base: Any, states: PromptStates | None, tokens: Tensor) -> dict[str, Any]:
    """Inputs that put a prompt, or none, in front of rows (B, n) without pads."""
    if states is None:
        return {"use_cache": False}
    return states.prefix_inputs(base, torch.ones_like(tokens)) | {"use_cache": True}


def _forced(row: Tensor) -> Tensor:
    """A row, and after it the tokens that are generated in its place: the row's last ones."""
    return torch.cat([row, row[-1:].expand(NUM_NEW)])


def _forced_logits(base: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits (B, k, V) of `generate` at the first new tokens, which are those of `_forced`."""
    settings = GenerationConfig(
        max_new_tokens=NUM_NEW,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    plain = copy.copy(base)  # a view that shares all but the base's own settings, such as stop strings
    plain.generation_config = GenerationConfig()
    last = ids[:, -1].tolist()
    out = plain.generate(
        ids, generation_config=settings, prefix_allowed_tokens_fn=lambda row, _: [last[row]], **inputs
    )
    return torch.stack(out.logits, dim=1)


def _rows_agree(base: Any, found: Tensor, expected: Tensor, alone: Tensor) -> bool:
    """Whether both rows of a right-padded probe have the logits of the first, as far as they go."""
    shorter = max(1, found.shape[1] - NUM_PADS)
    return close(base, found[:1], expected, alone) and close(
        base, found[1:, :shorter], expected[:, :shorter], alone[:, :shorter]
    )
