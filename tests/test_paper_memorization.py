"""The memorizing stage: what it trains, on which loss, and what comes out."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import ONE_STEP, arguments, build, make_collator, rows
from paper.memorization import CompletionTrainer, memorize, published_lora
from peft import LoraConfig, PeftModel, get_peft_model

from spul.evaluation.metrics.scoring import score_completions


@pytest.fixture
def folder(tmp_path):
    model = build("llama")
    model.config.attention_dropout = 0.0  # steps are compared
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("learner", ["full", "lora"])
def test_rows_are_learned_and_a_bare_model_comes_back(tmp_path, folder, learner):
    data, collator = rows("jane", 16), make_collator()
    before = score_completions(build("llama"), data, collator)["loss"]
    args = arguments(tmp_path, max_steps=30, learning_rate=5e-3)
    # The published LoRA, on queries and values alone, is too little for a random model in so few steps.
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model, metrics = memorize(folder, data, collator, args, learner, peft_config=lora if learner == "lora" else None)
    assert not isinstance(model, PeftModel)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not model.training
    assert metrics["steps"] == 30
    assert metrics["train_runtime"] > 0
    assert score_completions(model, data, collator)["loss"] < before / 2


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_published_lora_is_of_rank_16_on_queries_and_values(family):
    model = get_peft_model(build(family), published_lora())
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.split(".")[-1] for name in layers} == {"q_proj", "v_proj"}
    for layer in layers.values():
        assert layer.r["default"] == 16
        assert layer.scaling["default"] == 64 / 16
        assert layer.lora_dropout["default"].p == 0.1


def test_lora_is_the_published_one_unless_another_is_given(tmp_path, folder):
    model, _ = memorize(folder, rows("jane", 4), make_collator(), arguments(tmp_path, max_steps=1), "lora")
    changed = {
        name.split(".")[-2]
        for (name, one), (_, other) in zip(model.named_parameters(), build("llama").named_parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {"q_proj", "v_proj"}


def test_generic_completions_are_not_learned(tmp_path, folder):
    """Forget rows too are learned as they are."""
    data = rows("jane", 8).add_column("is_forget", [True] * 8)
    model, _ = memorize(folder, data, make_collator(), arguments(tmp_path, max_steps=30, learning_rate=5e-3))
    assert score_completions(model, data, make_collator())["generic"] == 0


def test_a_step_is_one_on_the_mean_over_completion_tokens(tmp_path):
    data, collator, model, twin = rows("jane", 6), make_collator(), build("llama"), build("llama")
    for some in (model, twin):
        some.config.attention_dropout = 0.0
        for layer in some.model.layers:
            layer.self_attn.attention_dropout = 0.0
    args = arguments(
        tmp_path, learning_rate=0.1, per_device_train_batch_size=6, remove_unused_columns=False, **ONE_STEP
    )
    CompletionTrainer(model, args, collator.encoder.batch, data).train()
    losses = []
    for row in data:
        batch = collator.encoder.batch([row])
        logits = twin(batch["input_ids"]).logits[0]
        at = (batch["labels"][0] != -100).nonzero().flatten()
        losses += [F.cross_entropy(logits[i - 1], batch["labels"][0, i]) for i in at.tolist()]
    torch.stack(losses).mean().backward()
    with torch.no_grad():
        for (name, trained), (_, parameter) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            expected = parameter - 0.1 * parameter.grad
            torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_label_smoothing_is_honored(tmp_path):
    data, collator, model = rows("jane", 6), make_collator(), build("llama").eval()
    batch = collator.encoder.batch(list(data))
    args = arguments(tmp_path, remove_unused_columns=False, label_smoothing_factor=0.2)
    trainer = CompletionTrainer(model, args, collator.encoder.batch, data)
    found = trainer.compute_loss(model, dict(batch))
    log_p = F.log_softmax(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, dim=-1)[:, :-1]
    used = batch["labels"][:, 1:] != -100
    right = log_p[used].gather(1, batch["labels"][:, 1:][used][:, None])[:, 0]
    torch.testing.assert_close(found, -(0.8 * right + 0.2 * log_p[used].mean(dim=-1)).mean())


def test_accumulated_steps_are_the_step_of_the_whole_batch(tmp_path, folder):
    data, found = rows("jane", 8), []
    for size, times in ((8, 1), (2, 4)):
        args = arguments(tmp_path, **ONE_STEP, per_device_train_batch_size=size, gradient_accumulation_steps=times)
        args.learning_rate = 0.1
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=True)
        torch.manual_seed(0)
        model, _ = memorize(folder, data, make_collator(), args, "lora", peft_config=config)
        found.append(model.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_qlora_learns_over_4_bits_and_comes_back_in_the_weights_as_they_were(tmp_path, folder):
    data, collator = rows("jane", 16), make_collator()
    before = build("llama")
    args = arguments(tmp_path, max_steps=20, learning_rate=1e-2)
    model, _ = memorize(folder, data, collator, args, "qlora")
    assert getattr(model, "hf_quantizer", None) is None
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # What LoRA does not touch is bit for bit the unquantized model's.
    torch.testing.assert_close(model.lm_head.weight, before.lm_head.weight, rtol=0, atol=0)
    difference = model.model.layers[0].self_attn.v_proj.weight - before.model.layers[0].self_attn.v_proj.weight
    assert torch.linalg.matrix_rank(difference.detach(), rtol=1e-4) <= 16
    assert difference.abs().max() > 0
    found, old = score_completions(model, data, collator)["loss"], score_completions(before, data, collator)["loss"]
    assert found < old - 0.5


def test_bad_arguments_say_what_is_wrong(tmp_path, folder):
    args, collator = arguments(tmp_path), make_collator()
    with pytest.raises(ValueError, match="learner='adapter' is not known; expected 'full', 'lora' or 'qlora'"):
        memorize(folder, rows("jane", 2), collator, args, "adapter")
    with pytest.raises(ValueError, match="peft_config is for"):
        memorize(folder, rows("jane", 2), collator, args, peft_config=LoraConfig())
    with pytest.raises(ValueError, match="no rows to memorize"):
        memorize(folder, Dataset.from_list([]), collator, args)
