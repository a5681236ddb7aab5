"""torch.compile of the base, or by the trainer: the same losses, gradients, logits and fingerprint."""

import pytest
import torch
from helpers import (
    CONFIGS,
    assert_same,
    build,
    build_unlearner,
    lora,
    make_batch,
    make_trainer,
    prompt_gradients,
    prompt_state,
    rows,
    scored,
)
from plain import losses as plain_losses
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter

from spul import SoftPromptUnlearner, fingerprint
from spul.models.causal_lm import decoder_layers, states_at
from spul.models.compat_checkpointing import switch_checkpointing


class Graphs:
    """A backend that compiles nothing and counts the graphs that it is given."""

    def __init__(self):
        self.num = 0
        self.backend = aot_autograd(fw_compiler=self.take)

    def take(self, graph, inputs):
        self.num += 1
        return graph.forward


@pytest.fixture
def graphs():
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def wrap(base):
    torch.manual_seed(1)
    return SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](5)).double()


def test_a_compiled_base_gives_the_plain_twins_losses_and_the_same_gradients(graphs):
    """Gemma 3 has both kinds of cache layers; wrapping it also renames its parameters."""
    eager, batch = wrap(build("gemma3")), make_batch()
    unlearner = wrap(torch.compile(build("gemma3"), backend=graphs.backend))
    out = unlearner(**batch)
    terms = (out.loss, out.forget_loss, out.retain_loss, out.kl_loss)
    for found, expected in zip(terms, plain_losses(eager, batch), strict=True):
        torch.testing.assert_close(found, expected)
    one, other = (prompt_gradients(model, model(**batch).loss) for model in (unlearner, eager))
    assert_same({name.replace("_orig_mod.", ""): grad for name, grad in one.items()}, other)
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(unlearner(**inputs).logits, eager(**inputs).logits)
    assert graphs.num > 0
    assert fingerprint(unlearner.get_base_model()) == fingerprint(eager.get_base_model())


def test_the_trainer_compiles_a_base_that_is_compiled_in_place_under_a_cached_reference(tmp_path, graphs):
    states = []
    for compiled in (False, True):
        base, options = build("llama"), {}
        if compiled:
            torch.compiler.reset()
            base.compile(backend=graphs.backend)
            options = {"torch_compile": True, "torch_compile_backend": "eager"}
        torch.manual_seed(1)
        unlearner = SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](5))
        trainer = make_trainer(tmp_path, unlearner=unlearner, max_steps=3, optim="sgd", **options)
        trainer.train()
        states.append(prompt_state(unlearner))
    assert_same(*states, rtol=1e-4, atol=1e-5)
    assert graphs.num > 0


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_a_compiled_unlearner_shares_its_prompt_under_gradient_checkpointing(kind, graphs):
    """As `Trainer` compiles it: the layers' functions, which change from call to call, are compiled around."""
    found, batch = [], make_batch()
    for compiled in (False, True):
        unlearner = build_unlearner("llama", kind).train()
        switch_checkpointing(unlearner.get_base_model(), "enable", {"use_reentrant": False})
        model = torch.compile(unlearner, backend=graphs.backend) if compiled else unlearner
        rows = []
        norm = decoder_layers(unlearner)[0].input_layernorm
        norm.register_forward_pre_hook(
            torch.compiler.disable(lambda _, args, rows=rows: rows.append(args[0].shape[:2]))
        )
        model(**batch)  # earns the shared prefix
        rows.clear()
        for _ in range(2):
            out = model(**batch)
            gradients = prompt_gradients(unlearner, out.loss)
        assert rows.count((5, 12)) == 4  # a step runs the rows twice, without the prompt in front of them
        found.append({"loss": out.loss.detach(), **gradients})
        assert (graphs.num > 0) == compiled
    assert_same(*found)


def test_a_compiled_base_is_trained_and_scored_under_its_prompt(tmp_path, graphs):
    """The base's wrapper, whose attributes PEFT hands out, is not taken for one around the prompt."""
    found = []
    for compiled in (False, True):
        base = build("llama")
        torch.manual_seed(1)
        base = torch.compile(base, backend=graphs.backend) if compiled else base
        unlearner = SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](5))
        trainer = make_trainer(tmp_path, unlearner=unlearner, max_steps=2, optim="sgd")
        trainer.train()
        found.append(prompt_state(unlearner))
        found[-1]["loss"] = torch.tensor(scored(unlearner, rows("jane", 4))["loss"])
        with unlearner.disable_adapter():
            assert scored(unlearner, rows("jane", 4))["loss"] != found[-1]["loss"].item()
    assert graphs.num > 0
    assert_same(*found, rtol=0, atol=1e-5)


def test_states_of_a_compiled_model_are_read_at_each_step_and_after_a_forward_without_them(graphs):
    counted = CompileCounter()
    model = lora(build("llama"))
    inputs = {"input_ids": torch.arange(5, 15)[None], "use_cache": False}
    positions = torch.tensor([[0, 3, 9]])
    expected = states_at(model, 0, positions, **inputs)
    compiled = torch.compile(model, backend=counted)
    for _ in range(2):
        torch.testing.assert_close(states_at(compiled, 0, positions, **inputs), expected)
    assert counted.frame_count == 1
    for keep in ({"logits_to_keep": 1}, {}):  # as `states_at` calls it, where the family selects positions and not
        compiled(**inputs, **keep)
    torch.testing.assert_close(states_at(compiled, 0, positions, **inputs), expected)
    torch.testing.assert_close(states_at(compiled, 1, positions, **inputs), states_at(model, 1, positions, **inputs))
