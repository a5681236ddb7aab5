"""Parts of tests: tiny random models of real families, a tokenizer, rows, collators, prompts and trainers."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLayers, UnlearningLayersConfig, UnlearningTrainer
from spul.data.dataset import forget_retain_dataset
from spul.evaluation.metrics import score_completions
from spul.models.compat import takes_positions
from spul.prompts.probe import shares_prefix

torch.set_num_threads(1)  # tiny models, and pytest -n 2 has one core a worker

VOCABULARY = 120
SELECTS_POSITIONS = takes_positions(LlamaForCausalLM)  # from transformers 5.21 on; below, all logits are computed


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_llama(hidden_size: int = 32):
    shape = {**SHAPE, "hidden_size": hidden_size}
    config = LlamaConfig(**shape, intermediate_size=hidden_size * 2, num_key_value_heads=2, attention_dropout=0.1)
    return LlamaForCausalLM(config)


def build_opt():
    config = OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.1, attention_dropout=0.1, layerdrop=0.2)
    return OPTForCausalLM(config)


def build_gpt2():
    shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    tokens = {key: SHAPE[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return GPT2LMHeadModel(GPT2Config(**shape, **tokens))


def build_qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, intermediate_size=48, num_key_value_heads=2, head_dim=16))


def build_gemma3(sliding_window: int = 64):
    config = Gemma3TextConfig(
        **SHAPE,
        intermediate_size=48,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=5.0,
    )
    return Gemma3ForCausalLM(config)


def build_neox():
    config = GPTNeoXConfig(**SHAPE, intermediate_size=48, hidden_dropout=0.1, attention_dropout=0.1)
    return GPTNeoXForCausalLM(config)


def build_mistral(sliding_window: int = 6):
    config = MistralConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2, sliding_window=sliding_window)
    return MistralForCausalLM(config)


FAMILIES = {
    "llama": build_llama,
    "opt": build_opt,
    "gpt2": build_gpt2,
    "qwen3": build_qwen3,
    "gemma3": build_gemma3,
    "gpt_neox": build_neox,
}


def build(family: str, dtype: torch.dtype = torch.float32, **kwargs):
    torch.manual_seed(0)
    builder = {**FAMILIES, "mistral": build_mistral}[family]
    model = builder(**kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the usual 0.02, so that a prompt makes a difference that a test can see.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = "the review is positive negative neutral unknown of film good bad plot about jane doe text sentiment"
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    core.train_from_iterator([words, " " + words, "### text: \n abcdefghijklmnopqrstuvwxyz 0123456789 .,"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


# ---- prompts on them ----


CONFIGS = {
    "prompt_tuning": lambda p=5: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p),
    "p_tuning": lambda p=5: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, encoder_hidden_size=16),
    "prefix_tuning": lambda p=5: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p),
}


LENGTHS = (12, 9, 5, 7, 10)


NUM_RESPONSE = (1, 3, 2, 1, 4)


def build_unlearner(
    family="llama", prompt_type="prompt_tuning", dtype=torch.float64, p=5, loss=None, seed=1, **kwargs
):
    base = build(family, dtype, **kwargs)
    torch.manual_seed(seed)
    return SoftPromptUnlearner(base, CONFIGS[prompt_type](p), loss=loss).to(dtype)


def make_unlearner(prompt_type="prompt_tuning", family="llama", loss=None):
    """In single precision, as trainers take it."""
    return build_unlearner(family, prompt_type, torch.float32, p=4, loss=loss, seed=3)


def prompted(family="llama", prompt_type="prompt_tuning", p=4, dtype=torch.float64):
    """As evaluations take it."""
    return build_unlearner(family, prompt_type, dtype, p, seed=5).eval()


def longrope_unlearner(prompt_type="prompt_tuning"):
    shape = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    torch.manual_seed(0)
    base = Phi3ForCausalLM(Phi3Config(**shape, original_max_position_embeddings=12, rope_scaling=factors))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return SoftPromptUnlearner(base.double().eval(), CONFIGS[prompt_type](4)).double().eval()


def probed(unlearner):
    """The unlearner, its base probed, so that the probe's passes are not counted with those that follow."""
    shares_prefix(unlearner.get_base_model(), unlearner.active_peft_config.num_virtual_tokens)
    return unlearner


def make_batch(side="right", is_forget=(1, 0, 1, 0, 0)):
    generator = torch.Generator().manual_seed(2)
    width = max(LENGTHS)
    rows = []
    for length, num in zip(LENGTHS, NUM_RESPONSE, strict=True):
        ids = torch.randint(3, 120, (length,), generator=generator)
        labels = torch.full((length,), -100)
        labels[-num:] = ids[-num:]
        pad = (0, width - length) if side == "right" else (width - length, 0)
        rows.append(
            [torch.nn.functional.pad(x, pad, value=v) for x, v in ((ids, 0), (ids * 0 + 1, 0), (labels, -100))]
        )
    ids, mask, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    flags = torch.tensor(is_forget, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "is_forget": flags}


def prompt_gradients(unlearner, loss):
    unlearner.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in unlearner.named_parameters() if p.grad is not None}


def state_of(model):
    """All that a failed loading could change."""
    found = {
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "dropout": [
            value for module in model.modules() for key, value in vars(module).items() if "drop" in key or key == "p"
        ],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "values": [p.detach().clone().tolist() for p in model.parameters()],
    }
    if isinstance(model, SoftPromptUnlearner):
        found |= {"active": model.active_adapter, "configs": {k: v.to_dict() for k, v in model.peft_config.items()}}
        found |= {"records": {k: repr(v) for k, v in model.spul_configs.items()}, "tokens": list(model.prompt_tokens)}
    return found


# ---- layers and LoRA on them ----


SMALL_LAYERS = UnlearningLayersConfig(reduction=4)


def stirred(model, config=SMALL_LAYERS, seed=1):
    """Layers as training might leave them."""
    layers = UnlearningLayers(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layers.layers.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return layers


def lora(model):
    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zero when fresh, which would hide what the adapter does
                parameter.normal_(std=0.1)
    return wrapped


def layers_on(model):
    layers = UnlearningLayers(model, UnlearningLayersConfig(reduction=4))
    with torch.no_grad():
        for i, layer in enumerate(layers.layers):  # zero when fresh, which would hide what the layer does
            start = torch.randn(layer.up.weight.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            layer.up.weight.copy_(0.2 * start)
    return layers


def trainable_model(trainable, family="llama", dtype=torch.float64):
    model = build(family, dtype)
    if trainable == "layers":
        return layers_on(model)
    return lora(model) if trainable == "lora" else model.requires_grad_(True)


# ---- rows, collators and training ----


GENERIC = [" neutral", " unknown"]


def rows(name, num):
    labels = (" positive", " negative")
    return Dataset.from_list([{"prompt": f"review {name} {i} :", "completion": labels[i % 2]} for i in range(num)])


def tokenizer_with(bos: bool):
    tokenizer = make_tokenizer()
    if bos:
        begun = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = begun
    assert (tokenizer("jane")["input_ids"][0] == 1) is bos
    return tokenizer


def make_dataset(num_forget=11, num_retain=21):
    return forget_retain_dataset(rows("jane", num_forget), rows("film", num_retain))


def make_collator(**kwargs):
    return ForgetRetainCollator(make_tokenizer(), **{"generic_completions": GENERIC, "max_length": 32, **kwargs})


ONE_STEP = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}


def arguments(folder, **kwargs):
    settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "lr_scheduler_type": "constant"}
    return TrainingArguments(str(folder), **{**settings, **kwargs})


def make_trainer(folder, prompt_type="prompt_tuning", unlearner=None, dataset=None, collator=None, **kwargs):
    names = ("forget_fraction", "eval_dataset", "callbacks", "reference", "reference_dir", "digest_key")
    names += ("processing_class",)
    own = {key: kwargs.pop(key) for key in names if key in kwargs}
    unlearner = make_unlearner(prompt_type) if unlearner is None else unlearner
    dataset = make_dataset() if dataset is None else dataset
    collator = make_collator() if collator is None else collator
    return UnlearningTrainer(unlearner, arguments(folder, **kwargs), collator, dataset, **own)


def prompt_state(unlearner):
    return {name: p.detach().clone() for name, p in unlearner.prompt_encoder.named_parameters()}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


def answers(name, num):
    """Rows with completions of one token and of many."""
    texts = (" positive", " a bad film about jane doe", " the plot")
    return Dataset.from_list(
        [{"prompt": f"review {name} {'x ' * (i % 5)}{i} :", "completion": texts[i % 3]} for i in range(num)]
    )


def make_answers(num_forget=5, num_retain=13):
    return forget_retain_dataset(answers("jane", num_forget), answers("film", num_retain))


def with_alternates(dataset, column="alternates"):
    """Two answers of its own for each forget row to draw from."""
    texts = [[f" good {i}", f" bad film {i}"] if flag else [] for i, flag in enumerate(dataset["is_forget"])]
    return dataset.add_column(column, texts)


class Counting:
    """Counts the rows that pass through a base."""

    def __init__(self, base):
        self.rows = 0
        base.base_model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.rows += len(kwargs["input_ids"]) if kwargs.get("input_ids") is not None else 0  # not a prompt's pass


def scored(model, rows):
    return score_completions(model, rows, make_collator())
