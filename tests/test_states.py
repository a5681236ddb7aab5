"""RMU: its terms, the hidden states they read, what trains, the cached reference, and the step."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    FAMILIES,
    ONE_STEP,
    SHAPE,
    arguments,
    assert_same,
    build,
    lora,
    make_answers,
    make_collator,
    make_unlearner,
    stirred,
)
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma3nTextConfig,
    JambaConfig,
    MambaConfig,
    MixtralConfig,
    NemotronHConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from spul import ReferenceCache, UnlearningLoss, UnlearningTrainer, unlearning_forward, unlearning_method
from spul.losses import RMU, CrossEntropy, StateDistance
from spul.models.causal_lm import decoder_layers, feed_forward_ends, states_at
from spul.models.unlearner import unlearner_of

LOSS = UnlearningLoss(alpha=3.0, beta=0.0, forget=RMU(layer=0, coefficient=2.0), retain=StateDistance(layer=0))


def own_answers(**kwargs):
    return make_collator(**{"generic_completions": None, "max_length": 64, **kwargs})


# ---- terms ----


def test_the_control_vector_has_the_length_c_and_entries_of_one_sign_and_depends_on_the_seed_alone():
    vector = RMU(coefficient=6.5).control_vector(64)
    assert vector.norm().item() == pytest.approx(6.5)
    assert bool((vector >= 0).all())
    assert torch.equal(vector, RMU(layer=3, coefficient=6.5).control_vector(64))
    assert not torch.equal(vector, RMU(coefficient=6.5, seed=1).control_vector(64))


def test_a_row_of_states_at_the_control_vector_has_no_loss_nor_one_at_the_bases_states():
    states = RMU().control_vector(8).double().expand(2, 3, 8)
    labels = torch.tensor([[5, 6, 7], [5, -100, -100]])
    torch.testing.assert_close(RMU()(states, labels), torch.zeros(2).double(), rtol=0, atol=1e-12)
    assert bool((StateDistance()(states, labels, states) == 0).all())
    moved = states + 1.0
    torch.testing.assert_close(RMU()(moved, labels), torch.full((2,), 8.0).double())  # sums over d, means over tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layer": -1}, "layer=-1"), ({"layer": 1.0}, r"layer=1\.0"), ({"coefficient": 0.0}, r"coefficient=0\.0"),
     ({"coefficient": math.inf}, "coefficient=inf"), ({"seed": -1}, "seed=-1"), ({"seed": 0.5}, r"seed=0\.5")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        RMU(**change)


def test_a_loss_reads_one_thing():
    assert LOSS.reads_layer == 0
    assert UnlearningLoss().reads_layer is None
    for more in ({"retain": CrossEntropy()}, {"retain": StateDistance(layer=1)}, {"beta": 0.5}):
        with pytest.raises(ValueError, match="terms read different things"):
            UnlearningLoss(
                **{"alpha": 1.0, "beta": 0.0, "forget": RMU(layer=0), "retain": StateDistance(layer=0), **more}
            )
    with pytest.raises(ValueError, match=r"gamma=0\.2 with forget=RMU"):
        UnlearningLoss(alpha=0.0, beta=0.0, gamma=0.2, forget=RMU())


# ---- states ----


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_output_of_the_layer_in_every_family(family):
    model = build(family)
    ids = torch.arange(5, 15)[None]
    positions = torch.tensor([[0, 3, 9]])
    states = model.base_model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(states_at(model, 0, positions, input_ids=ids), states[:, [0, 3, 9]])
    assert len(decoder_layers(model)) == 2
    names = {"llama": "mlp.down_proj", "opt": "fc2", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}
    (name,) = feed_forward_ends(model, [1])
    assert name.endswith(f".1.{names.get(family, 'mlp.down_proj')}")


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="layer=7: LlamaForCausalLM has 2 layers, from 0"):
        states_at(build("llama"), 7, torch.tensor([[0]]), input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="layer=7: LlamaForCausalLM has 2 layers, from 0"):  # as it was given
        unlearning_method("RMU", layer=7).prepare(build("llama"))


WIDTHS = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
MAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NEMOTRON = {
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "mamba_num_heads": 4,
    "head_dim": 8,
}
# Bases whose layers do not end with the linear map of a dense feed-forward: routers, gates and mixers come last.
MIXED = {
    "shared expert": lambda: Qwen2MoeConfig(
        **WIDTHS, **EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
    "mixer last": lambda: BambaConfig(**WIDTHS, **MAMBA),
    "mixtral": lambda: MixtralConfig(**WIDTHS, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**WIDTHS, **EXPERTS, moe_intermediate_size=16, head_dim=8),
    "phimoe": lambda: PhimoeConfig(**WIDTHS, num_local_experts=4),
    "jamba": lambda: JambaConfig(
        **WIDTHS,
        **EXPERTS,
        mamba_d_state=8,
        attn_layer_period=2,
        attn_layer_offset=0,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    "attention alone": lambda: NemotronHConfig(**WIDTHS, **NEMOTRON, layers_block_type=["mlp", "attention"]),
    "experts alone": lambda: NemotronHConfig(**WIDTHS, **NEMOTRON, layers_block_type=["mlp", "moe"]),
    "mamba": lambda: MambaConfig(vocab_size=SHAPE["vocab_size"], hidden_size=32, num_hidden_layers=2, state_size=8),
    "gemma3n": lambda: Gemma3nTextConfig(
        **WIDTHS,
        vocab_size_per_layer_input=SHAPE["vocab_size"],
        hidden_size_per_layer_input=8,
        head_dim=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["full_attention", "full_attention"],
    ),
}


def mixed(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXED[family]())


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("shared expert", "mlp.shared_expert.down_proj"),
        ("mixer last", "feed_forward.down_proj"),
        ("gemma3n", "mlp.down_proj"),
    ],
)
def test_what_trains_is_the_feed_forwards_and_no_gate_nor_mixer_behind_it(family, end):
    names = [*feed_forward_ends(mixed(family), [1, 0])]
    assert names == [f"model.layers.{i}.{end}" for i in (1, 0)]


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("attention alone", ("mixer.down_proj", "mixer.o_proj")),
        ("experts alone", ("mixer.down_proj", "mixer.shared_experts.down_proj")),
        ("mamba", ("mixer.out_proj", "mixer.out_proj")),
    ],
)
def test_a_layer_of_one_block_trains_at_its_end_whatever_it_is(family, ends):
    names = [*feed_forward_ends(mixed(family), [0, 1])]
    assert [name.split(".layers.")[1] for name in names] == [f"{i}.{end}" for i, end in enumerate(ends)]


def test_a_base_whose_layers_zero_3_partitions_trains_as_any():
    model = build("llama")
    for parameter in decoder_layers(model).parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert [*feed_forward_ends(model, [1])] == ["model.layers.1.mlp.down_proj"]


def test_a_feed_forward_of_another_name_is_found_and_experts_are_spoken_of_where_there_are_some():
    model = build("llama")
    for block in decoder_layers(model):
        block.mlps, block.mlp = block.mlp, torch.nn.Identity()
    assert [*feed_forward_ends(model, [1])] == ["model.layers.1.mlps.down_proj"]
    decoder_layers(model)[1].mlps = torch.nn.Bilinear(2, 2, 2)  # no linear map
    with pytest.raises(
        ValueError, match=r"found self_attn\.q_proj.*, self_attn\.o_proj\. Train LoRA.*target_modules\.$"
    ):
        feed_forward_ends(model, [1])
    with pytest.raises(
        ValueError, match=r"self_attn\.o_proj\. Routed experts are no .*target_parameters for experts\.$"
    ):
        feed_forward_ends(mixed("mixtral"), [1])


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "phimoe", "jamba"])
def test_a_layer_whose_experts_are_all_routed_is_refused_and_not_trained_at_its_attention(family, trainable):
    model = mixed(family)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    message = f"layer 1 of {type(model).__name__} has no linear map that could be trained: expected .* the 32 entries"
    with pytest.raises(ValueError, match=message):
        unlearning_method("RMU", trainable, layer=1).prepare(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required


def test_lora_of_a_config_trains_experts_where_the_message_says_so():
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[], target_parameters=["experts.down_proj"])
    model = unlearning_method("RMU", "lora", layer=1).prepare(mixed("mixtral"), config)
    out = unlearning_forward(model, LOSS, **own_answers()(list(make_answers(2, 2))))
    out.loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    with pytest.raises(ValueError, match="layer=7: MixtralForCausalLM has 2 layers, from 0"):
        unlearning_method("RMU", "lora", layer=7).prepare(mixed("mixtral"), config)


# ---- loss of a batch ----


def plain_loss(batch, model, base):
    """The loss of a batch by the formula of the paper, one row and one token at a time."""
    forget, retain = [], []
    for ids, mask, is_forget in zip(batch["input_ids"], batch["attention_mask"], batch["is_forget"], strict=True):
        ids = ids[mask.bool()][None]
        states, before = (each(ids) for each in (model, base))
        target = LOSS.forget.control_vector(states.shape[-1]).to(states)
        distances = [((h - (target if is_forget else h0)) ** 2).sum() for h, h0 in zip(states, before, strict=True)]
        (forget if is_forget else retain).append(sum(distances) / len(distances))
    return sum(forget) / len(forget) + LOSS.alpha * sum(retain) / len(retain)


def first_layer(model):
    return lambda ids: model(ids, output_hidden_states=True).hidden_states[1][0]


def test_loras_loss_and_gradient_are_those_of_the_plain_formula():
    model = lora(build("llama", torch.float64))
    batch = own_answers()(list(make_answers(3, 2)))
    out = unlearning_forward(model, LOSS, **batch)
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def base(ids):
        with torch.no_grad(), model.disable_adapter():
            return first_layer(model)(ids)

    plain = plain_loss(batch, first_layer(model), base)
    plain.backward()
    torch.testing.assert_close(out.loss, plain)
    assert out.retain_loss > 0
    expected = {name: p.grad for name, p in model.named_parameters() if name in found}
    assert_same(found, expected, rtol=1e-4, atol=1e-6)
    assert any(bool(grad.abs().sum() > 0) for grad in found.values())


def test_left_padded_rows_are_read_at_their_own_tokens():
    model = lora(build("llama", torch.float64))
    batch = own_answers()(list(make_answers(3, 2)))
    order = batch["attention_mask"].argsort(dim=1, stable=True)  # pads first
    left = {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask", "labels")}
    expected = unlearning_forward(model, LOSS, **batch).loss
    torch.testing.assert_close(unlearning_forward(model, LOSS, **{**batch, **left}).loss, expected)


def test_a_cached_reference_of_states_is_the_live_one(tmp_path):
    model, dataset = lora(build("llama")), make_answers(3, 6)
    collator = own_answers(pad_to_multiple_of=8)
    reference = ReferenceCache.build(model, dataset, collator, tmp_path, loss=LOSS)
    assert len(reference) == 6  # retain rows
    batch = collator(list(dataset))
    live = unlearning_forward(model, LOSS, **batch)
    cached = unlearning_forward(model, LOSS, **batch, reference_logits=reference.logits(batch))
    torch.testing.assert_close(live.loss, cached.loss, rtol=1e-5, atol=1e-6)
    other = UnlearningLoss(alpha=1.0, beta=0.0, forget=RMU(layer=1), retain=StateDistance(layer=1))
    with pytest.raises(ValueError, match="holds the states of layer 0, where the loss reads the states of layer 1"):
        ReferenceCache.build(model, dataset, collator, tmp_path, loss=other)


def test_prompts_and_layers_give_no_states(tmp_path):
    rows = own_answers()(list(make_answers(2, 2)))
    with pytest.raises(ValueError, match=r"reads hidden states of layer 0 \(RMU\), which SoftPromptUnlearner"):
        make_unlearner(loss=LOSS)(**rows)
    with pytest.raises(ValueError, match="which SoftPromptUnlearner does not give"):
        UnlearningTrainer(make_unlearner(loss=LOSS), arguments(tmp_path), own_answers(), make_answers())
    with pytest.raises(ValueError, match="which UnlearningLayers does not give"):
        unlearning_forward(stirred(build("llama")), LOSS, **rows)
    for trainable in ("prompt", "layers"):
        with pytest.raises(ValueError, match=rf"trainable='{trainable}': RMU reads hidden states"):
            unlearning_method("RMU", trainable)


# ---- training ----


def test_the_layer_and_the_two_before_train_their_last_linear_maps():
    method = unlearning_method("RMU", layer=1)
    model = method.prepare(build("llama"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    adapter = unlearning_method("RMU", "lora", layer=1).prepare(build("gpt2"))
    places = {name.split(".lora_")[0] for name, p in adapter.named_parameters() if p.requires_grad}
    assert places == {f"base_model.model.transformer.h.{i}.mlp.c_proj" for i in (0, 1)}


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_one_batch_accumulated_batches_and_the_formula_make_the_same_step(tmp_path, trainable):
    method = unlearning_method("RMU", trainable, alpha=3.0, layer=0)
    loss = UnlearningLoss(alpha=3.0, beta=0.0, forget=LOSS.forget, retain=LOSS.retain)
    dataset, states = make_answers(7, 9), []
    for size, steps in ((16, 1), (4, 4)):
        torch.manual_seed(7)
        model = method.prepare(build("llama"))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **ONE_STEP}
        UnlearningTrainer(model, arguments(tmp_path, **settings), own_answers(), dataset, loss=loss).train()
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert_same(*states, rtol=0, atol=2e-6)

    torch.manual_seed(7)
    model, frozen = method.prepare(build("llama")), build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    plain_loss(own_answers()(list(dataset)), first_layer(model), first_layer(frozen)).backward()
    stepped = {name: before[name] - 1e-2 * p.grad for name, p in model.named_parameters() if name in before}
    assert any((stepped[name] - before[name]).abs().max() > 1e-5 for name in before)
    assert_same(states[0], stepped, rtol=1e-4, atol=1e-5)


def test_training_steers_forget_rows_and_keeps_retain_rows(tmp_path):
    method = unlearning_method("RMU", alpha=10.0, layer=1)
    model, frozen = method.prepare(build("llama")), build("llama")
    dataset, collator = make_answers(), method.collator(own_answers().tokenizer, [" x"], max_length=64)
    batch = collator(list(dataset))
    read, _ = unlearner_of(model).reads(1)

    def distance(rows):
        inputs = [batch[name][rows] for name in ("input_ids", "attention_mask")]
        states = read(*inputs, torch.zeros_like(inputs[0])[:, :1] + 2)
        return (states - method.loss.forget.control_vector(states.shape[-1])).norm(dim=-1).mean().item()

    before = distance(batch["is_forget"])
    settings = arguments(tmp_path, max_steps=30, learning_rate=3e-2)
    UnlearningTrainer(model, settings, collator, dataset, loss=method.loss).train()
    assert distance(batch["is_forget"]) < before
    assert torch.equal(model.lm_head.weight, frozen.lm_head.weight)
