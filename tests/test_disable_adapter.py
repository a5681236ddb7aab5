"""`disable_adapter` of prompts and layers: for the calling thread and asyncio task, nested, and after errors."""

import asyncio
import copy
import threading

import pytest
import torch
from helpers import build, build_unlearner, stirred


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
