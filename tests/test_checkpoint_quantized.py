"""Prompts on 8-bit and 4-bit bases: their gradients, training and loading."""

import logging

import pytest
import torch
from helpers import CONFIGS, build_llama, make_batch
from peft import PeftModel

from spul import SoftPromptUnlearner


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases_give_the_gradients_of_their_dequantized_twin(tmp_path, bits):
    """Also after an evaluation, for which bitsandbytes may repack 4-bit weights."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    build_llama(hidden_size=128).save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layers = dict(base.named_modules())
    for name, module in plain.named_modules():
        if isinstance(layers[name], bnb.nn.Linear4bit):
            weight = layers[name].weight
            module.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        elif isinstance(layers[name], bnb.nn.Linear8bitLt):
            weight = layers[name].weight
            module.weight.data = weight.data.float() * weight.SCB[:, None] / 127
    gradients = []
    for model in (plain, base):
        torch.manual_seed(1)
        unlearner = SoftPromptUnlearner(model, CONFIGS["prompt_tuning"]())
        with torch.no_grad():
            unlearner.eval()(**make_batch())
        unlearner(**make_batch()).loss.backward()
        gradients.append(unlearner.prompt_encoder["default"].embedding.weight.grad)
    # 8-bit layers also round what comes in.
    similarity = torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0)
    assert similarity > (0.99 if bits == 8 else 0.9999)
    assert gradients[1].norm() == pytest.approx(gradients[0].norm().item(), rel=0.1 if bits == 8 else 1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases_train_and_reload(tmp_path, prompt_type, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    name = str(tmp_path / "base")
    build_llama(hidden_size=128).save_pretrained(name)  # 4 bit goes by blocks of 64
    quantized = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def load():
        return AutoModelForCausalLM.from_pretrained(name, quantization_config=quantized, dtype=torch.float32)

    base = load()
    with torch.no_grad():
        base(make_batch()["input_ids"])  # a look at the base first, as a user takes it
    unlearner = SoftPromptUnlearner(base, CONFIGS[prompt_type]())
    optimizer = torch.optim.Adam([p for p in unlearner.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = unlearner(**make_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unlearner.save_pretrained(str(tmp_path / "adapter"))
    expected = unlearner.eval()(**make_batch()).logits
    again = SoftPromptUnlearner.from_pretrained(load(), str(tmp_path / "adapter"))
    # bitsandbytes has rounded the scales of the base that was looked at to bfloat16.
    close = {"rtol": 1e-4, "atol": 1e-4} if bits == 8 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(again(**make_batch()).logits, expected, **close)
    plain = PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    inputs = {key: make_batch()[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(plain(**inputs).logits, again(**inputs).logits, **close)
    again.generate(make_batch()["input_ids"][:2], max_new_tokens=2)


def test_casts_of_8_bit_are_said_once(tmp_path, caplog, monkeypatch):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    logger = logging.getLogger("bitsandbytes.autograd._functions")
    monkeypatch.setattr(logger, "filters", [])
    build_llama(hidden_size=128).save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, dtype=torch.float32)
    unlearner = SoftPromptUnlearner(base, CONFIGS["prompt_tuning"]()).eval()
    for _ in range(2):
        unlearner(**make_batch())
    assert ["will be cast" in one.message for one in caplog.records if one.name == logger.name] == [True]
