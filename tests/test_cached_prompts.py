"""Cached prompts: a prompt passes through the base once for many calls, and is never stale."""

import copy

import pytest
import torch
from helpers import CONFIGS, build_unlearner, make_batch, make_collator, make_dataset
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from plain import assert_as_peft, labeled_batch, peft_forward, row_logits

from spul.evaluation.metrics import score_completions
from spul.prompts.probe import shares_prefix


@pytest.fixture(params=["prompt_tuning", "p_tuning"])  # prefix tuning needs no pass
def prompt_type(request) -> str:
    return request.param


class CountedPasses:
    """Counts how often a prompt, and nothing else, passes through the base."""

    def __init__(self, unlearner):
        unlearner.get_base_model().base_model.register_forward_pre_hook(self, with_kwargs=True)
        self.num = 0
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                shares_prefix(unlearner.get_base_model(), 5)
        self.num = 0  # the probe's passes are not counted

    def __call__(self, module, args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        self.num += embeds is not None and embeds.shape[:2] == (1, 5)


# ---- once ----


def test_the_prompt_passes_once_over_all_calls_of_forward_scoring_and_generate(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    unlearner.generate(**inputs, max_new_tokens=2)
    counted = CountedPasses(unlearner)
    with unlearner.cached_prompts(), torch.no_grad():
        for _ in range(3):
            unlearner(**batch)
            unlearner(**make_batch())
            unlearner(input_ids=batch["input_ids"], logits_to_keep=1)
        for _ in range(2):
            unlearner.generate(**inputs, max_new_tokens=2)
    assert counted.num == 1


def test_outside_of_the_scope_every_call_has_a_pass_of_its_own(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    counted = CountedPasses(unlearner)
    with torch.no_grad():
        for _ in range(3):
            unlearner(**batch)
        assert counted.num == 3
        with unlearner.cached_prompts(), unlearner.cached_prompts():  # one inside the other, as of two threads
            unlearner(**batch)
        unlearner(**batch)
    assert counted.num == 5


def test_scoring_opens_the_scope(prompt_type):
    unlearner = build_unlearner("llama", prompt_type, torch.float32)
    counted = CountedPasses(unlearner)
    score_completions(unlearner, make_dataset(), make_collator(), batch_size=4)
    assert counted.num == 1


def attribute(base):
    base.model.layers[0].self_attn.scaling *= 2


def method(base):
    forward = base.model.layers[0].mlp.forward
    base.model.layers[0].mlp.forward = lambda states: 1.5 * forward(states)


def buffer(base):
    base.model.rotary_emb.inv_freq.mul_(0.5)


def data(base):
    for parameter in base.parameters():
        parameter.data.mul_(1.1)


def hook(base):
    base.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 1.5 * out)


@pytest.mark.parametrize("change", [attribute, method, buffer, data, hook])
def test_whatever_changes_the_base_reaches_the_next_call(change, prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = unlearner(**batch).logits
    unlearner.generate(**inputs, max_new_tokens=2)
    change(unlearner.get_base_model())
    assert_as_peft(unlearner, batch)
    with torch.no_grad():
        assert (unlearner(**batch).logits - before).abs().max() > 1e-4


def test_a_prompt_loaded_for_use_needs_no_no_grad(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    unlearner.requires_grad_(False)
    counted = CountedPasses(unlearner)
    with unlearner.cached_prompts():
        for _ in range(3):
            unlearner(**batch)
    assert counted.num == 1


def test_cached_states_are_never_written_to(family, prompt_type):
    unlearner, batch = build_unlearner(family, prompt_type), labeled_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 3}
    with unlearner.cached_prompts(), torch.no_grad():
        unlearner.generate(**inputs)
        cached = unlearner.__dict__["_cached_prompts"]["default"].layers
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cached]
        unlearner.generate(**inputs, num_beams=3)
        unlearner.generate(**inputs, do_sample=True, num_return_sequences=2)
        unlearner(**batch)
        unlearner(**make_batch())
    assert "_cached_prompts" not in unlearner.__dict__
    for layer, (keys, values) in zip(cached, before, strict=True):
        torch.testing.assert_close((layer.keys, layer.values), (keys, values), rtol=0, atol=0)


def test_every_adapter_has_its_own(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    torch.manual_seed(5)
    unlearner.add_adapter("other", CONFIGS[prompt_type](5))
    unlearner.double()
    counted = CountedPasses(unlearner)
    outs = []
    with unlearner.cached_prompts(), torch.no_grad():
        for name in ("default", "other", "default", "other"):
            unlearner.set_adapter(name)
            outs.append(unlearner(**batch).logits)
    assert counted.num == 2
    torch.testing.assert_close(outs[0], outs[2], rtol=0, atol=0)
    assert (outs[0] - outs[1]).abs().max() > 1e-3
    unlearner.delete_adapter("other")
    unlearner.add_adapter("other", CONFIGS[prompt_type](5))
    unlearner.double().set_adapter("other")
    assert_as_peft(unlearner, batch)


def test_with_gradient_nothing_is_cached(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), make_batch()
    with unlearner.cached_prompts():
        for _ in range(2):
            unlearner(**batch).loss.backward()  # a stored graph would raise the second time
        assert unlearner.__dict__["_cached_prompts"] == {}


# ---- never stale ----


def by_a_step(unlearner):
    optimizer = torch.optim.SGD([p for p in unlearner.parameters() if p.requires_grad], lr=1.0)
    unlearner(**make_batch()).loss.backward()
    optimizer.step()


def by_data(unlearner):
    for parameter in unlearner.prompt_encoder.parameters():
        parameter.data.mul_(1.5)  # leaves no trace in the version counter


def by_loading(unlearner):
    state = copy.deepcopy(unlearner.prompt_encoder.state_dict())
    unlearner.prompt_encoder.load_state_dict({name: value + 0.1 for name, value in state.items()})


def by_the_base(unlearner):
    with torch.no_grad():
        for parameter in unlearner.get_base_model().parameters():
            parameter.mul_(1.1)


@pytest.mark.parametrize("change", [by_a_step, by_data, by_loading, by_the_base])
def test_a_changed_prompt_or_base_invalidates_it(change, prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    with unlearner.cached_prompts():
        with torch.no_grad():
            before = unlearner(**batch).logits
        change(unlearner)
        with torch.no_grad():
            assert (unlearner(**batch).logits - before).abs().max() > 1e-4
        assert_as_peft(unlearner, batch)


def test_a_changed_dtype_invalidates_it(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    with unlearner.cached_prompts():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            unlearner.to(dtype)
            assert_as_peft(unlearner, batch, **({"rtol": 0.1, "atol": 0.2} if dtype == torch.bfloat16 else {}))
            assert unlearner.__dict__["_cached_prompts"]["default"].layers[0].keys.dtype == dtype


def test_autocast_invalidates_it(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type, torch.float32), labeled_batch()
    counted = CountedPasses(unlearner)
    with unlearner.cached_prompts(), torch.no_grad():
        unlearner(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(
                unlearner(**batch).logits, peft_forward(unlearner, **batch).logits, rtol=0.1, atol=0.2
            )
        unlearner(**batch)
    assert counted.num == 3


def test_another_device_is_another_prompt():
    unlearner = build_unlearner()
    with unlearner.cached_prompts(), torch.no_grad():
        unlearner(**labeled_batch())
        cached = unlearner.__dict__["_cached_prompts"]["default"]
    assert cached.matches(cached.prompt.clone(), cached.base)
    assert not cached.matches(cached.prompt.to("meta"), cached.base)


def test_inference_mode_may_come_before_and_after(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    with unlearner.cached_prompts():
        with torch.inference_mode():
            unlearner(**batch)
        assert_as_peft(unlearner, batch)
        unlearner(**make_batch()).loss.backward()


def test_a_hook_before_a_module_that_is_added_after_a_call_reaches_the_cached_prompt(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), labeled_batch()
    with unlearner.cached_prompts(), torch.no_grad():
        before = unlearner(**batch).logits
        block = unlearner.get_base_model().model.layers[0].mlp
        handle = block.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        assert_as_peft(unlearner, batch)
        handle.remove()
        torch.testing.assert_close(unlearner(**batch).logits, before)


def slowed(module):
    inner = module.forward
    module.forward = lambda states: inner(0.5 * states)


def without_lora(base):
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


CHANGES = {
    "a buffer": lambda base: base.model.rotary_emb.inv_freq.mul_(0.5),
    "a module": lambda base: setattr(base.model.layers[0].mlp, "act_fn", torch.nn.Tanh()),
    "a number": lambda base: setattr(base.model.layers[0].self_attn, "scaling", 1.0),
    "a forward": lambda base: slowed(base.model.layers[0].mlp),
    "LoRA that is disabled": without_lora,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_base_without_a_parameter_invalidates_it(change):
    unlearner, ids = build_unlearner("llama").eval(), torch.randint(5, 120, (1, 7))
    base = unlearner.get_base_model()
    if "LoRA" in change:
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), base)
        base.double().requires_grad_(False)
    with torch.no_grad():
        before = unlearner(ids).logits
        CHANGES[change](base)
        found = unlearner(ids).logits[:, 5:]
        torch.testing.assert_close(found[0], row_logits(unlearner, ids[0]))
    assert (found - before[:, 5:]).abs().max() > 1e-4


def test_a_hook_that_counts_positions_added_later_ends_the_sharing():
    unlearner, ids = build_unlearner("llama").eval(), torch.randint(5, 120, (1, 7))

    def first_position(module, args):
        return (
            args[0] + torch.nn.functional.pad(args[0].new_ones(1, 1, 1), (0, 0, 0, args[0].shape[1] - 1)),
            *args[1:],
        )

    with torch.no_grad():
        unlearner(ids)
        unlearner.get_base_model().model.layers[0].register_forward_pre_hook(first_position)
        torch.testing.assert_close(unlearner(ids).logits[0, 5:], row_logits(unlearner, ids[0]))


def test_a_window_set_later_ends_in_the_rows_too():
    unlearner, ids = build_unlearner("mistral", sliding_window=50).eval(), torch.randint(5, 120, (1, 7))
    with torch.no_grad():
        unlearner(ids)
        unlearner.get_base_model().config.sliding_window = 4
        torch.testing.assert_close(unlearner(ids).logits[0, 5:], row_logits(unlearner, ids[0]))
