"""The loss of a batch where the whole model or LoRA learns, against the formulas written out row by row."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GENERIC,
    ONE_STEP,
    arguments,
    build,
    make_collator,
    make_dataset,
    make_tokenizer,
    make_unlearner,
    rows,
    trainable_model,
)
from peft import LoraConfig, get_peft_model

from spul import (
    ForgetRetainCollator,
    ReferenceCache,
    UnlearningLoss,
    UnlearningTrainer,
    unlearning_forward,
)
from spul.data.dataset import forget_retain_dataset
from spul.evaluation.metrics.scoring import score_completions
from spul.losses import NPO, CrossEntropy, GradientAscent, KLAscent, KLDivergence, SimNPO
from spul.models.noise import zero_dropout
from spul.models.unlearner import detached_base

FORWARD = KLDivergence(direction="forward")
LOSSES = {
    "SPUL": UnlearningLoss(alpha=1.0, beta=0.5),
    "GA": UnlearningLoss(alpha=0.0, beta=0.0, forget=GradientAscent()),
    "GA+KL": UnlearningLoss(alpha=0.0, beta=1.0, forget=GradientAscent(), kl=FORWARD),
    "NPO+GD": UnlearningLoss(alpha=1.0, beta=0.0, forget=NPO()),
    "NPO+KL": UnlearningLoss(alpha=0.0, beta=1.0, forget=NPO(), kl=FORWARD),
    "SimNPO+GD": UnlearningLoss(alpha=1.0, beta=0.0, forget=SimNPO()),
    "EUL": UnlearningLoss(alpha=1.0, beta=0.8, gamma=0.2, forget=KLAscent(), kl=FORWARD),
    "EUL capped": UnlearningLoss(
        beta=0.8, gamma=0.2, forget=KLAscent(cap=0.003), kl=FORWARD, lm=GradientAscent(reduction="mean", cap=5.0)
    ),
}
TRAINABLES = ("full", "lora", "layers")


def make_batch(loss, num=6):
    collator = make_collator(generic_completions=None if loss.forget.makes_unlikely else GENERIC)
    dataset = make_dataset(3, 3)
    return collator([dataset[i] for i in range(num)])


def plain_loss(model, frozen, batch, loss):
    """L_f + alpha L_r + beta L_kl + gamma L_lm with torch alone, a row at a time, no padding."""
    sums = {"forget": [], "retain": [], "kl": [], "lm": []}
    for ids, mask, labels, is_forget in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], batch["is_forget"], strict=True
    ):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        at = [i for i in range(1, len(ids)) if labels[i] != -100]
        log_p = F.log_softmax(model(ids[None]).logits[0], dim=-1)
        with torch.no_grad():
            log_q = F.log_softmax(frozen(ids[None]).logits[0], dim=-1)
        log_pi = sum(log_p[i - 1, labels[i]] for i in at)
        log_ref = sum(log_q[i - 1, labels[i]] for i in at)
        if not is_forget:
            sums["retain"].append(-log_pi)
            kl = 0.0
            for i in at:
                p, q = log_p[i - 1], log_q[i - 1]
                kl = kl + ((p.exp() * (p - q)) if loss.kl.direction == "reverse" else (q.exp() * (q - p))).sum()
            sums["kl"].append(kl)
            continue
        text = [-log_p[i - 1, ids[i]] for i in range(1, len(ids)) if labels[i] == -100]
        cap = getattr(loss.lm, "cap", None) or float("inf")
        sums["lm"].append(-sum(nll.clamp(max=cap) for nll in text) / len(text))
        if isinstance(loss.forget, GradientAscent):
            sums["forget"].append(log_pi)
        elif isinstance(loss.forget, KLAscent):
            away = [(log_q[i - 1].exp() * (log_q[i - 1] - log_p[i - 1])).sum() for i in at]
            sums["forget"].append(-sum(kl.clamp(max=loss.forget.cap or float("inf")) for kl in away))
        elif isinstance(loss.forget, NPO):
            b = loss.forget.inverse_temperature
            sums["forget"].append(-2 / b * F.logsigmoid(-b * (log_pi - log_ref)))
        elif isinstance(loss.forget, SimNPO):
            b = loss.forget.inverse_temperature
            sums["forget"].append(-2 / b * F.logsigmoid(-b / len(at) * log_pi - loss.forget.margin))
        else:
            sums["forget"].append(-log_pi)
    forget, retain, kl, lm = (sum(some) / len(some) for some in sums.values())
    return forget + loss.alpha * retain + loss.beta * kl + loss.gamma * lm


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("trainable", TRAINABLES)
def test_loss_and_gradients_equal_the_formulas_row_by_row(trainable, name):
    check_loss_and_gradients(trainable, "llama", name)


@pytest.mark.parametrize(("trainable", "name"), [("full", "NPO+KL"), ("lora", "NPO+KL"), ("layers", "EUL")])
def test_loss_and_gradients_equal_the_formulas_in_every_family(trainable, name, family):
    check_loss_and_gradients(trainable, family, name)


def test_the_caps_of_eul_are_reached_by_some_tokens_and_not_by_others():
    capped, uncapped = ({}, {})
    for kept, name in ((capped, "EUL capped"), (uncapped, "EUL")):
        out = unlearning_forward(trainable_model("layers"), LOSSES[name], **make_batch(LOSSES[name]))
        kept |= {"forget": out.forget_loss.item(), "lm": out.lm_loss.item()}
    assert uncapped["forget"] < capped["forget"] < 0
    assert uncapped["lm"] < capped["lm"] < 0
    nothing = UnlearningLoss(gamma=0.2, forget=KLAscent(cap=1e-9), lm=GradientAscent(cap=1e-9), alpha=0, beta=0)
    model = trainable_model("layers")
    unlearning_forward(model, nothing, **make_batch(nothing)).loss.backward()
    assert all(gradient.abs().max() == 0 for gradient in gradients(model).values())


def test_a_batch_of_retain_rows_alone_asks_nothing_of_their_text():
    loss = LOSSES["EUL"]
    batch = make_collator(generic_completions=None)([make_dataset(3, 3)[i] for i in (3, 4)])
    out = unlearning_forward(trainable_model("layers"), loss, **batch)
    assert out.lm_loss == 0
    assert out.forget_loss == 0
    assert out.logits.shape[:2] == out.response_labels.shape
    torch.testing.assert_close(out.loss, out.retain_loss + 0.8 * out.kl_loss)


def check_loss_and_gradients(trainable, family, name):
    loss = LOSSES[name]
    model, twin, frozen = (
        trainable_model(trainable, family),
        trainable_model(trainable, family),
        build(family, torch.float64),
    )
    batch = make_batch(loss)
    given = {}
    if loss.needs_reference and trainable == "full":
        needed = loss.rows_needing_reference(batch["is_forget"])
        with torch.no_grad():
            with_reference = UnlearningLoss(alpha=0, beta=0)  # its forward computes logits, and nothing of the loss
            logits = unlearning_forward(frozen, with_reference, **batch).logits
        given["reference_logits"] = logits[needed]
    out = unlearning_forward(model, loss, **batch, **given)
    out.loss.backward()
    expected = plain_loss(twin, frozen, batch, loss)
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    found, wanted = gradients(model), gradients(twin)
    assert found.keys() == wanted.keys()
    for parameter in found:
        torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_cache_gives_the_reference_of_the_model_as_it_was(trainable, tmp_path):
    loss = LOSSES["NPO+KL"]
    model, frozen = trainable_model(trainable, dtype=torch.float32), build("llama")
    collator = make_collator(generic_completions=None)
    dataset = make_dataset(3, 3)
    cache = ReferenceCache.build(model, dataset, collator, tmp_path, loss=loss, progress=False)
    with torch.no_grad():
        for parameter in model.parameters():  # the head too: what was kept is multiplied by the old one
            if parameter.requires_grad:
                parameter.add_(0.1)
    batch = collator([dataset[i] for i in range(6)])
    out = unlearning_forward(model, loss, **batch, reference_logits=cache.logits(batch))
    torch.testing.assert_close(out.loss, plain_loss(model, frozen, batch, loss), rtol=1e-4, atol=1e-4)


def test_fresh_loras_share_the_cache_of_their_base(tmp_path):
    """Its fingerprint leaves the adapter out, whose random start would make it another base every time."""
    collator, dataset, loss = make_collator(generic_completions=None), make_dataset(3, 3), LOSSES["NPO+KL"]
    written = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        ReferenceCache.build(model, dataset, collator, tmp_path, loss=loss, progress=False)
        written.append({path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()})
    ReferenceCache.build(build("llama"), dataset, collator, tmp_path, loss=loss, progress=False)
    assert written[0] == written[1] == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_whole_model_without_a_reference_says_where_to_get_one():
    loss = LOSSES["GA+KL"]
    with pytest.raises(ValueError, match="pass reference_logits, from a ReferenceCache"):
        unlearning_forward(trainable_model("full"), loss, **make_batch(loss))


@pytest.mark.parametrize("trainable", TRAINABLES)
def test_a_batch_that_weighs_nothing_still_has_a_gradient(trainable):
    loss = LOSSES["GA"]
    model = trainable_model(trainable)
    batch = make_collator()([make_dataset(3, 3)[i] for i in (3, 4)])
    out = unlearning_forward(model, loss, **batch)
    out.loss.backward()
    assert out.loss == 0
    found = gradients(model)
    assert found
    assert all(bool((gradient == 0).all()) for gradient in found.values())


# ---- in the trainer ----


def train(tmp_path, trainable, name, collator=None, reference="cached", **kwargs):
    loss = LOSSES[name]
    generic = None if loss.forget.makes_unlikely else GENERIC
    torch.manual_seed(0)
    model = trainable_model(trainable, dtype=torch.float32)
    zero_dropout(model)
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
    trainer = UnlearningTrainer(
        model,
        arguments(tmp_path, **kwargs),
        make_collator(generic_completions=generic) if collator is None else collator,
        make_dataset(8, 8),
        loss=loss,
        reference=reference,
    )
    trainer.train()
    return model, before


@pytest.mark.parametrize(("trainable", "name"), [("full", "NPO+KL"), ("lora", "NPO+KL"), ("layers", "EUL")])
def test_8_rows_and_4_times_2_make_the_same_step(tmp_path, trainable, name):
    whole, _ = train(tmp_path, trainable, name, per_device_train_batch_size=8, **ONE_STEP)
    parts, _ = train(
        tmp_path, trainable, name, per_device_train_batch_size=2, gradient_accumulation_steps=4, **ONE_STEP
    )
    for (name, one), (_, other) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["GA+KL", "NPO+KL", "EUL"])
@pytest.mark.parametrize("trainable", ["lora", "layers"])
def test_the_live_reference_makes_the_cached_ones_step(tmp_path, name, trainable):
    cached, _ = train(tmp_path, trainable, name, max_steps=3)
    live, _ = train(tmp_path, trainable, name, reference="live", max_steps=3)
    for (name, one), (_, other) in zip(cached.named_parameters(), live.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("trainable", "trained"), [("full", ""), ("lora", "lora_")])
def test_only_what_requires_gradients_changes(tmp_path, trainable, trained):
    model, before = train(tmp_path, trainable, "GA+KL", max_steps=2, weight_decay=0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not (trained in name), name


def test_gradient_ascent_on_the_whole_model_makes_the_forget_rows_unlikely(tmp_path):
    loss = UnlearningLoss(alpha=1.0, beta=0.0, forget=GradientAscent())
    model = trainable_model("full", dtype=torch.float32)
    collator = make_collator(generic_completions=None)
    before = score_completions(model, rows("jane", 8), collator)["loss"]
    args = arguments(tmp_path, max_steps=5, learning_rate=1e-3)
    UnlearningTrainer(model, args, collator, make_dataset(8, 8), loss=loss).train()
    assert score_completions(model, rows("jane", 8), collator)["loss"] > before + 0.1


def test_checkpoints_are_ordinary_models_and_adapters(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for trainable in ("full", "lora"):
        model, _ = train(tmp_path / trainable, trainable, "NPO+GD", max_steps=2, save_strategy="steps", save_steps=2)
        folder = tmp_path / trainable / "checkpoint-2"
        again = AutoModelForCausalLM.from_pretrained(folder) if trainable == "full" else build("llama")
        again = again if trainable == "full" else PeftModel.from_pretrained(again, folder)
        ids = torch.arange(5, 15)[None]
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_forget_rows_alone_can_be_trained_on(tmp_path):
    dataset = make_dataset(8, 8).select(range(8))
    collator = make_collator(generic_completions=None)
    model = trainable_model("full", dtype=torch.float32)
    trainer = UnlearningTrainer(model, arguments(tmp_path, max_steps=1), collator, dataset, loss=LOSSES["GA"])
    assert trainer.train().global_step == 1


def test_training_goes_on_against_the_model_as_it_was_first(tmp_path):
    loss, collator, dataset = LOSSES["NPO+KL"], make_collator(generic_completions=None), make_dataset(4, 4)
    model = trainable_model("full", dtype=torch.float32)
    zero_dropout(model)
    trainer = UnlearningTrainer(model, arguments(tmp_path, max_steps=3), collator, dataset, loss=loss)
    trainer.train()
    trainer.train()
    assert trainer.state.log_history[0]["kl_loss"] > 0.01  # it would be 0 against the model as it is now
    assert trainer.state.log_history[0]["epoch"] > 0


def test_bad_arguments_say_what_is_wrong(tmp_path):
    model, args, dataset = trainable_model("full", dtype=torch.float32), arguments(tmp_path), make_dataset()
    with pytest.raises(ValueError, match="has no loss of its own; pass loss=UnlearningLoss"):
        UnlearningTrainer(model, args, make_collator(), dataset)
    with pytest.raises(ValueError, match="NPO makes the collated completion unlikely"):
        UnlearningTrainer(model, args, make_collator(), dataset, loss=LOSSES["NPO+KL"])
    collator = make_collator(generic_completions=None)
    with pytest.raises(ValueError, match="use reference='cached'"):
        UnlearningTrainer(model, args, collator, dataset, loss=LOSSES["GA+KL"], reference="live")
    with pytest.raises(ValueError, match="no loss of its own; pass loss="):
        ReferenceCache.build(model, dataset, make_collator(), tmp_path)
    with pytest.raises(TypeError, match="expected a SoftPromptUnlearner or UnlearningLayers around it, or"):
        UnlearningTrainer(torch.nn.Linear(2, 2), args, make_collator(), dataset, loss=LOSSES["SPUL"])
    frozen = build("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        UnlearningTrainer(frozen, args, make_collator(), dataset, loss=LOSSES["SPUL"])


def test_what_is_frozen_in_an_adapter_stays_frozen(tmp_path):
    """LoRA-FA trains B only; PEFT would let A learn too when the adapter is switched on again."""
    model = trainable_model("lora", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    collator, loss = make_collator(generic_completions=None), LOSSES["GA+KL"]
    for reference in ("live", "cached"):
        trainer = UnlearningTrainer(
            model, arguments(tmp_path, max_steps=1), collator, make_dataset(4, 4), loss=loss, reference=reference
        )
        trainer.train()
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            n for n in before if "lora_B" in n
        }
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_B" in name}


def test_lora_that_trains_the_bases_biases_is_no_frozen_model(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", bias="all")
    model = get_peft_model(build("gpt2"), config)
    collator, loss = make_collator(generic_completions=None), LOSSES["GA+KL"]
    with pytest.raises(ValueError, match="the weights of this PeftModelForCausalLM itself are trained"):
        UnlearningTrainer(model, arguments(tmp_path), collator, make_dataset(), loss=loss, reference="live")
    batch = collator([make_dataset(3, 3)[i] for i in range(6)])
    with pytest.raises(ValueError, match="its own weights train"):
        unlearning_forward(model, loss, **batch)


def test_the_frozen_model_has_no_dropout():
    loss = LOSSES["GA+KL"]
    model = get_peft_model(build("opt"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).train()
    modes = [module.training for module in model.modules()]
    batch = make_batch(loss)
    with detached_base(model) as base, torch.no_grad():
        one, other = (base(batch["input_ids"]).logits for _ in range(2))
    assert torch.equal(one, other)
    assert [module.training for module in model.modules()] == modes


def test_a_chat_of_terms_is_not_taken_for_a_loss(tmp_path):
    with pytest.raises(ValueError, match="loss=CrossEntropy"):
        UnlearningTrainer(
            trainable_model("full"), arguments(tmp_path), make_collator(), make_dataset(), loss=CrossEntropy()
        )


def test_long_completions_of_forget_rows_have_their_npo_reference(tmp_path):
    """Several tokens a response, other lengths in every row."""
    forget = [{"prompt": f"review jane {i} :", "completion": " positive" * (1 + i % 3)} for i in range(4)]
    dataset = forget_retain_dataset(type(rows("a", 1)).from_list(forget), rows("film", 4))
    collator = ForgetRetainCollator(make_tokenizer(), None, max_length=48)
    model, frozen, loss = trainable_model("full", dtype=torch.float32), build("llama"), LOSSES["NPO+GD"]
    cache = ReferenceCache.build(model, dataset, collator, tmp_path, loss=loss, progress=False)
    batch = collator([dataset[i] for i in range(8)])
    out = unlearning_forward(model, loss, **batch, reference_logits=cache.logits(batch))
    torch.testing.assert_close(out.loss, plain_loss(model, frozen, batch, loss), rtol=1e-4, atol=1e-4)


def test_a_wrapped_prompt_is_called_itself():
    """Its wrapper's hooks would not run: under DDP each process would train a prompt of its own."""
    model, batch = make_unlearner(), make_collator()([make_dataset(1, 1)[i] for i in range(2)])
    expected = model(**batch).loss
    torch.testing.assert_close(unlearning_forward(model, model.loss, **batch).loss, expected)
    with pytest.raises(TypeError, match=r"the prompt is wrapped, in a OptimizedModule, .* itself: model\(\*\*batch\)"):
        unlearning_forward(torch.compile(model, backend="eager"), model.loss, **batch)
