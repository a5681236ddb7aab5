"""Published methods by name: their losses, trainables, rows and completions."""

import copy
import json

import pytest
import torch
from helpers import GENERIC, SHAPE, arguments, build, make_batch, make_dataset, make_tokenizer, with_alternates
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Llama4TextConfig, PhimoeConfig

from spul import SoftPromptUnlearner, UnlearningLayers, UnlearningLayersConfig, UnlearningLoss, UnlearningTrainer
from spul.losses import (
    CEU,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    CrossEntropy,
    GradientAscent,
    KLAscent,
    KLDivergence,
    SatImp,
    SimNPO,
    StateDistance,
)
from spul.models.compat_modules import forward_hooks
from spul.models.noise import dropout_of
from spul.models.unlearner import unlearner_of
from spul.training import methods
from spul.training.forward import unlearning_forward
from spul.training.methods import METHODS, TRAINABLES, Method, unlearning_method

# forget term, alpha, beta, direction of the KL
EXPECTED = {
    "SPUL": (CrossEntropy, 1.0, 0.5, "reverse"),
    "GA": (GradientAscent, 0.0, 0.0, None),
    "RL": (CrossEntropy, 0.0, 0.0, None),
    "GA+KL": (GradientAscent, 0.0, 1.0, "forward"),
    "GA+GD": (GradientAscent, 1.0, 0.0, None),
    "NPO": (NPO, 0.0, 0.0, None),
    "NPO+KL": (NPO, 0.0, 1.0, "forward"),
    "NPO+GD": (NPO, 1.0, 0.0, None),
    "SimNPO": (SimNPO, 0.0, 0.0, None),
    "SimNPO+KL": (SimNPO, 0.0, 1.0, "forward"),
    "SimNPO+GD": (SimNPO, 1.0, 0.0, None),
    "EUL": (KLAscent, 1.0, 0.8, "forward"),
    "IDK": (CrossEntropy, 1.0, 0.0, None),
    "IDK-DPO": (DPO, 1.0, 0.0, None),
    "AltPO": (DPO, 1.0, 0.0, None),
    "SimNPO-forget05": (SimNPO, 1 / 0.1375, 0.0, None),
    "SimNPO-forget10": (SimNPO, 8.0, 0.0, None),
    "WGA": (WGA, 0.0, 0.0, None),
    "WGA+GD": (WGA, 1.0, 0.0, None),
    "SatImp": (SatImp, 0.1, 0.0, None),
    "CE-U": (CEU, 0.0, 0.0, None),
    "UNDIAL": (UNDIAL, 0.0, 0.0, None),
    "RMU": (RMU, 1200.0, 0.0, None),
}
GENERIC_ONLY = ("SPUL", "RL", "IDK")
PAIRED = ("IDK-DPO", "AltPO")
FORGET_ONLY = ("GA", "RL", "NPO", "SimNPO", "WGA", "CE-U", "UNDIAL")
FITTING = [(name, trainable) for name in METHODS for trainable in (TRAINABLES if name != "RMU" else ("full", "lora"))]


def small(name, trainable=None):
    """The method for a model of two layers."""
    return unlearning_method(name, trainable, layer=1 if name == "RMU" else None)


def data(name, *sizes):
    rows = make_dataset(*sizes)
    return with_alternates(rows) if name == "AltPO" else rows


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_published_loss_on_the_published_trainable(name):
    forget, alpha, beta, direction = EXPECTED[name]
    method = unlearning_method(name)
    assert (type(method.loss.forget), method.loss.alpha, method.loss.beta) == (forget, alpha, beta)
    assert isinstance(method.loss.retain, StateDistance if name == "RMU" else CrossEntropy)
    assert isinstance(method.loss.kl, KLDivergence)
    assert direction is None or method.loss.kl.direction == direction
    assert method.trainable == {"SPUL": "prompt", "EUL": "layers", "UNDIAL": "lora"}.get(name, "full")
    assert method.loss.gamma == (0.2 if name == "EUL" else 0.0)
    assert UnlearningLoss.from_dict(json.loads(json.dumps(method.loss.to_dict()))) == method.loss


def test_settings_are_the_published_ones():
    terms = {name: unlearning_method(name).loss.forget for name in METHODS}
    assert {name: terms[name].inverse_temperature for name in ("IDK-DPO", "AltPO", "NPO")} == dict.fromkeys(
        ("IDK-DPO", "AltPO", "NPO"), 0.1
    )
    assert [terms[f"SimNPO-forget{size}"].inverse_temperature for size in ("05", "10")] == [2.5, 4.5]
    assert (terms["SatImp"].saturation, terms["SatImp"].importance, terms["WGA"].exponent) == (5.0, 1.0, 1.0)
    assert (terms["UNDIAL"].strength, terms["CE-U"].skip) == (10.0, 1)
    assert (terms["RMU"].layer, terms["RMU"].coefficient) == (7, 6.5)
    for name in ("IDK", "IDK-DPO", "AltPO", "SimNPO-forget05", "WGA+GD", "SatImp", "RMU"):
        assert unlearning_method(name).loss.retain.reduction == "mean"


@pytest.mark.parametrize("name", METHODS)
def test_forget_rows_keep_their_own_completion_where_it_is_made_unlikely(name):
    collator = unlearning_method(name).collator(make_tokenizer(), GENERIC, max_length=32)
    row = data(name, 2, 2)[0]
    answers = [collator.tokenizer.decode(labels[labels != -100]) for labels in collator([row])["labels"]]
    assert len(answers) == (2 if name in PAIRED else 1)
    assert (answers[-1] == row["completion"]) is (name not in GENERIC_ONLY)
    assert (answers[0] in GENERIC) is (name in (*GENERIC_ONLY, "IDK-DPO"))
    assert (answers[0] in row.get("alternates", ())) is (name == "AltPO")


@pytest.mark.parametrize("name", METHODS)
def test_methods_without_a_retain_term_see_forget_rows_only(name):
    flags = unlearning_method(name).training_rows(make_dataset(3, 5))["is_forget"]
    assert (sum(flags), len(flags)) == ((3, 3) if name in FORGET_ONLY else (3, 8))


def test_rows_that_are_not_marked_are_refused():
    with pytest.raises(ValueError, match=r"no is_forget.* Make the data set with forget_retain_dataset"):
        unlearning_method("GA").training_rows(make_dataset().remove_columns("is_forget"))


@pytest.mark.parametrize(("name", "trainable"), FITTING)
def test_every_method_trains_every_trainable_that_it_can(tmp_path, name, trainable):
    method = small(name, trainable)
    model = build("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = method.prepare(model)
    collator = method.collator(make_tokenizer(), GENERIC, max_length=32)
    rows = method.training_rows(data(name, 6, 6))
    trainer = UnlearningTrainer(prepared, arguments(tmp_path, max_steps=2), collator, rows, loss=method.loss)
    loss = trainer.train().training_loss
    assert torch.isfinite(torch.tensor(loss))
    assert all(bool(torch.isfinite(p).all()) for p in prepared.parameters())
    own = {key.replace("base_layer.", ""): value for key, value in model.state_dict().items()}
    assert all(torch.equal(own[key], before[key]) for key in before) is (trainable != "full")


def test_the_trainable_is_what_its_name_says():
    prompt = unlearning_method("SPUL").prepare(build("llama"))
    assert isinstance(prompt, SoftPromptUnlearner)
    config = prompt.active_peft_config
    assert (config.peft_type, config.num_virtual_tokens, config.encoder_hidden_size) == ("P_TUNING", 30, 128)
    other = unlearning_method("SPUL").prepare(
        build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    )
    assert other.active_peft_config.num_virtual_tokens == 7
    lora = unlearning_method("GA", "lora").prepare(build("llama"))
    assert isinstance(lora, PeftModel)
    assert {name.split(".")[-3] for name, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layers = unlearning_method("EUL").prepare(build("llama"), UnlearningLayersConfig(reduction=8))
    assert isinstance(layers, UnlearningLayers)
    assert layers.layers_config.reduction == 8
    model = build("llama").requires_grad_(False)
    assert unlearning_method("GA").prepare(model) is model
    assert all(p.requires_grad for p in model.parameters())


ROUTED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
NOT_LINEAR = {  # linear layers by their class, which return more than a tensor
    "phimoe": lambda: PhimoeConfig(**ROUTED),
    "llama4": lambda: Llama4TextConfig(**ROUTED, intermediate_size_mlp=48, head_dim=8),
}


@pytest.mark.parametrize("family", NOT_LINEAR)
def test_lora_on_all_linear_maps_leaves_out_what_is_none_and_trains(family):
    method = unlearning_method("GA", "lora")
    base = AutoModelForCausalLM.from_config(NOT_LINEAR[family]())
    model = method.prepare(base).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("q_proj" in name for name in trained)
    assert not any("router" in name for name in trained)
    unlearning_forward(model, method.loss, **make_batch()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("family", NOT_LINEAR)
def test_lora_on_what_is_no_linear_map_is_refused_before_training_and_leaves_the_base(family):
    base = AutoModelForCausalLM.from_config(NOT_LINEAR[family]())
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["router", "q_proj"])
    names = [name for name, _ in base.named_modules()]
    message = r"is on 'model.layers.0.*router', which is no linear map.*: exclude_modules=\['router'\]"
    with pytest.raises(ValueError, match=message):
        unlearning_method("GA", "lora").prepare(base, config)
    assert [name for name, _ in base.named_modules()] == names
    own = get_peft_model(base, config)
    with pytest.raises(ValueError, match=message):  # as UnlearningTrainer asks it
        unlearner_of(own).check_trainable()
    config.exclude_modules = ["router"]
    assert isinstance(unlearning_method("GA", "lora").prepare(own.unload(), config), PeftModel)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_lora_that_rewrites_the_base_is_refused_and_leaves_it(init):
    base = build("llama")
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    config.init_lora_weights = init  # some need packages or settings, which are not asked for here
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' rewrites .*; use init_lora_weights=True"):
        unlearning_method("NPO+KL", "lora").prepare(base, config)
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


def test_a_base_that_an_adapter_of_others_rewrote_is_no_reference():
    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="pissa"))
    method = unlearning_method("NPO+KL", "lora")
    batch = make_batch()
    for read in (
        unlearner_of(model).check_trainable,
        lambda: unlearning_forward(model, method.loss, **batch),
        lambda: unlearner_of(model).detached_base().__enter__(),
    ):
        with pytest.raises(ValueError, match="init_lora_weights='pissa' rewrites the base's weights"):
            read()
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=4))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="init_lora_weights='pissa' rewrites the base's weights"):
        unlearner_of(model).check_trainable()


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialization_that_leaves_the_base_gives_it_back_without_the_adapter(init):
    ids = torch.arange(5, 15)[None]
    base = build("llama")
    expected = base(ids).logits
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=init)
    model = unlearning_method("NPO+KL", "lora").prepare(base, config)
    with unlearner_of(model).detached_base() as found:
        assert torch.equal(found(ids).logits, expected)


def state_of(model):
    """The parts of a model that training by a method changes, hooks among them."""
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "configs": [id(getattr(module, "config", None)) for module in model.modules()],
        "dropout": [value for _, _, value in dropout_of(model)],
        "parameters": [(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()],
        "hooks": [number for number, _ in forward_hooks(model)],
        "adapter": hasattr(model, "peft_config"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["router", "q_proj"], "which is no linear map"),  # found when LoRA is there
        (["q_proj", "norm"], "is not supported"),  # by PEFT, on its way
        (["no_such"], "not found in the base model"),
    ],
)
def test_a_refused_lora_leaves_nothing_half_changed(targets, message, dtype, monkeypatch):
    monkeypatch.setattr(methods, "is_quantized", lambda model: True)  # which PEFT prepares: frozen, in float32
    config = NOT_LINEAR["phimoe"]()
    config.attention_dropout = 0.25
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.gradient_checkpointing_enable()  # PEFT hooks its embeddings
    before, weights = state_of(base), {name: value.clone() for name, value in base.state_dict().items()}
    assert 0.25 in before["dropout"]
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    with pytest.raises(ValueError, match=message):
        unlearning_method("GA", "lora").prepare(base, lora)
    assert state_of(base) == before
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert isinstance(unlearning_method("GA", "lora").prepare(base), PeftModel)
    assert state_of(base) != before


def test_weights_that_cannot_be_trained_leave_the_model_as_it_was(monkeypatch):
    base = build("opt").requires_grad_(False)
    before = state_of(base)
    with pytest.raises(ValueError, match="layer=7"):
        unlearning_method("RMU").prepare(base)
    monkeypatch.setattr(methods, "is_quantized", lambda model: True)
    with pytest.raises(ValueError, match="load the model unquantized"):
        unlearning_method("GA").prepare(base)
    assert state_of(base) == before


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_model_with_the_layers_of_an_adapter_inside_is_refused_and_keeps_them(trainable):
    base = get_peft_model(
        build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    ).base_model.model
    before = state_of(base)
    with pytest.raises(TypeError, match="has an adapter's layers inside"):
        unlearning_method("GA", trainable).prepare(base)
    assert state_of(base) == before


def test_a_config_of_lora_is_left_as_it_was_and_serves_for_another_base():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    before = copy.deepcopy(config)
    for family, own in (("llama", "gate_proj"), ("opt", "fc1")):
        model = unlearning_method("GA", "lora").prepare(build(family), config)
        assert config == before
        assert any(f"{own}.lora_A" in name for name, _ in model.named_parameters())


def test_a_config_of_a_prompt_is_left_as_it_was_and_serves_for_another_base():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    before = copy.deepcopy(config)
    for width in (32, 64):
        model = unlearning_method("GA", "prompt").prepare(build("llama", hidden_size=width), config)
        model.add_adapter("other", config)
        assert config == before
        assert [model.peft_config[name].token_dim for name in ("default", "other")] == [width // 2] * 2


@pytest.mark.parametrize("trainable", TRAINABLES)
def test_dropout_is_off_for_every_trainable(trainable):
    model = build("opt")
    assert any(getattr(module, "dropout", 0) for module in model.modules())
    prepared = unlearning_method("GA", trainable).prepare(model).train()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(prepared(input_ids=ids).logits, prepared(input_ids=ids).logits, rtol=0, atol=0)


def test_weights_are_set_where_the_method_has_them():
    assert unlearning_method("SPUL", alpha=0.1, beta=0.0).loss.alpha == 0.1
    assert unlearning_method("SPUL", alpha=0.1, beta=0.0).loss.beta == 0.0
    assert unlearning_method("GA+GD", alpha=2.0).loss.alpha == 2.0
    assert unlearning_method("EUL", gamma=0.1).loss.gamma == 0.1
    with pytest.raises(ValueError, match=r"gamma=0\.1: SPUL has no such term"):
        unlearning_method("SPUL", gamma=0.1)
    with pytest.raises(ValueError, match=r"beta=0\.5: GA\+GD has no such term"):
        unlearning_method("GA+GD", beta=0.5)
    method = unlearning_method("RMU", alpha=10.0, layer=3)
    assert (method.loss.alpha, method.loss.forget.layer, method.loss.retain.layer) == (10.0, 3, 3)
    with pytest.raises(ValueError, match="layer=3: NPO reads logits; only RMU steers a layer's states"):
        unlearning_method("NPO", layer=3)


def test_unknown_names_list_what_is_known():
    with pytest.raises(ValueError, match="method 'DPO' is not known; expected one of SPUL, GA, RL"):
        unlearning_method("DPO")
    with pytest.raises(
        ValueError, match="trainable='adapter' is not known; expected one of prompt, full, lora, layers"
    ):
        Method("mine", unlearning_method("GA").loss, "adapter")


def test_models_and_configs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="trains the weights themselves"):
        unlearning_method("GA").prepare(build("llama"), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="model is a str; expected a causal LM"):
        unlearning_method("GA").prepare("facebook/opt-1.3b")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    with pytest.raises(ValueError, match="the config of a prompt; use trainable='prompt'"):
        unlearning_method("GA", "lora").prepare(build("llama"), prompt)
    with pytest.raises(ValueError, match="config is a UnlearningLayersConfig, which does not fit trainable='lora'"):
        unlearning_method("GA", "lora").prepare(build("llama"), UnlearningLayersConfig())
    with pytest.raises(ValueError, match="config is a PromptTuningConfig, which does not fit trainable='layers'"):
        unlearning_method("EUL").prepare(build("llama"), prompt)
    under = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    with pytest.raises(TypeError, match="adapter of PEFT is merged first"):
        unlearning_method("GA").prepare(under)
