"""RWKV, whose weights change in place from mode to mode: refused by name, and trained where it is told not to."""

import pytest
import torch
from helpers import CONFIGS, make_batch, prompt_gradients
from plain import losses as plain_losses
from transformers import RwkvConfig, RwkvForCausalLM

from spul import SoftPromptUnlearner


def rwkv(**settings):
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, context_length=96, **settings)
    return RwkvForCausalLM(config).double()


def test_by_itself_a_backward_pass_after_an_evaluation_finds_other_weights():
    base = rwkv(rescale_every=1).train()
    embeds = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    loss = base(inputs_embeds=embeds, use_cache=False).logits.sum()
    with torch.no_grad():
        base.eval()(inputs_embeds=embeds)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_it_is_refused_with_the_setting_to_load_it_by(prompt_type):
    with pytest.raises(ValueError, match=r"rescales its weights in place.*rescale_every=6.*rescale_every=0"):
        SoftPromptUnlearner(rwkv(), CONFIGS[prompt_type]())


def test_without_rescaling_a_step_is_that_of_the_plain_twin_also_after_an_evaluation():
    torch.manual_seed(1)
    unlearner, batch = SoftPromptUnlearner(rwkv(rescale_every=0), CONFIGS["prompt_tuning"]()).double(), make_batch()
    expected = plain_losses(unlearner.train(), batch)[0]  # in evaluation it writes a cache in place
    wanted = prompt_gradients(unlearner, expected)
    loss = unlearner(**batch).loss
    with torch.no_grad():
        unlearner.eval()(**batch)
    found = prompt_gradients(unlearner, loss)
    torch.testing.assert_close(loss, expected)
    for name in wanted:
        assert found[name].abs().max() > 0
        torch.testing.assert_close(found[name], wanted[name])
