"""One thread trains under gradient checkpointing while another evaluates the same unlearner: neither disturbs either.

The other thread begins at a chosen run of a layer, and gets the time to go on; it either does, or waits for its turn.
"""

import threading
from contextlib import contextmanager

import pytest
import torch
from helpers import CONFIGS, assert_same, build, build_unlearner, make_batch, prompt_gradients, prompted
from passes import Passes, checkpointed
from peft import PeftModelForCausalLM
from plain import losses as plain_losses

from spul.models.causal_lm import decoder_layers, evaluation_mode
from spul.models.compat_checkpointing import is_checkpointing, without_checkpointing
from spul.prompts.probe import checkpoints_prefix, shares_prefix

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
PATIENCE = 0.1  # seconds, many times what the other thread takes to begin


def in_second_layer(unlearner, function):
    return decoder_layers(unlearner)[1].register_forward_pre_hook(lambda *args: function())


def number_of_runs(unlearner, action):
    """The number of runs of the base's second layer in an action, where the base is probed first."""
    runs = []
    handle = in_second_layer(unlearner, lambda: runs.append(1))
    action(unlearner)
    handle.remove()
    return len(runs)


@contextmanager
def interrupted(unlearner, at, other):
    """Context manager: at a run of the base's second layer, counted from 0, another thread begins `other()`."""
    main, runs, threads = threading.get_ident(), [], []

    def interrupt():
        if threading.get_ident() == main:
            runs.append(1)
            if len(runs) == at + 1:
                threads.append(threading.Thread(target=other))
                threads[0].start()
                threads[0].join(PATIENCE)

    handle = in_second_layer(unlearner, interrupt)
    try:
        yield
    finally:
        for thread in threads:
            thread.join()
        handle.remove()  # last: a base whose hooks have changed is asked anew
        assert threads, f"it ran {len(runs)} times"


@contextmanager
def held(block):
    """Context manager: a function that another thread calls, to be in a block until this one is left."""
    left = threading.Event()

    def hold():
        with block:
            left.wait(10)

    try:
        yield hold
    finally:
        left.set()


def test_a_step_is_right_wherever_another_thread_begins_to_evaluate(prompt_type):
    batch, unlearner = make_batch(), build_unlearner("llama", prompt_type)
    expected = plain_losses(unlearner, batch)[0]
    wanted = prompt_gradients(unlearner, expected)
    num = number_of_runs(checkpointed(unlearner), lambda model: model(**batch))
    assert num >= 5  # in probes, and in passes of its own
    for at in range(0, num, 2):
        unlearner = checkpointed(build_unlearner("llama", prompt_type))
        with interrupted(unlearner, at, lambda: evaluate()), held(evaluation_mode(unlearner)) as evaluate:
            loss = unlearner(**batch).loss
        found = prompt_gradients(unlearner, loss)
        torch.testing.assert_close(loss, expected)
        assert found.keys() != set()
        assert_same(found, wanted)
        assert is_checkpointing(unlearner.get_base_model())


def test_a_probe_is_right_wherever_another_thread_goes_on_training(caplog):
    def probe(unlearner):
        base = unlearner.eval().get_base_model()
        return shares_prefix(base, 5), checkpoints_prefix(base.train(), 5)

    for at in range(number_of_runs(checkpointed(build_unlearner()), probe)):
        unlearner = checkpointed(build_unlearner())
        with interrupted(unlearner, at, unlearner.train):
            assert probe(unlearner) == (True, True)
    assert not caplog.messages


def test_generation_is_right_wherever_another_thread_goes_on_training(prompt_type):
    def generate(unlearner):
        return unlearner.eval().generate(ids, **GREEDY).tolist()

    ids = make_batch()["input_ids"][:2, :5]
    unlearner = prompted(prompt_type=prompt_type)
    expected = generate(unlearner)
    for at in range(0, number_of_runs(checkpointed(unlearner), generate), 2):
        unlearner = checkpointed(prompted(prompt_type=prompt_type))
        with interrupted(unlearner, at, unlearner.train):
            assert generate(unlearner) == expected
        assert unlearner.training


def test_a_base_is_asked_once_where_two_threads_use_it_at_once():
    unlearner, batch = checkpointed(build_unlearner()), make_batch()
    passes = Passes(unlearner)
    first = number_of_runs(unlearner, lambda model: model(**batch))

    @torch.no_grad()
    def score():
        unlearner(**batch)

    with interrupted(unlearner, first, score):
        unlearner(**batch)
        passes.shapes.clear()
        unlearner(**batch)
    assert len(passes.shapes) == 2 * 3  # the prompt, the rows, the reference; no probe


def test_rows_with_prompts_of_their_own_are_right_where_another_thread_begins_to_evaluate(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), make_batch()
    unlearner.add_adapter("other", CONFIGS[prompt_type](5))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["adapter_names"] = ["other", "default", "__base__", "default", "other"]
    expected = unlearner.double()(**inputs).logits
    checkpointed(unlearner)
    with interrupted(unlearner, 1, lambda: evaluate()), held(evaluation_mode(unlearner)) as evaluate:
        found = unlearner(**inputs).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("names", [None, ["default", "other", "__base__"]])
def test_a_call_keeps_its_prompt_where_another_thread_sets_another(prompt_type, names, call):
    @torch.no_grad()
    def answered(unlearner):
        return unlearner.generate(**inputs, **GREEDY) if call == "generate" else unlearner(**inputs).logits

    unlearner = build_unlearner("mistral", prompt_type, sliding_window=6).eval()  # groups of rows under a prefix
    unlearner.add_adapter("other", CONFIGS[prompt_type](7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    inputs = {"input_ids": make_batch()["input_ids"][:3, :6], "attention_mask": mask, "adapter_names": names}
    expected, num = answered(unlearner), number_of_runs(unlearner, answered)
    for at in range(0, num, num // 6 + 1):
        unlearner.set_adapter("default")
        with interrupted(unlearner, at, lambda: unlearner.set_adapter("other")):
            torch.testing.assert_close(answered(unlearner), expected)


@pytest.mark.parametrize("first_left", [0, 1])
def test_blocks_of_evaluation_mode_that_overlap_leave_the_mode_before_them(first_left):
    model = build("llama").train()
    model.model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    blocks = [evaluation_mode(model), evaluation_mode(model.model)]
    for block in blocks:
        block.__enter__()
    blocks[first_left].__exit__(None, None, None)
    assert not model.model.training
    blocks[1 - first_left].__exit__(None, None, None)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_block_of_evaluation_mode_inside_another_restores_what_was_set_between():
    model = build("llama").train()
    with evaluation_mode(model):
        model.train()
        with evaluation_mode(model):
            assert not model.training
        assert model.training
    assert model.training


def test_switching_checkpointing_off_waits_for_a_step_of_another_thread():
    unlearner, batch = checkpointed(build_unlearner()), make_batch()
    base, expected = unlearner.get_base_model(), unlearner(**batch).loss
    with interrupted(unlearner, 0, lambda: switch()), held(without_checkpointing(base)) as switch:
        found = unlearner(**batch).loss
    torch.testing.assert_close(found, expected)


def test_a_step_is_right_that_begins_while_another_thread_adds_a_prompt(prompt_type, monkeypatch):
    unlearner, batch = build_unlearner("llama", prompt_type), make_batch()
    expected = plain_losses(unlearner, batch)[0]
    wanted = prompt_gradients(unlearner, expected)
    checkpointed(unlearner)(**batch)  # and its probes
    adding, in_layer = threading.Event(), threading.Event()
    add = PeftModelForCausalLM.add_adapter

    def slowly(self, *args, **kwargs):
        adding.set()
        in_layer.wait(PATIENCE)  # the step of the other thread either waits, or is between two layers
        return add(self, *args, **kwargs)

    monkeypatch.setattr(PeftModelForCausalLM, "add_adapter", slowly)
    other = threading.Thread(target=unlearner.add_adapter, args=("other", CONFIGS[prompt_type](5)))

    def in_between():
        in_layer.set()
        if threading.current_thread() is not other:
            other.join(PATIENCE)

    handle = in_second_layer(unlearner, in_between)
    other.start()
    adding.wait()
    loss = unlearner(**batch).loss
    other.join()
    handle.remove()
    found = prompt_gradients(unlearner, loss)
    torch.testing.assert_close(loss, expected)
    assert_same(found, wanted)
    assert sorted(unlearner.peft_config) == ["default", "other"]
    assert is_checkpointing(unlearner.get_base_model())
