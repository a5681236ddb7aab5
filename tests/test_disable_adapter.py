"""`disable_adapter` of prompts and layers: for the calling thread and asyncio task, nested, and after errors."""

import asyncio
import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from helpers import build, build_unlearner, stirred
from transformers import GenerationConfig


def disableable(kind):
    if kind == "layers":
        return stirred(build("llama", torch.float64))
    return build_unlearner().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["prompt", "layers"])
def test_disabling_holds_for_the_calling_thread_alone(kind):
    model, ids = disableable(kind), torch.arange(5, 14)[None]
    expected, seen = model(input_ids=ids).logits[:, -1], []

    def other():
        seen.extend((model.enabled, model(input_ids=ids).logits[:, -1]))

    with model.disable_adapter():
        with model.disable_adapter():
            assert not model.enabled
        assert not model.enabled, "the outer block still holds"
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        base = model(input_ids=ids).logits[:, -1]
    assert seen[0]
    assert model.enabled
    assert not model.disabled_somewhere
    torch.testing.assert_close(seen[1], expected)
    torch.testing.assert_close(model(input_ids=ids).logits[:, -1], expected)
    if kind == "layers":
        model.remove()
    torch.testing.assert_close(base, model.get_base_model()(input_ids=ids).logits[:, -1])
    assert (base - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["prompt", "layers"])
def test_disabling_holds_for_the_calling_task_and_those_it_starts_inside(kind):
    model, seen = disableable(kind), {}

    async def disabling(inside, leave):
        with model.disable_adapter():
            started = asyncio.create_task(child(leave))
            inside.set()
            await asyncio.sleep(0)
            seen["disabling"] = model.enabled
            seen["in a thread of its own"] = await asyncio.to_thread(lambda: model.enabled)
            await asyncio.sleep(0)
        leave.set()
        await started

    async def child(leave):
        seen["child"] = model.enabled
        await leave.wait()
        seen["child afterwards"] = model.enabled

    async def other(inside):
        await inside.wait()
        seen["other"] = model.enabled

    async def both():
        inside, leave = asyncio.Event(), asyncio.Event()
        await asyncio.gather(disabling(inside, leave), other(inside))

    asyncio.run(both())
    assert seen == {
        "disabling": False,
        "in a thread of its own": False,
        "child": False,
        "child afterwards": True,
        "other": True,
    }


def test_an_error_inside_ends_disabling_and_pefts_flag_is_not_touched():
    unlearner = build_unlearner()

    def fail_inside():
        with unlearner.disable_adapter():
            assert not unlearner._adapters_disabled
            assert not unlearner.has_active_enabled_adapter
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert unlearner.enabled
    assert unlearner.virtual_tokens_in_use == 5


def test_a_copy_and_a_model_of_its_own_are_not_disabled():
    unlearner, other = build_unlearner(), build_unlearner()
    with unlearner.disable_adapter():
        assert copy.deepcopy(unlearner).enabled
        assert other.enabled
        with other.disable_adapter():
            assert not other.enabled
        assert other.enabled
        assert not unlearner.enabled


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("kind", ["prompt", "layers"])
@pytest.mark.parametrize("disabled", [True, False])
def test_gradient_checkpointing_in_training_mode_changes_no_answer(kind, disabled):
    model, ids = disableable(kind), torch.arange(5, 14)[None]
    with model.disable_adapter() if disabled else nullcontext():
        expected = model.generate(ids, **GREEDY).tolist()
        model.gradient_checkpointing_enable()
        model.train()
        assert model.generate(ids, **GREEDY).tolist() == expected
    assert model.training
    assert model.get_base_model().training


def test_settings_of_the_unlearner_count_with_the_prompt_and_without():
    unlearner, ids = disableable("prompt"), torch.arange(5, 14)[None]
    unlearner.generation_config = GenerationConfig(max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    own = GenerationConfig(max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    with unlearner.disable_adapter():
        found = unlearner.generate(ids)
        assert unlearner.generate(ids, own).shape == (1, 14)
        assert unlearner.generate(input_ids=ids, generation_config=own).shape == (1, 14)
    assert found.tolist() == unlearner.generate(ids, adapter_names=["__base__"]).tolist()
    assert found.shape == unlearner.generate(ids).shape == (1, 12)
