"""SoftPromptUnlearner: its losses, logits and gradients against plain twins, and its contract."""

import copy
import pickle

import pytest
import torch
from helpers import (
    CONFIGS,
    LENGTHS,
    NUM_RESPONSE,
    SELECTS_POSITIONS,
    build,
    build_unlearner,
    make_batch,
    prompt_gradients,
)
from peft import (
    PeftModelForCausalLM,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from plain import losses as plain_losses
from plain import row_logits

from spul import SoftPromptUnlearner, UnlearningLoss
from spul.losses import KLDivergence
from spul.losses.positions import response_positions
from spul.prompts.row_prompts import RowPrompts


@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_and_gradients_equal_the_plain_row_by_row_twin(family, prompt_type, side):
    unlearner = build_unlearner(family, prompt_type)
    batch = make_batch(side)
    out = unlearner(**batch)
    expected = plain_losses(unlearner, batch)
    found = (out.loss, out.forget_loss, out.retain_loss, out.kl_loss)
    torch.testing.assert_close(
        torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-6
    )  # norms compute in float32
    ours, theirs = prompt_gradients(unlearner, out.loss), prompt_gradients(unlearner, expected[0])
    assert ours.keys() == theirs.keys()
    assert all(name.startswith("prompt_encoder") for name in ours)
    for name in ours:
        assert ours[name].abs().max() > 0
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_that_predict_the_response_tokens(family, prompt_type, side):
    unlearner, batch = build_unlearner(family, prompt_type), make_batch(side)
    out = unlearner(**batch)
    assert out.logits.shape == (5, 4, 120)
    for row, (length, num) in enumerate(zip(LENGTHS, NUM_RESPONSE, strict=True)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        expected = row_logits(unlearner, ids)[length - num - 1 : length - 1]
        torch.testing.assert_close(out.logits[row, :num], expected)
        assert out.response_labels[row].tolist() == [*ids[-num:].tolist(), *[-100] * (4 - num)]


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_both_directions_of_the_kl_equal_torchs(direction):
    unlearner = build_unlearner(loss=UnlearningLoss(alpha=0.5, beta=2.0, kl=KLDivergence(direction=direction)))
    batch = make_batch()
    expected = plain_losses(unlearner, batch, 0.5, 2.0, direction)
    out = unlearner(**batch)
    torch.testing.assert_close(torch.stack([out.loss, out.kl_loss]), torch.stack([expected[0], expected[3]]))


@pytest.mark.parametrize("window", [3, 6, 64])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_prompt_longer_than_the_sliding_window_equals_concatenation(family, window, prompt_type):
    unlearner = build_unlearner(family, prompt_type, p=8, sliding_window=window)
    batch = make_batch()
    positions, targets = response_positions(batch["labels"])
    shared = RowPrompts(unlearner, len(batch["input_ids"])).response_logits(
        batch["input_ids"], batch["attention_mask"], positions
    )
    for row, num in enumerate(NUM_RESPONSE):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        expected = row_logits(unlearner, ids)[len(ids) - num - 1 : len(ids) - 1]
        torch.testing.assert_close(shared[row, :num], expected)
    assert (targets != -100).sum() == sum(NUM_RESPONSE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_is_forget_it_is_pefts_forward(family, prompt_type, side):
    unlearner, batch = build_unlearner(family, prompt_type), make_batch("right")
    del batch["is_forget"]
    expected = PeftModelForCausalLM.forward(unlearner, **batch)
    given = make_batch(side)
    del given["is_forget"]
    out = unlearner(**given)
    assert not hasattr(out, "forget_loss")
    assert out.logits.shape == expected.logits.shape
    torch.testing.assert_close(out.loss, expected.loss)
    real, plain = given["attention_mask"].bool(), batch["attention_mask"].bool()
    width = real.shape[1]
    torch.testing.assert_close(out.logits[:, -width:][real], expected.logits[:, -width:][plain])


def test_an_absent_group_contributes_exactly_zero():
    unlearner = build_unlearner()
    only_forget = unlearner(**make_batch(is_forget=(1,) * 5))
    assert only_forget.retain_loss == 0
    assert only_forget.kl_loss == 0
    assert only_forget.loss == only_forget.forget_loss > 0
    only_retain = unlearner(**make_batch(is_forget=(0,) * 5))
    assert only_retain.forget_loss == 0
    torch.testing.assert_close(only_retain.loss, only_retain.retain_loss + 0.5 * only_retain.kl_loss)


class Counting:
    """Counts the rows that pass through a base's embedding layer."""

    def __init__(self, unlearner):
        self.batches = []
        unlearner.get_input_embeddings().register_forward_hook(lambda m, args, out: self.batches.append(len(out)))


@pytest.mark.parametrize(
    ("alpha", "beta", "rows"),
    # The prompted pass over the rows that matter, then the frozen one over retain rows if the KL matters.
    [(1.0, 0.5, [5, 3]), (1.0, 0.0, [5]), (0.0, 0.5, [5, 3]), (0.0, 0.0, [2])],
)
def test_a_weight_of_zero_computes_neither_pass_nor_rows(alpha, beta, rows):
    unlearner = build_unlearner(loss=UnlearningLoss(alpha=alpha, beta=beta))
    counting = Counting(unlearner)
    unlearner(**make_batch())  # earns the shared prefix
    counting.batches.clear()
    out = unlearner(**make_batch())
    assert counting.batches == rows
    expected = plain_losses(unlearner, make_batch(), alpha, beta)[0]
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()


def test_a_batch_without_rows_that_matter_still_goes_backward(prompt_type):
    unlearner = build_unlearner(prompt_type=prompt_type, loss=UnlearningLoss(alpha=0, beta=0))
    out = unlearner(**make_batch(is_forget=(0,) * 5))
    assert out.loss == 0
    out.loss.backward()
    grads = [p.grad for p in unlearner.parameters() if p.requires_grad]
    assert all(grad is not None and grad.abs().max() == 0 for grad in grads)


def test_accumulated_batches_with_group_counts_equal_the_whole_batch():
    unlearner, batch = build_unlearner(), make_batch()
    whole = prompt_gradients(unlearner, unlearner(**batch).loss)
    unlearner.zero_grad()
    total = 0.0
    for rows in ([0, 1], [2], [3, 4]):
        part = {key: value[rows] for key, value in batch.items()}
        loss = unlearner(**part, group_counts=torch.tensor([2.0, 3.0])).loss
        loss.backward()
        total += loss.item()
    torch.testing.assert_close(torch.tensor(total).double(), unlearner(**batch).loss.detach(), rtol=1e-6, atol=1e-6)
    for name, p in unlearner.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, whole[name])


def test_only_the_active_prompt_requires_gradients_also_after_train(family, prompt_type):
    unlearner = build_unlearner(family, prompt_type)
    unlearner.add_adapter("other", CONFIGS[prompt_type]())
    for mode, active in ((True, "default"), (False, "default"), (True, "other")):
        unlearner.set_adapter(active)
        unlearner.train(mode)
        wanted = {n for n, _ in unlearner.named_parameters() if n.startswith(f"prompt_encoder.{active}.")}
        assert {n for n, p in unlearner.named_parameters() if p.requires_grad} == wanted != set()


def test_training_mode_changes_nothing_since_dropout_is_zeroed(family):
    unlearner, batch = build_unlearner(family), make_batch()
    assert unlearner.train()(**batch).loss == unlearner(**batch).loss == unlearner.eval()(**batch).loss


def test_disable_adapter_gives_the_untouched_base(family, prompt_type):
    base = build(family, torch.float64)
    batch = make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    before = base(**inputs).logits
    wrote = base.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False)
    unlearner = SoftPromptUnlearner(base, CONFIGS[prompt_type]()).double()
    with unlearner.disable_adapter():
        torch.testing.assert_close(unlearner(**inputs).logits, before, rtol=0, atol=0)
        assert torch.equal(unlearner.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False), wrote)
        assert unlearner(**batch).kl_loss.abs() < 1e-12
    assert unlearner(**batch).kl_loss > 1e-3


@torch.no_grad()
def test_a_cached_prompt_is_in_front_of_embeddings_also_under_gradient_checkpointing():
    unlearner, batch = build_unlearner().eval(), make_batch()
    inputs = (batch["attention_mask"], torch.full((len(batch["input_ids"]), 1), 2))
    expected = unlearner.response_logits(batch["input_ids"], *inputs)  # and the prompt's states are cached
    unlearner.gradient_checkpointing_enable()
    unlearner.train()
    found = unlearner.embedding_logits(unlearner.word_embeddings(batch["input_ids"]), *inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_a_float32_prompt(family, prompt_type, dtype):
    base = build(family, dtype)
    unlearner = SoftPromptUnlearner(base, CONFIGS[prompt_type]())
    out = unlearner(**make_batch())
    out.loss.backward()
    prompts = [p for p in unlearner.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in prompts)
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("kind", ["autocast", "base"])
def test_bf16_stays_close_to_the_plain_twin_in_float32(family, prompt_type, kind):
    unlearner, batch = build_unlearner(family, prompt_type, torch.float32), make_batch()
    expected = plain_losses(unlearner, batch)
    gradients = prompt_gradients(unlearner, expected[0])
    if kind == "base":
        unlearner.get_base_model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        out = unlearner(**batch)
    for found, plain in zip((out.loss, out.forget_loss, out.retain_loss), expected[:3], strict=True):
        torch.testing.assert_close(found, plain, rtol=0.03, atol=0.03)
    for name, found in prompt_gradients(unlearner, out.loss).items():
        if gradients[name].norm() > 1e-3:
            likeness = torch.nn.functional.cosine_similarity(found.flatten(), gradients[name].flatten(), dim=0)
            assert likeness > 0.97, name


@pytest.mark.skipif(not SELECTS_POSITIONS, reason="transformers below 5.21 computes logits at all positions")
def test_logits_are_computed_at_the_response_positions_only(family, prompt_type):
    unlearner, batch = build_unlearner(family, prompt_type), make_batch()
    positions = []
    head = unlearner.get_base_model().get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: positions.append(args[0].shape[:-1].numel()))
    unlearner(**batch)  # earns the shared prefix
    positions.clear()
    unlearner(**batch)
    # The prompt's own pass (one position), the batch, and the three retain rows of the reference; K is 4.
    passes = [] if prompt_type == "prefix_tuning" else [1]
    assert positions == [*passes, 5 * 4, 3 * 4]


def test_bf16_autocast_wraps_both_passes(family):
    unlearner = build_unlearner(family, dtype=torch.float32, loss=UnlearningLoss(beta=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        out = unlearner(**make_batch())
    with torch.autocast("cpu", torch.bfloat16), unlearner.disable_adapter():
        detached = unlearner(**make_batch())
    assert detached.kl_loss.abs() < 1e-6  # the same rounding in both passes, so no difference at all
    torch.testing.assert_close(out.loss.float(), unlearner(**make_batch()).loss, rtol=0.05, atol=0.05)


def test_published_parameter_counts_of_p_tuning():
    # OPT-1.3B: d 2048, p 30, hidden 128 -> 604K (DESIGN.md section 4).
    from peft import PromptEncoder

    config = PromptEncoderConfig(num_virtual_tokens=30, encoder_hidden_size=128, token_dim=2048)
    config.num_transformer_submodules = 1
    count = sum(p.numel() for p in PromptEncoder(config).parameters())
    assert count == 30 * 2048 + (2048 * 128 + 128) + (128 * 128 + 128) + (128 * 2048 + 2048)
    assert round(count / 1000) == 604


def test_families_without_a_plain_cache_are_concatenated(caplog):
    from transformers import MambaConfig, MambaForCausalLM

    from spul.models.causal_lm import warn_once

    warn_once.cache_clear()
    torch.manual_seed(0)
    base = MambaForCausalLM(MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=32, num_layers=2, num_attention_heads=1
    )
    unlearner, batch = SoftPromptUnlearner(base, config), make_batch()
    out = unlearner(**batch)
    torch.testing.assert_close(out.loss, plain_losses(unlearner, batch)[0], rtol=1e-4, atol=1e-4)
    out.loss.backward()
    assert "no plain key/value cache" in caplog.text
    unlearner.eval()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    ids = batch["input_ids"][:1]
    found, expected = unlearner.generate(ids, **settings), ids
    for _ in range(5):
        logits = row_logits(unlearner, expected[0])[-1]
        logits[2] = -torch.inf
        expected = torch.cat([expected, logits.argmax()[None, None]], dim=1)
    assert found.tolist() == expected.tolist()
    unequal = unlearner.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
    for row, out in zip(batch["input_ids"], unequal, strict=True):
        alone = unlearner.generate(row[row != 0][None], **settings)
        assert out[len(row) :].tolist() == alone[0, int((row != 0).sum()) :].tolist()


def test_models_that_cannot_select_positions_give_the_same_loss():
    from transformers import LlamaForCausalLM

    class Homemade(LlamaForCausalLM):
        def forward(
            self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, use_cache=None
        ):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )

    stock, homemade = build_unlearner(), build_unlearner()
    homemade.base_model.__class__ = Homemade
    torch.testing.assert_close(homemade(**make_batch()).loss, stock(**make_batch()).loss)


def test_inference_mode_and_deleting_keep_gradients_where_they_belong():
    unlearner = build_unlearner()
    unlearner.add_adapter("b", CONFIGS["prompt_tuning"]())
    unlearner.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in unlearner.parameters())
    unlearner.set_adapter("b")
    unlearner.delete_adapter("b")
    trained = [name for name, p in unlearner.named_parameters() if p.requires_grad]
    assert trained == ["prompt_encoder.default.embedding.weight"]


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_frozen_prompt_stays_frozen_whatever_becomes_of_others(copied, tmp_path):
    unlearner = build_unlearner()
    unlearner.save_pretrained(tmp_path)
    unlearner.set_adapter("default", inference_mode=True)
    unlearner = copied(unlearner)

    def trained():
        return {name.split(".")[1] for name, parameter in unlearner.named_parameters() if parameter.requires_grad}

    unlearner.add_adapter("added", CONFIGS["prompt_tuning"](3))
    assert not trained()
    unlearner.load_adapter(tmp_path, "loaded")
    unlearner.load_adapter(tmp_path, "default")
    assert not trained()
    unlearner.set_adapter("added")
    assert trained() == {"added"}
    unlearner.delete_adapter("added")  # the first one is active again
    assert unlearner.active_adapter == "default"
    assert not trained()
    unlearner.set_adapter("default")
    assert trained() == {"default"}


def test_a_name_is_not_frozen_any_more_once_its_prompt_is_deleted():
    unlearner = build_unlearner()
    unlearner.set_adapter("default", inference_mode=True)
    unlearner.delete_adapter("default")
    unlearner.add_adapter("default", CONFIGS["prompt_tuning"](3))
    assert all(parameter.requires_grad for parameter in unlearner.prompt_encoder.parameters())


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_once_all_prompts_are_deleted_the_next_may_be_of_another_kind(prompt_type, tmp_path):
    alone = build_unlearner("llama", prompt_type, torch.float32)
    alone.save_pretrained(str(tmp_path))
    first = "prefix_tuning" if prompt_type == "prompt_tuning" else "prompt_tuning"
    unlearner = build_unlearner("llama", first, torch.float32)
    unlearner.delete_adapter("default")
    unlearner.load_adapter(tmp_path, "next")
    with torch.no_grad():
        assert torch.equal(unlearner(**make_batch()).loss, alone(**make_batch()).loss)
    with pytest.raises(ValueError, match="one model holds prompts of one kind"):
        unlearner.add_adapter("other", CONFIGS[first](3))
    assert unlearner.peft_type == unlearner.active_peft_config.peft_type
    unlearner.delete_adapter("next")
    unlearner.add_adapter("first again", CONFIGS[first](3))
    unlearner(**make_batch()).loss.backward()


def test_an_unlearner_looks_like_no_wrapper_to_those_who_unwrap_models():
    """accelerate and transformers follow an attribute `module` to the model inside DDP."""
    from accelerate.utils import extract_model_from_parallel

    unlearner = build_unlearner()
    assert not hasattr(unlearner, "module")
    assert extract_model_from_parallel(unlearner, recursive=True) is unlearner
