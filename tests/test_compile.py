"""torch.compile of the base, or by the trainer: the same losses, gradients, logits and fingerprint."""

import pytest
import torch
from helpers import CONFIGS, assert_same, build, make_batch, make_trainer, prompt_gradients, prompt_state
from plain import losses as plain_losses
from torch._dynamo.backends.common import aot_autograd

from spul import SoftPromptUnlearner, fingerprint


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
