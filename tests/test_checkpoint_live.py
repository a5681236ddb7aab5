"""Saving of a prompt that trains: no noise of its encoder in the file, and the prompt trains on, whatever happens."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import build, make_batch
from peft import PromptEncoderConfig
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from spul import SoftPromptUnlearner


def noisy(adapter_name="default"):
    """P-tuning whose encoder drops its hidden states in training mode, in which it is."""
    torch.manual_seed(3)
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
        encoder_dropout=0.5,
    )
    model = SoftPromptUnlearner(build("llama"), config, adapter_name=adapter_name, start="random")
    return model.train()


def test_the_saved_prompt_has_no_noise_of_its_encoder_and_trains_on(tmp_path):
    model = noisy()
    model.save_pretrained(str(tmp_path))
    encoder = model.prompt_encoder["default"]
    assert all(module.training for module in encoder.modules())
    again = SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path), is_trainable=True)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    expected = encoder.eval()(torch.arange(4)[None])[0]
    torch.testing.assert_close(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], expected)
    batch = make_batch()
    torch.testing.assert_close(again.eval()(**batch).loss, model.eval()(**batch).loss)


def test_the_encoder_drops_in_training_and_not_in_generation():
    model, batch = noisy(), make_batch()
    losses = [model(**batch).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(p.grad is not None for p in model.prompt_encoder.parameters())

    def logits():
        settings = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(model.generate(batch["input_ids"][:2, :3], pad_token_id=0, **settings).logits)

    in_training = logits()
    assert model.prompt_encoder["default"].lstm_head.training
    model.eval()
    torch.testing.assert_close(in_training, logits(), rtol=0, atol=0)


def test_a_save_that_fails_leaves_the_prompt_as_it_was_and_others_never_see_its_mark(tmp_path, monkeypatch):
    model, batch = noisy().eval(), make_batch()
    config, expected, seen = model.peft_config["default"], model(**batch).loss, []

    def full(self, *args, **kwargs):
        seen.append((self.inference_mode, config.inference_mode))
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PromptEncoderConfig, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(str(tmp_path / "full"))
    assert seen == [(True, False)]
    assert config.inference_mode is False
    assert model(**batch).loss == expected
    model.save_pretrained(str(tmp_path))
    assert SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path)).eval()(**batch).loss == pytest.approx(
        expected.item(), rel=1e-5
    )


def rounded(tensor):
    """To 10 bits of mantissa, as TF32 takes factors of products."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Rounded(TorchFunctionMode):
    """Linear layers multiply as under TF32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = (rounded(args[0]), rounded(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def test_a_prompt_that_another_device_rounded_trains_on_and_one_of_another_step_is_found(tmp_path):
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, encoder_hidden_size=32)
    torch.manual_seed(3)
    model = SoftPromptUnlearner(build("llama"), config, start="random")
    with Rounded():
        model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    exact = model.get_prompt_embedding_to_save("default")
    assert 1e-4 < (saved - exact).norm() / exact.norm() < 1e-3
    model.load_adapter(str(tmp_path), "default", is_trainable=True)

    model(**make_batch()).loss.backward()
    torch.optim.AdamW(model.prompt_encoder.parameters(), lr=1e-4).step()
    model.save_pretrained(str(tmp_path / "later"))
    shutil.copy(tmp_path / "later" / "prompt_encoder.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"does not belong to the adapter_model\.safetensors"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
