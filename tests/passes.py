"""Passes of a base in training: counted, under gradient checkpointing, and held to the plain twin."""

import torch
from helpers import prompt_gradients
from plain import losses as plain_losses

from spul.models.causal_lm import decoder_layers
from spul.models.compat_checkpointing import switch_checkpointing


def checkpointed(unlearner, reentrant=False, **options):
    switch_checkpointing(unlearner.get_base_model(), "enable", {"use_reentrant": reentrant}, **options)
    return unlearner.train()


class Passes:
    """Numbers of rows and tokens in each run of a layer, recomputations included."""

    def __init__(self, unlearner, layer=0):
        self.shapes = []
        names = ("input_layernorm", "self_attn_layer_norm", "ln_1")
        first = next(m for name, m in decoder_layers(unlearner)[layer].named_modules() if name in names)
        first.register_forward_pre_hook(lambda module, args: self.shapes.append(tuple(args[0].shape[:2])))


def assert_as_plain(unlearner, batch, rtol=1e-4, atol=1e-6):
    expected = plain_losses(unlearner.eval(), batch)
    wanted = prompt_gradients(unlearner, expected[0])
    out = unlearner.train()(**batch)
    found = prompt_gradients(unlearner, out.loss)
    terms = (out.loss, out.forget_loss, out.retain_loss, out.kl_loss)
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected), rtol=rtol, atol=atol)
    assert found.keys() == wanted.keys() != set()
    for name in found:
        assert found[name].abs().max() > 0
        torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=atol)
