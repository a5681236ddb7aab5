"""Bases and prompt configs that cannot be put together: refused at construction, with what works instead."""

import pytest
import torch
from helpers import CONFIGS, SHAPE, build, layers_on, make_batch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from plain import row_logits
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BambaConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    FalconConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from spul import SoftPromptUnlearner

LLAMA = LlamaConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2)
PROJECTED = OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16)
FEW = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
BART = {"vocab_size": 120, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
FALCON = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 2}
MAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {f"linear_{name}": n for name, n in [("num_key_heads", 2), ("num_value_heads", 2)]}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0, "mlp_only_layers": [0, 1]}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48}

NO_PREFIX = {
    "multi-query": FalconConfig(**FALCON, multi_query=True),
    "latent": DeepseekV3Config(
        **SHAPE, **LATENT, **EXPERTS, num_key_value_heads=4, intermediate_size=48, moe_intermediate_size=16
    ),
    "hybrid with Mamba": BambaConfig(**SHAPE, **GROUPED, **MAMBA),
    "hybrid with linear attention": Qwen3NextConfig(
        **SHAPE, **GROUPED, **LINEAR, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
}


def required(model):
    return [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("prompt_type", CONFIGS)
@pytest.mark.parametrize(
    ("build_model", "message"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**FEW)), "T5ForConditionalGeneration, an encoder-decoder"),
        (lambda: BartForConditionalGeneration(BartConfig(**BART, decoder_attention_heads=4)), "an encoder-decoder"),
        (lambda: AutoModel.from_config(LLAMA), "LlamaModel, which has no language modeling head"),
        (
            lambda: AutoModelForSequenceClassification.from_config(LLAMA),
            "LlamaForSequenceClassification, which",
        ),
        (lambda: BertForMaskedLM(BertConfig(**SHAPE, intermediate_size=48)), "BertForMaskedLM, which has no"),
    ],
    ids=["t5", "bart", "headless", "classifier", "masked"],
)
def test_models_that_are_no_causal_language_models_are_refused_and_left_as_they_were(
    build_model, message, prompt_type
):
    model = build_model()
    with pytest.raises(TypeError, match=f"{message}.*expected a causal LM, as AutoModelForCausalLM.from_pretrained"):
        SoftPromptUnlearner(model, CONFIGS[prompt_type]())
    assert all(required(model))


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA)
    with pytest.raises(ValueError, match=r"\d+ parameters of the LlamaForCausalLM are on the meta device"):
        SoftPromptUnlearner(model, CONFIGS["prompt_tuning"]())


def test_a_config_that_asks_for_tuples_is_refused():
    model = build("llama")
    model.config.return_dict = False
    with pytest.raises(ValueError, match=r"config.return_dict of the LlamaForCausalLM is False.*Leave it True"):
        SoftPromptUnlearner(model, CONFIGS["prompt_tuning"]())
    assert all(required(model))


def test_embeddings_that_nothing_fetches_are_refused_with_what_does():
    model = build("llama")
    model.model.embed_tokens.to("meta")
    model.model.embed_tokens._hf_hook = object()  # as accelerate leaves a module whose weights it offloads
    with pytest.raises(ValueError, match="by accelerate's cpu_offload or disk_offload"):
        SoftPromptUnlearner(model, CONFIGS["prompt_tuning"]())


@pytest.mark.parametrize("prompt_type", CONFIGS)
@pytest.mark.parametrize("num", [0, -1, 2.5, True, None])
def test_a_prompt_without_virtual_tokens_is_refused(prompt_type, num):
    config = CONFIGS[prompt_type]()
    config.num_virtual_tokens = num
    with pytest.raises(ValueError, match=f"num_virtual_tokens={num!r}; expected a whole number of at least 1"):
        SoftPromptUnlearner(build("llama"), config)


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PromptEncoderConfig])
def test_projected_embeddings_need_their_own_width_which_then_works(config_class):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PROJECTED).eval().double()
    with pytest.raises(ValueError, match=rf"{config_class.__name__}\(token_dim=16, ...\), or use PrefixTuningConfig"):
        SoftPromptUnlearner(model, config_class(task_type="CAUSAL_LM", num_virtual_tokens=4))
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=16)
    assert_like_concatenation(SoftPromptUnlearner(model, config).double())


def test_projected_embeddings_take_a_prefix():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PROJECTED).eval().double()
    assert_like_concatenation(SoftPromptUnlearner(model, CONFIGS["prefix_tuning"]()).double())


@pytest.mark.parametrize("family", NO_PREFIX)
def test_families_that_prefix_tuning_cannot_serve_are_refused_and_prompt_tuning_works(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(NO_PREFIX[family]).eval().double()
    before = required(model)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"prefix tuning cannot serve \w+: .* Use PromptTuningConfig or PromptEnco"):
        SoftPromptUnlearner(model, config)
    assert required(model) == before
    unlearner = SoftPromptUnlearner(model, CONFIGS["prompt_tuning"]()).double()
    assert_like_concatenation(unlearner)
    unlearner.delete_adapter("default")
    with pytest.raises(ValueError, match="prefix tuning cannot serve"):
        unlearner.add_adapter("default", config)
    assert not unlearner.peft_config
    unlearner.add_adapter("default", CONFIGS["prompt_tuning"]())
    assert_like_concatenation(unlearner.double())


OWN_NAMES = {
    "no attention": MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4),
    "n_heads": MptConfig(vocab_size=120, d_model=32, n_layers=2, n_heads=4, max_seq_len=96),
}


@pytest.mark.parametrize("prompt_type", CONFIGS)
@pytest.mark.parametrize("family", OWN_NAMES)
def test_families_with_names_of_their_own_for_their_sizes_need_no_sizes_in_the_config(family, prompt_type, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OWN_NAMES[family]).eval().double()
    if (family, prompt_type) == ("no attention", "prefix_tuning"):
        with pytest.raises(ValueError, match="prefix tuning cannot serve MambaForCausalLM"):
            SoftPromptUnlearner(model, CONFIGS[prompt_type]())
        return
    unlearner = SoftPromptUnlearner(model, CONFIGS[prompt_type](4))
    unlearner.add_adapter("other", CONFIGS[prompt_type](3))
    assert_like_concatenation(unlearner.double())
    unlearner.save_pretrained(tmp_path)
    assert_like_concatenation(
        SoftPromptUnlearner.from_pretrained(model, tmp_path / "other", is_trainable=True).double()
    )


def assert_like_concatenation(unlearner):
    """The response logits of a batch are those of each row alone behind its prompt."""
    batch = make_batch()
    with torch.no_grad():
        out = unlearner(**batch)
        for i, (ids, mask, labels) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        ):
            at = [k for k in range(1, int(mask.sum())) if labels[k] != -100]
            expected = row_logits(unlearner, ids[mask.bool()])[[k - 1 for k in at]]
            torch.testing.assert_close(out.logits[i, : len(at)], expected, rtol=1e-6, atol=1e-8)


def test_a_base_with_unlearning_layers_is_refused_until_they_are_removed():
    layers = layers_on(build("llama"))
    for enabled in (True, False):
        layers.enabled = enabled
        with pytest.raises(TypeError, match=r"has unlearning layers attached; .*base = layers\.remove\(\)"):
            SoftPromptUnlearner(layers.base_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    base = layers.remove()
    assert SoftPromptUnlearner(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).has_adapter
