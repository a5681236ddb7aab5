"""Bases that draw at random in training mode: under a prompt they compute there what they compute in evaluation."""

import pytest
import torch
from helpers import (
    SHAPE,
    UnlearningLayers,
    UnlearningLayersConfig,
    assert_same,
    layers_on,
    make_batch,
    prompt_gradients,
)
from passes import checkpointed
from peft import PromptTuningConfig
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    MixtralConfig,
    OPTConfig,
    PersimmonConfig,
    PhimoeConfig,
)

from spul import SoftPromptUnlearner
from spul.training.forward import unlearning_forward
from spul.training.methods import unlearning_method

TOKENS = {key: SHAPE[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
EXPERTS = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NOISY = {
    "dbrx": lambda: DbrxConfig(
        **TOKENS,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=96,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.3},
    ),
    "falcon": lambda: FalconConfig(**SIZES, hidden_dropout=0.3, attention_dropout=0.3),
    "gptj": lambda: GPTJConfig(
        **TOKENS, n_positions=96, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, attn_pdrop=0.3, resid_pdrop=0.3
    ),
    "gpt_neo": lambda: GPTNeoConfig(
        **TOKENS,
        max_position_embeddings=96,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        attention_dropout=0.3,
        resid_dropout=0.3,
    ),
    "persimmon": lambda: PersimmonConfig(**SHAPE, intermediate_size=48, attention_dropout=0.3, hidden_dropout=0.3),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.5),
    "mixtral": lambda: MixtralConfig(**EXPERTS, router_jitter_noise=0.3),
    "phimoe": lambda: PhimoeConfig(**EXPERTS, input_jitter_noise=0.3),
}


def noisy(family):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(NOISY[family](), experts_implementation="eager")  # others take no float64
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base.double()


@pytest.mark.parametrize("family", NOISY)
def test_a_step_is_the_same_each_time_in_either_mode_and_under_checkpointing(family, caplog):
    base, batch = noisy(family).train(), make_batch()
    ids = batch["input_ids"]
    assert not torch.equal(base(ids).logits, base(ids).logits)  # by itself it draws
    torch.manual_seed(1)
    unlearner = SoftPromptUnlearner(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).double()
    expected = unlearner.eval()(**batch).loss
    wanted = prompt_gradients(unlearner, expected)
    for model in (unlearner.train(), checkpointed(unlearner)):
        loss = model(**batch).loss
        found = prompt_gradients(model, loss)
        torch.testing.assert_close(loss, expected)
        assert found.keys() != set()
        assert_same(found, wanted)
    assert not [message for message in caplog.messages if "under gradient checkpointing" in message]


def test_experts_are_not_sampled_under_layers_and_are_again_once_they_are_removed():
    base, ids = noisy("phimoe").train(), make_batch()["input_ids"]
    layers = layers_on(base)
    expected = layers.eval()(ids).logits
    torch.testing.assert_close(layers.train()(ids).logits, expected, rtol=0, atol=0)
    layers.remove()
    assert all(module.training for module in base.modules())
    layers.attach()
    torch.testing.assert_close(layers(ids).logits, expected, rtol=0, atol=0)
    assert not layers.eval().remove().training
    assert not any(module.training for module in base.modules())


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("family", NOISY)
def test_a_step_of_lora_and_of_all_weights_is_the_same_each_time(family, trainable):
    method, batch = unlearning_method("GA", trainable=trainable), make_batch()
    model = method.prepare(noisy(family).train())
    expected = unlearning_forward(model.eval(), method.loss, **batch).loss
    for _ in range(2):
        torch.testing.assert_close(unlearning_forward(model.train(), method.loss, **batch).loss, expected)


def own_config(family):
    config = NOISY[family]()
    config._experts_implementation = "eager"
    return AutoModelForCausalLM._model_mapping[type(config)](config), config


@pytest.mark.parametrize("trainable", ["prompt", "layers", "lora", "full"])
@pytest.mark.parametrize("family", ["falcon", "gpt_neo", "opt"])
def test_a_config_that_models_share_keeps_its_dropout_when_one_of_them_unlearns(family, trainable):
    base, config = own_config(family)
    other = type(base)(config).train()
    before, ids = config.to_dict(), make_batch()["input_ids"]
    unlearning_method("EUL" if trainable == "layers" else "GA", trainable=trainable).prepare(base)
    assert config.to_dict() == before
    assert not torch.equal(other(ids).logits, other(ids).logits)  # it draws as before


def test_modules_that_shared_a_config_share_the_one_without_dropout_and_the_prompt_has_it_too():
    base, config = own_config("falcon")
    unlearner = SoftPromptUnlearner(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    held = {id(module.config) for module in base.modules() if hasattr(module, "config")}
    assert held == {id(unlearner.config)}
    assert unlearner.config is not config
    assert unlearner.config.hidden_dropout == 0


def test_a_base_that_could_not_be_put_under_a_prompt_has_its_own_config_again(monkeypatch):
    base, config = own_config("falcon")
    monkeypatch.setattr("spul.prompts.unlearner.keep_in_evaluation", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SoftPromptUnlearner(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert all(module.config is config for module in base.modules() if hasattr(module, "config"))


def test_layers_that_are_removed_leave_dropout_and_jitter_as_they_were():
    for family, name, value in (("falcon", "hidden_dropout", 0.3), ("mixtral", "jitter_noise", 0.3)):
        base = noisy(family)
        module = next(m for m in base.modules() if hasattr(m, name)) if family == "mixtral" else None
        layers = UnlearningLayers(base, UnlearningLayersConfig(reduction=4))
        assert getattr(module or base.config, name) == 0.0
        layers.remove()
        assert getattr(module or base.config, name) == value


@pytest.mark.parametrize("family", ["falcon", "gpt_neo", "opt"])
def test_a_model_that_trains_keeps_its_config_with_which_it_is_saved(family):
    base = noisy(family)
    before = base.config.to_dict()
    trained = unlearning_method("GA", trainable="full").prepare(base)
    assert trained.config.to_dict() == before
    assert all(module.p == 0 for module in trained.modules() if isinstance(module, torch.nn.Dropout))
