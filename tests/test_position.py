"""Prompts inside the rows, just before the message: each row has what it has alone, concatenated by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIGS, SHAPE, build, build_unlearner, make_batch, prompt_gradients
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from plain import continued, losses, plain_batch, real_rows, row_logits
from transformers import Gemma2Config, Gemma2ForCausalLM

from spul import SoftPromptUnlearner, SpulConfig, UnlearningLoss
from spul.losses.preference import NPO

KINDS = ("prompt_tuning", "p_tuning")
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
# Of rows of 12, 9, 5, 7 and 10 tokens: in the middle, at the start, behind the first, before the last, behind all.
BEFORE = torch.tensor([7, 0, 1, 6, 10])
BEFORE_RESPONSE = torch.tensor([7, 0, 1, 6, 6])
NAMES = ["short", "__base__", "default", "long", "short"]


def inside(base, prompt_type="prompt_tuning", p=4, **kwargs):
    dtype = next(base.parameters()).dtype
    torch.manual_seed(1)
    return SoftPromptUnlearner(base, CONFIGS[prompt_type](p), prompt_position="message", **kwargs).to(dtype).eval()


def several(base, prompt_type="prompt_tuning"):
    """Three prompts of different lengths, of which *long* stands at the start."""
    unlearner = inside(base, prompt_type)
    unlearner.add_adapter("short", CONFIGS[prompt_type](2), prompt_position="message")
    unlearner.add_adapter("long", CONFIGS[prompt_type](9))
    return unlearner.to(next(base.parameters()).dtype).eval()


def gemma2():
    torch.manual_seed(0)
    shape = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5}
    return Gemma2ForCausalLM(Gemma2Config(**shape)).eval()


def plain_row(unlearner, name, ids, before):
    if name == "__base__":
        return row_logits(unlearner, ids, prompted=False)
    active = unlearner.active_adapter
    unlearner.set_adapter(name)
    try:
        return row_logits(unlearner, ids, before=0 if name == "long" else before)
    finally:
        unlearner.set_adapter(active)


def by_hand(unlearner, name, ids, before):
    return continued(lambda ids: plain_row(unlearner, name, ids, before), ids)


# ---- logits ----


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", KINDS)
def test_a_forward_gives_each_row_the_logits_that_it_has_alone(family, prompt_type, side):
    unlearner, batch = inside(build(family), prompt_type), plain_batch(side)
    with torch.no_grad():
        out = unlearner(**batch, prompt_position=BEFORE)
        assert out.logits.shape[:2] == batch["input_ids"].shape
        for before, ids, mask, logits in zip(
            BEFORE.tolist(), real_rows(batch), batch["attention_mask"], out.logits, strict=True
        ):
            expected = row_logits(unlearner, ids, before=before)
            torch.testing.assert_close(logits[mask.bool()], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("base", [gemma2, lambda: build("gemma3", sliding_window=6), lambda: build("mistral")])
def test_windows_shorter_than_what_stands_before_the_prompt_see_what_they_see_in_a_row_alone(base, side):
    unlearner, batch = inside(base()), plain_batch(side)
    found = unlearner.generate(**batch, prompt_position=BEFORE, **GREEDY)
    with torch.no_grad():
        out = unlearner(**batch, prompt_position=BEFORE)
        parts = zip(BEFORE.tolist(), real_rows(batch), batch["attention_mask"], out.logits, found, strict=True)
        for before, ids, mask, logits, new in parts:
            expected = row_logits(unlearner, ids, before=before)
            torch.testing.assert_close(logits[mask.bool()], expected, rtol=1e-4, atol=1e-4)
            assert new[batch["input_ids"].shape[1] :].tolist() == by_hand(unlearner, "default", ids, before)


def test_the_loss_of_a_forward_with_labels_is_that_of_the_rows_alone():
    unlearner, batch = inside(build("llama", torch.float64)), make_batch()
    del batch["is_forget"]
    nll = []
    with torch.no_grad():
        found = unlearner(**batch, prompt_position=BEFORE_RESPONSE).loss
        for before, ids, labels in zip(BEFORE_RESPONSE.tolist(), real_rows(batch), batch["labels"], strict=True):
            logits, labels = row_logits(unlearner, ids, before=before)[:-1], labels[1 : len(ids)]
            nll.append(F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none"))
    torch.testing.assert_close(found, torch.cat(nll).mean().float())  # transformers computes it in float32


def test_a_prompt_makes_another_difference_inside_than_at_the_start():
    """Else the tests above would hold of a prompt that stands at the start."""
    unlearner, batch = inside(build("llama")), plain_batch()
    with torch.no_grad():
        found = unlearner(**batch, prompt_position=BEFORE).logits
        start = unlearner(**batch, prompt_position=BEFORE * 0).logits
    assert (found - start)[0, 6:].abs().max() > 1e-2
    assert (found - start)[1, :9].abs().max() == 0  # stands at the start both times


# ---- training ----


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", KINDS)
def test_loss_and_gradient_of_a_training_batch_are_those_of_the_rows_alone(family, prompt_type, side):
    unlearner = inside(build(family, torch.float64), prompt_type)
    unlearner.train()
    batch = {**make_batch(side), "prompt_position": BEFORE_RESPONSE}
    out = unlearner(**batch)
    expected = losses(unlearner, batch)
    found = (out.loss, out.forget_loss, out.retain_loss, out.kl_loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one))
    gradients = prompt_gradients(unlearner, out.loss)
    assert gradients
    plain = prompt_gradients(unlearner, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name])


def test_retain_rows_without_weight_and_losses_of_text_take_the_rows_positions_along():
    base = build("llama", torch.float64)
    unlearner = inside(base, loss=UnlearningLoss(alpha=0.0, beta=0.0, gamma=0.5))
    batch = {**make_batch(is_forget=(0, 1, 0, 1, 1)), "prompt_position": BEFORE_RESPONSE}
    out, rows = unlearner(**batch), batch["is_forget"]
    alone = inside(base, loss=UnlearningLoss(alpha=1.0, beta=0.0, gamma=0.5))
    alone.load_state_dict(unlearner.state_dict())
    forget = {name: value[rows] for name, value in batch.items()}
    torch.testing.assert_close(out.lm_loss, alone(**forget).lm_loss)
    torch.testing.assert_close(out.forget_loss, losses(unlearner, batch)[1])
    none = unlearner(**{**batch, "is_forget": rows & False})
    none.loss.backward()
    assert none.loss.item() == 0


def test_gradient_checkpointing_changes_no_gradient():
    unlearner = inside(build("llama", torch.float64), loss=UnlearningLoss(beta=0.0, forget=NPO()))
    batch = {**make_batch(), "prompt_position": BEFORE_RESPONSE}
    unlearner.train()
    plain = prompt_gradients(unlearner, unlearner(**batch).loss)
    unlearner.get_base_model().gradient_checkpointing_enable()
    unlearner.enable_input_require_grads()
    found = prompt_gradients(unlearner, unlearner(**batch).loss)
    torch.testing.assert_close(found, plain)


# ---- generation ----


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", KINDS)
def test_each_row_is_continued_as_alone(family, prompt_type, side):
    unlearner, batch = inside(build(family), prompt_type), plain_batch(side)
    found = unlearner.generate(**batch, prompt_position=BEFORE, **GREEDY)
    width = batch["input_ids"].shape[1]
    assert torch.equal(found[:, :width], batch["input_ids"])
    for before, ids, out in zip(BEFORE.tolist(), real_rows(batch), found, strict=True):
        assert out[width:].tolist() == by_hand(unlearner, "default", ids, before)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_are_those_of_the_row_alone(settings):
    unlearner, batch = inside(build("llama")), plain_batch("left")
    found = unlearner.generate(**batch, prompt_position=BEFORE, **GREEDY, **settings)
    width, returned = batch["input_ids"].shape[1], settings.get("num_return_sequences", 1)
    for before, ids, out in zip(BEFORE, real_rows(batch), found.split(returned), strict=True):
        alone = unlearner.generate(ids[None], prompt_position=before[None], **GREEDY, **settings)
        assert out[:, width:].tolist() == alone[:, len(ids) :].tolist()


def test_samples_of_a_row_are_drawn_from_its_own_distribution():
    unlearner, ids = inside(build("llama")), torch.randint(5, 120, (1, 6))
    sampled = {**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 3}  # the likeliest, every time
    found = unlearner.generate(ids.repeat(2, 1), prompt_position=torch.tensor([4, 0]), **sampled)
    for row, before in enumerate((4, 0)):
        assert found[3 * row : 3 * row + 3, 6:].tolist() == [by_hand(unlearner, "default", ids[0], before)] * 3


# ---- several prompts ----


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", KINDS)
def test_prompts_of_other_lengths_and_positions_and_rows_without_one_share_a_batch(family, prompt_type, side):
    unlearner, batch = several(build(family), prompt_type), plain_batch(side)
    given = {**batch, "adapter_names": NAMES, "prompt_position": BEFORE}
    found, width = unlearner.generate(**given, **GREEDY), batch["input_ids"].shape[1]
    with torch.no_grad():
        out = unlearner(**given)
        rows = zip(NAMES, BEFORE.tolist(), real_rows(batch), batch["attention_mask"], out.logits, found, strict=True)
        for name, before, ids, mask, logits, new in rows:
            expected = plain_row(unlearner, name, ids, before)
            torch.testing.assert_close(logits[mask.bool()], expected, rtol=1e-4, atol=1e-4)
            assert new[width:].tolist() == by_hand(unlearner, name, ids, before), name


def test_a_prompt_at_the_start_reads_no_column_also_where_rows_run_in_groups():
    unlearner, batch = build_unlearner("mistral", "prefix_tuning", sliding_window=6).eval(), plain_batch()
    expected = unlearner.generate(**batch, **GREEDY)
    for column in ([1, 2], torch.tensor([0.5])):
        assert torch.equal(unlearner.generate(**batch, prompt_position=column, **GREEDY), expected)


def test_rows_whose_prompts_all_stand_at_the_start_need_no_positions():
    unlearner, batch = several(build("llama")), plain_batch()
    names = ["long", "__base__", "long", "long", "__base__"]
    with torch.no_grad():
        found = unlearner(**batch, adapter_names=names).logits
        torch.testing.assert_close(found, unlearner(**batch, adapter_names=names, prompt_position=BEFORE).logits)
    unlearner.set_adapter("long")
    torch.testing.assert_close(
        unlearner.generate(**batch, **GREEDY), unlearner.generate(**batch, prompt_position=BEFORE, **GREEDY)
    )


# ---- refused ----


def test_a_batch_that_does_not_say_where_is_refused_by_every_way_in():
    unlearner, batch = inside(build("llama")), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    positions, embeds = torch.zeros(5, 1, dtype=torch.long), unlearner.word_embeddings(batch["input_ids"])
    ways = {
        "training": lambda: unlearner(**batch),
        "forward": lambda: unlearner(**inputs),
        "generate": lambda: unlearner.generate(**inputs, **GREEDY),
        "logits": lambda: unlearner.response_logits(**inputs, positions=positions),
        "embeddings": lambda: unlearner.embedding_logits(embeds, batch["attention_mask"], positions),
        "by name": lambda: unlearner(**inputs, adapter_names=["__base__"] * 4 + ["default"]),
    }
    for name, call in ways.items():
        with pytest.raises(ValueError, match=r"prompt_position is missing.*ForgetRetainCollator"):
            pytest.fail(f"{name}: {call()}")


@pytest.mark.parametrize("column", [[1] * 5, torch.ones(5), torch.ones(4, dtype=torch.long), torch.ones(5) > 0])
def test_a_column_of_another_shape_or_type_is_refused(column):
    with pytest.raises(ValueError, match=r"prompt_position is a .*expected a tensor of whole numbers \(5,\)"):
        inside(build("llama"))(**plain_batch(), prompt_position=column)


@pytest.mark.parametrize("wrong", [-1, 6])
def test_a_position_outside_its_row_is_refused(wrong):
    unlearner, batch = inside(build("llama")), plain_batch("left")
    column = BEFORE.clone()
    column[2] = wrong  # of a row of 5 tokens, in a batch of 12
    for call in (unlearner, unlearner.generate):
        with pytest.raises(ValueError, match=rf"{wrong}.*expected for each row.*from 0 to all of them"):
            call(**batch, prompt_position=column)


@pytest.mark.parametrize("given", [{"output_hidden_states": True}, {"logits_to_keep": 1}, {"return_dict": False}])
def test_outputs_tied_to_columns_are_refused(given):
    with pytest.raises(ValueError, match="under a prompt inside the rows"):
        inside(build("llama"))(**plain_batch(), prompt_position=BEFORE, **given)


def test_a_disabled_prompt_needs_no_positions_and_ignores_them():
    unlearner, batch = inside(build("llama")), plain_batch("left")
    expected = unlearner.get_base_model()(**batch).logits
    with unlearner.disable_adapter():
        torch.testing.assert_close(unlearner(**batch).logits, expected)
        torch.testing.assert_close(unlearner(**batch, prompt_position=BEFORE).logits, expected)
        found = unlearner.generate(**batch, prompt_position=BEFORE, **GREEDY)
    assert torch.equal(found, unlearner.get_base_model().generate(**batch, **GREEDY))


def test_prefix_tuning_and_unknown_positions_are_refused_and_leave_the_base_as_it_was():
    base = build("llama")
    with pytest.raises(ValueError, match=r"cannot stand inside one\. Use PromptTuningConfig or PromptEncoderConfig"):
        SoftPromptUnlearner(base, CONFIGS["prefix_tuning"](), prompt_position="message")
    with pytest.raises(ValueError, match="prompt_position='end'; expected \"start\""):
        SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](), prompt_position="end")
    assert all(parameter.requires_grad for parameter in base.parameters())
    unlearner = build_unlearner()
    with pytest.raises(ValueError, match='expected "start"'):
        unlearner.add_adapter("other", CONFIGS["prompt_tuning"](), prompt_position=0)
    prefix = build_unlearner(prompt_type="prefix_tuning", dtype=torch.float32)
    prefix.spul_config.prompt_position = "message"
    with pytest.raises(ValueError, match="cannot stand inside"):
        prefix(**plain_batch(), prompt_position=BEFORE)


# ---- files ----


@pytest.mark.parametrize("prompt_type", KINDS)
def test_a_saved_prompt_stands_where_it_stood(prompt_type, tmp_path):
    unlearner, batch = inside(build("llama"), prompt_type), plain_batch("left")
    unlearner.save_pretrained(str(tmp_path))
    record = SpulConfig.load(tmp_path / "spul_config.json")
    assert record.prompt_position == "message"
    for is_trainable in (False, True):
        loaded = SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path, is_trainable=is_trainable)
        found = loaded.generate(**batch, prompt_position=BEFORE, **GREEDY)
        assert torch.equal(found, unlearner.generate(**batch, prompt_position=BEFORE, **GREEDY))
        with pytest.raises(ValueError, match="prompt_position is missing"):
            loaded.generate(**batch, **GREEDY)
    other = build_unlearner(prompt_type=prompt_type, dtype=torch.float32).eval()
    other.load_adapter(tmp_path, "other")
    named = {"adapter_names": ["other"] * 5, "prompt_position": BEFORE}
    assert torch.equal(found, other.generate(**batch, **named, **GREEDY))
    other.save_pretrained(str(tmp_path / "both"))
    assert SpulConfig.load(tmp_path / "both" / "other" / "spul_config.json").prompt_position == "message"
    assert "prompt_position" not in json.loads((tmp_path / "both" / "spul_config.json").read_text())


def test_plain_peft_refuses_a_prompt_inside_the_rows_and_says_why(tmp_path):
    inside(build("llama")).save_pretrained(str(tmp_path))
    plain = build_unlearner(dtype=torch.float32)
    ways = (
        lambda: PeftModel.from_pretrained(build("llama"), tmp_path),
        lambda: PeftConfig.from_pretrained(tmp_path),
        lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        lambda: PeftModel.load_adapter(plain, tmp_path, "other"),
        lambda: build("llama").load_adapter(str(tmp_path)),
    )
    for load in ways:
        with pytest.raises(KeyError, match=r"PROMPT_TUNING@message: load it by spul.SoftPromptUnlearner"):
            load()


def test_the_card_says_where_the_prompt_stands_and_that_peft_alone_refuses_it(tmp_path):
    inside(build("llama")).save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "- position: just before the last user message" in card
    assert "PEFT alone refuses it" in card
    assert "from peft import PeftModel" not in card


def test_files_that_disagree_on_the_position_are_refused(tmp_path):
    inside(build("llama")).save_pretrained(str(tmp_path))
    config, record = tmp_path / "adapter_config.json", tmp_path / "spul_config.json"
    whole = config.read_text()
    config.write_text(json.dumps({**json.loads(whole), "peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ValueError, match=r"stands at 'start' by its adapter_config.json, and at 'message'"):
        SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path)
    config.write_text(whole)
    record.rename(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"stands at 'message' by its adapter_config.json, and at 'start'"):
        SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path)
    record.write_text('{"prompt_position": "end"}')
    with pytest.raises(ValueError, match='prompt_position is \'end\'; expected "start" or "message"'):
        SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path)
    config.write_text(json.dumps({**json.loads(whole), "peft_type": "PREFIX_TUNING@message", "num_layers": 2}))
    with pytest.raises(ValueError, match="cannot stand inside one"):
        SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path)


def test_a_trainable_prompt_takes_no_state_of_one_that_stands_elsewhere(tmp_path):
    inside(build("llama"), p=5).save_pretrained(str(tmp_path))
    unlearner = build_unlearner(dtype=torch.float32)
    with pytest.raises(ValueError, match="stands at 'message', and 'default' in this model at 'start'"):
        unlearner.load_adapter(tmp_path, "default")
    same = inside(build("llama"), p=5)
    same.load_adapter(tmp_path, "default", is_trainable=True)
    assert same.spul_config.prompt_position == "message"


def test_a_copy_on_another_base_stands_where_it_stood(tmp_path):
    unlearner = several(build("llama"))
    moved = unlearner.on_base(build("llama"), tmp_path, all_prompts=True)
    positions = {name: record.prompt_position for name, record in moved.spul_configs.items()}
    assert positions == {"default": "message", "short": "message", "long": "start"}
    assert unlearner.adapter_settings()["default"]["prompt_position"] == "message"
