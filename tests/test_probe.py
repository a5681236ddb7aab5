"""Bases that drop, shift or refuse a given cache are found by the probe: concatenation serves, or an error comes."""

import pytest
import torch
from cache_droppers import DropsTheCache, ForgetsWhereItIs, RefusesACache, under_prompt
from helpers import CONFIGS, FAMILIES, build, build_unlearner, make_batch
from plain import continued, row_logits
from plain import losses as plain_losses
from transformers import DynamicCache, LlamaForCausalLM

from spul.models.compat_cache import CACHE_NAME
from spul.prompts.probe import continues_embeddings, continues_prefix, shares_mixed_prefixes, shares_prefix
from spul.prompts.shared_prefix import prompt_states
from spul.prompts.states import MixedStates

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


class GeneratesAnew(LlamaForCausalLM):
    """Its forward keeps a cache; its `generate` throws away the one that it is given."""

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        if kwargs.get("is_first_iteration") and inputs_embeds is None:
            kwargs[CACHE_NAME] = DynamicCache()
            kwargs["attention_mask"] = kwargs["attention_mask"][:, -input_ids.shape[1] :]
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


class IgnoresTheMask(LlamaForCausalLM):
    """Takes pads between prompt and tokens for tokens."""

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        mask = kwargs["attention_mask"]
        if mask is not None and bool((mask.diff(dim=1) < 0).any()):  # pads between a prompt and tokens
            kwargs["attention_mask"] = torch.ones_like(mask)
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


class IgnoresPadsInFront(LlamaForCausalLM):
    """Takes pads in front for tokens while it generates, such as those before the shorter prompts of a batch."""

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        mask = kwargs["attention_mask"]
        if mask is not None and not bool(mask[:, 0].all()):
            mask = torch.ones_like(mask)
            kwargs |= {
                "attention_mask": mask,
                "position_ids": mask.cumsum(dim=1)[:, -kwargs["position_ids"].shape[1] :],
            }
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


def by_hand(unlearner, ids):
    return continued(lambda ids: row_logits(unlearner, ids), ids, num=5)


@pytest.mark.parametrize("base_class", [DropsTheCache, RefusesACache, ForgetsWhereItIs])
@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "p_tuning"])
def test_a_base_that_has_not_earned_the_prefix_is_run_by_concatenation(base_class, prompt_type, caplog):
    unlearner, batch = under_prompt(base_class, prompt_type), make_batch()
    found = unlearner.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY)
    for row, mask, out in zip(batch["input_ids"], batch["attention_mask"], found, strict=True):
        assert out[len(row) :].tolist() == by_hand(unlearner, row[mask.bool()])
    torch.testing.assert_close(unlearner(**batch).loss, plain_losses(unlearner, batch)[0])
    with torch.no_grad():
        out = unlearner(batch["input_ids"], batch["attention_mask"])
    for i, (row, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        own = row[mask.bool()]
        torch.testing.assert_close(out.logits[i, 5 : 5 + len(own)], row_logits(unlearner, own))
    assert caplog.text.count("computes otherwise behind a shared prompt") == 1
    assert ("tokens are taken one by one behind a cache" in caplog.text) == (base_class is RefusesACache)


@pytest.mark.parametrize("base_class", [DropsTheCache, RefusesACache])
def test_a_prefix_is_refused_where_the_cache_is_lost(base_class):
    with pytest.raises(ValueError, match="prefix tuning cannot serve"):
        under_prompt(base_class, "prefix_tuning")


@pytest.mark.parametrize("base_class", [GeneratesAnew, IgnoresTheMask])
@pytest.mark.parametrize("side", ["right", "left"])
def test_where_generate_loses_the_prompt_it_is_concatenated(base_class, side, caplog):
    unlearner, batch = under_prompt(base_class), make_batch(side)
    found = unlearner.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY)
    for row, mask, out in zip(batch["input_ids"], batch["attention_mask"], found, strict=True):
        assert out[len(row) :].tolist() == by_hand(unlearner, row[mask.bool()])
    assert caplog.text.count("generates otherwise for rows") == 1
    assert shares_prefix(unlearner.get_base_model(), 5)  # its forward is right


def test_a_prefix_is_refused_where_generate_loses_it():
    unlearner = under_prompt(GeneratesAnew, "prefix_tuning")
    with pytest.raises(ValueError, match="does not generate behind a prefix as its forward computes"):
        unlearner.generate(torch.randint(5, 120, (1, 7)), **GREEDY)


def test_under_a_prefix_pads_that_are_not_hidden_split_the_batch():
    unlearner, batch = under_prompt(IgnoresTheMask, "prefix_tuning"), make_batch()
    found = unlearner.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY)
    for row, mask, out in zip(batch["input_ids"], batch["attention_mask"], found, strict=True):
        assert out[len(row) :].tolist() == by_hand(unlearner, row[mask.bool()])


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_prompts_of_several_lengths_run_in_groups_where_generate_sees_the_pads_before_them(prompt_type):
    unlearner, ids = under_prompt(IgnoresPadsInFront, prompt_type), torch.randint(5, 120, (2, 7))
    prompted, bare = unlearner.generate(ids, adapter_names=["default", "__base__"], **GREEDY)
    assert prompted[7:].tolist() == by_hand(unlearner, ids[0])
    assert bare.tolist() == unlearner.get_base_model().generate(ids[1:], **GREEDY)[0].tolist()
    with pytest.raises(ValueError, match="in groups here, which streamer cannot follow"):
        unlearner.generate(ids, adapter_names=["default", "__base__"], streamer=object(), **GREEDY)


def test_rows_of_unequal_length_run_in_groups_where_pads_are_seen_on_either_side():
    class IgnoresAllPads(IgnoresTheMask, IgnoresPadsInFront):
        pass

    unlearner, batch = under_prompt(IgnoresAllPads), make_batch()
    found = unlearner.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY)
    for row, mask, out in zip(batch["input_ids"], batch["attention_mask"], found, strict=True):
        assert out[len(row) :].tolist() == by_hand(unlearner, row[mask.bool()])


@pytest.mark.parametrize(
    "own",
    [
        {"no_repeat_ngram_size": 1},
        {"num_return_sequences": 2},
        {"stop_strings": ["the"]},
        {"eos_token_id": [*range(128)]},
    ],
)
def test_settings_of_the_base_do_not_decide_what_the_probe_finds(own):
    unlearner = under_prompt(LlamaForCausalLM, "prefix_tuning")
    base = unlearner.get_base_model()
    for name, value in own.items():
        setattr(base.generation_config, name, value)
    with torch.no_grad():
        states = prompt_states(unlearner)
    assert continues_prefix(base, states, unequal=False)
    assert continues_prefix(base, states, unequal=True)
    assert continues_embeddings(base, unequal=True)
    assert {name: getattr(base.generation_config, name) for name in own} == own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_earn_all_of_it_in_every_type(family, dtype):
    unlearner = build_unlearner(family, dtype=dtype).eval()
    base = unlearner.get_base_model()
    with torch.no_grad():
        states = prompt_states(unlearner)
    assert shares_prefix(base, 5)
    assert states is not None
    assert continues_prefix(base, states, unequal=False)
    assert continues_prefix(base, states, unequal=True)
    assert continues_embeddings(base, unequal=True)
    mixed = MixedStates([states, None], [0, 1])
    assert shares_mixed_prefixes(base, mixed)
    assert continues_prefix(base, mixed, unequal=False)
    assert continues_prefix(base, mixed, unequal=True)


def test_under_autocast_it_is_earned_anew(family):
    base = build(family)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert shares_prefix(base, 5)


def test_a_base_is_asked_once():
    unlearner, batch = under_prompt(LlamaForCausalLM), make_batch()
    calls = []
    unlearner.get_base_model().register_forward_pre_hook(lambda *args: calls.append(1))
    counts = []
    for _ in range(3):
        before = len(calls)
        unlearner(**batch)
        counts.append(len(calls) - before)
    assert counts[0] > counts[1] == counts[2] == 3  # the prompt, the rows, the reference


def test_a_probe_leaves_modes_randomness_and_the_cached_prompt_alone():
    unlearner = build_unlearner()
    base = unlearner.get_base_model().train()
    state, modes = torch.get_rng_state(), [module.training for module in base.modules()]
    assert shares_prefix(base, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in base.modules()] == modes
    assert "_cached_prompts" not in unlearner.__dict__


class CountsAnew(LlamaForCausalLM):
    """Its generate gives later tokens the first position, as RoBERTa's does after embeddings."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs | {"position_ids": torch.zeros_like(inputs["position_ids"])}


class TakesNoEmbeddings(DropsTheCache):
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        kwargs.pop("inputs_embeds", None)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


@pytest.mark.parametrize("base_class", [CountsAnew, TakesNoEmbeddings])
def test_where_no_way_of_generating_keeps_the_prompt_it_is_refused(base_class):
    unlearner, batch = under_prompt(base_class), make_batch()
    for inputs in ({"input_ids": batch["input_ids"][:, :4]}, {k: batch[k] for k in ("input_ids", "attention_mask")}):
        with pytest.raises(ValueError, match="generate cannot put a prompt in; forward and scoring can"):
            unlearner.generate(**inputs, **GREEDY)


def test_a_base_that_changes_at_every_call_is_not_probed_for_ever(monkeypatch, caplog):
    import spul.prompts.verdicts

    monkeypatch.setattr(spul.prompts.verdicts, "MOST_PROBES", 3)
    base, passes = build("llama"), []
    base.register_forward_pre_hook(lambda *args: passes.append(1))
    nums = []
    for i in range(5):
        base.calls = f"{i}"
        assert shares_prefix(base, 5)
        nums.append(len(passes))
    assert nums[0] < nums[1] < nums[2] == nums[3] == nums[4]
    assert caplog.text.count("the last verdict stands") == 1
