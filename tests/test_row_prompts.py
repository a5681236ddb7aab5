"""Rows with prompts of their own in one batch: each has the logits and the answer that it has alone."""

import threading

import pytest
import torch
from helpers import CONFIGS, SHAPE, build, build_unlearner, make_batch
from plain import by_hand, plain_batch, plain_row, real_rows
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from spul import SoftPromptUnlearner
from spul.prompts.probe import continues_prefix
from spul.prompts.row_prompts import under
from spul.prompts.shared_prefix import prompt_states
from spul.prompts.states import MixedStates

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
NAMES = ["short", "__base__", "default", "long", "short"]


def several(base, prompt_type="prompt_tuning", dtype=torch.float32, **sizes):
    """Prompts of 4, 2 and 9 virtual tokens on one base, the first active."""
    torch.manual_seed(1)
    unlearner = SoftPromptUnlearner(base, CONFIGS[prompt_type](4)).to(dtype)
    for name, p in (sizes or {"short": 2, "long": 9}).items():
        unlearner.add_adapter(name, CONFIGS[prompt_type](p))
    return unlearner.to(dtype).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_forward_gives_each_row_the_logits_under_its_own_prompt(family, prompt_type, side):
    unlearner, batch = several(build(family), prompt_type), plain_batch(side)
    with torch.no_grad():
        out = unlearner(**batch, adapter_names=NAMES)
        assert out.logits.shape[:2] == batch["input_ids"].shape
        for name, ids, mask, logits in zip(NAMES, real_rows(batch), batch["attention_mask"], out.logits, strict=True):
            torch.testing.assert_close(logits[mask.bool()], plain_row(unlearner, name, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_each_row_is_continued_under_its_own_prompt(family, prompt_type, side):
    unlearner, batch = several(build(family), prompt_type), plain_batch(side)
    found = unlearner.generate(**batch, adapter_names=NAMES, **GREEDY)
    width = batch["input_ids"].shape[1]
    assert torch.equal(found[:, :width], batch["input_ids"])
    for name, ids, out in zip(NAMES, real_rows(batch), found, strict=True):
        assert out[width:].tolist() == by_hand(unlearner, name, ids), name


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_that_all_have_no_prompt_are_continued_as_alone(family, side):
    unlearner, batch = several(build(family)), plain_batch(side)
    found = unlearner.generate(**batch, adapter_names=["__base__"] * 5, **GREEDY)
    for ids, out in zip(real_rows(batch), found, strict=True):
        assert out[batch["input_ids"].shape[1] :].tolist() == by_hand(unlearner, "__base__", ids)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_beams_are_those_of_the_row_alone(family, prompt_type, settings):
    unlearner, batch = several(build(family), prompt_type), plain_batch("left")
    found = unlearner.generate(**batch, adapter_names=NAMES, **GREEDY, **settings)
    width, returned = batch["input_ids"].shape[1], settings.get("num_return_sequences", 1)
    for name, ids, out in zip(NAMES, real_rows(batch), found.split(returned), strict=True):
        alone = unlearner.generate(ids[None], adapter_names=[name], **GREEDY, **settings)
        assert out[:, width:].tolist() == alone[:, len(ids) :].tolist()


def test_a_sampled_batch_is_drawn_from_the_rows_own_distributions(family):
    """Row by row the same draws: one row of the batch at a time is of interest, the others stand beside it."""
    unlearner, ids = several(build(family)), torch.randint(5, 120, (1, 6))
    sampled = {**GREEDY, "do_sample": True, "top_k": 5, "num_return_sequences": 1}
    for name in ("short", "long", "__base__"):
        torch.manual_seed(3)
        alone = unlearner.generate(ids, adapter_names=[name], **sampled)
        torch.manual_seed(3)
        first = unlearner.generate(ids.repeat(3, 1), adapter_names=[name, "default", "__base__"], **sampled)
        torch.manual_seed(3)
        same = unlearner.generate(ids.repeat(3, 1), adapter_names=[name] * 3, **sampled)
        assert first[0].tolist() == same[0].tolist()
        assert alone.shape == first[:1].shape


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_one_name_for_all_rows_is_the_active_prompt_and_none_the_base(prompt_type):
    unlearner, batch = several(build("llama"), prompt_type), plain_batch()
    with torch.no_grad():
        named = unlearner(**batch, adapter_names=["default"] * 5).logits
        torch.testing.assert_close(named, unlearner(**batch).logits[:, -batch["input_ids"].shape[1] :])
        base = unlearner(**batch, adapter_names=["__base__"] * 5).logits
        torch.testing.assert_close(base, unlearner.get_base_model()(**batch).logits)
        with unlearner.disable_adapter():
            torch.testing.assert_close(unlearner(**batch, adapter_names=NAMES).logits, base)
    assert unlearner.active_adapter == "default"


@pytest.mark.parametrize("prompt_type", CONFIGS)
@pytest.mark.parametrize("window", [3, 6, 14])
@pytest.mark.parametrize("side", ["right", "left"])
def test_windows_shorter_than_a_prompt_see_what_they_see_in_a_row_alone(prompt_type, window, side):
    unlearner, batch = several(build("mistral", sliding_window=window), prompt_type), plain_batch(side)
    with torch.no_grad():
        out = unlearner(**batch, adapter_names=NAMES)
    width = batch["input_ids"].shape[1]
    found = unlearner.generate(**batch, adapter_names=NAMES, **GREEDY)
    rows = zip(NAMES, real_rows(batch), batch["attention_mask"], out.logits, found, strict=True)
    for name, ids, mask, logits, answer in rows:
        with torch.no_grad():
            one = unlearner(ids[None], adapter_names=[name]).logits[0]
            if prompt_type != "prefix_tuning":  # which the twin would give more than a window holds
                torch.testing.assert_close(one, plain_row(unlearner, name, ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[mask.bool()], one, rtol=1e-4, atol=1e-4)
        alone = unlearner.generate(ids[None], adapter_names=[name], **GREEDY)
        assert answer[width:].tolist() == alone[0, len(ids) :].tolist()


def test_chunked_attention_and_families_without_a_cache_are_right_by_concatenation():
    shape = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48}
    kinds = ["chunked_attention", "full_attention"]
    torch.manual_seed(0)
    chunked = Llama4ForCausalLM(Llama4TextConfig(**shape, attention_chunk_size=6, layer_types=kinds, moe_layers=[]))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4))
    for base in (chunked, mamba):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        extra = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 1}

        def config(p, extra=extra):
            config = CONFIGS["prompt_tuning"](p)
            for name, value in extra.items():
                setattr(config, name, value)
            return config

        unlearner, batch = SoftPromptUnlearner(base.eval(), config(4)), plain_batch("left")
        for name, p in (("short", 2), ("long", 9)):
            unlearner.add_adapter(name, config(p))
        unlearner.eval()
        found = unlearner.generate(**batch, adapter_names=NAMES, **GREEDY)
        with torch.no_grad():
            out = unlearner(**batch, adapter_names=NAMES)
        rows = zip(NAMES, real_rows(batch), batch["attention_mask"], out.logits, found, strict=True)
        for name, ids, mask, logits, answer in rows:
            torch.testing.assert_close(logits[mask.bool()], plain_row(unlearner, name, ids), rtol=1e-4, atol=1e-4)
            assert answer[batch["input_ids"].shape[1] :].tolist() == by_hand(unlearner, name, ids)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_where_pads_behind_a_prompt_count_as_distance_rows_beside_one_without_a_prompt_are_continued_as_alone(
    prompt_type,
):
    torch.manual_seed(0)
    config = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 96, "expansion_ratio": 2, "vocab_size": 120}
    base = MptForCausalLM(MptConfig(**config)).eval()
    unlearner, batch = several(base, prompt_type), plain_batch("left")
    prefix = prompt_states(under(unlearner, "long"))
    assert not continues_prefix(base, MixedStates([prefix, None], [0, 1]), unequal=True)
    found = unlearner.generate(**batch, adapter_names=NAMES, **GREEDY)
    for name, ids, out in zip(NAMES, real_rows(batch), found, strict=True):
        alone = unlearner.generate(ids[None], adapter_names=[name], **GREEDY)
        assert out[batch["input_ids"].shape[1] :].tolist() == alone[0, len(ids) :].tolist()


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_the_loss_of_labels_is_the_mean_over_the_rows_own_tokens(prompt_type):
    unlearner, batch = several(build("llama"), prompt_type, torch.float64), make_batch("left")
    del batch["is_forget"]
    found = unlearner(**batch, adapter_names=NAMES).loss
    nll, count = 0.0, 0
    for name, ids, mask, labels in zip(NAMES, real_rows(batch), batch["attention_mask"], batch["labels"], strict=True):
        own = labels[mask.bool()]
        log_probs = plain_row(unlearner, name, ids).log_softmax(-1)
        for i in range(1, len(own)):
            if own[i] != -100:
                nll, count = nll - log_probs[i - 1, own[i]], count + 1
    torch.testing.assert_close(found.double(), nll / count, rtol=1e-6, atol=1e-6)  # its own loss is in float32


def test_gradients_reach_each_prompt_from_its_own_rows():
    unlearner, batch = several(build("llama"), dtype=torch.float64), make_batch()
    del batch["is_forget"]
    for encoder in unlearner.prompt_encoder.values():
        encoder.requires_grad_(True)
    unlearner(**batch, adapter_names=["short", "short", "long", "__base__", "__base__"]).loss.backward()
    grads = {name: encoder.embedding.weight.grad for name, encoder in unlearner.prompt_encoder.items()}
    assert grads["default"] is None
    assert grads["short"].abs().min() > 0
    assert grads["long"].abs().min() > 0


def test_wrong_names_and_counts_are_refused_with_the_names_there_are():
    unlearner, batch = several(build("llama")), plain_batch()
    known = r"\['default', 'short', 'long', '__base__'\]"
    for run in (unlearner, unlearner.generate):
        with pytest.raises(ValueError, match=rf"holds \['joan'\].*its prompts are {known}"):
            run(**batch, adapter_names=["joan"] * 5)
        with pytest.raises(ValueError, match=rf"2 names for 5 rows; expected one for each, of {known}"):
            run(**batch, adapter_names=["short", "long"])
        for bad in ("short", [0, 1, 2, 3, 4], 5):
            with pytest.raises(TypeError, match=rf"one name for each row, of {known}"):
                run(**batch, adapter_names=bad)
        with unlearner.disable_adapter(), pytest.raises(ValueError, match=r"holds \['joan'\]"):
            run(**batch, adapter_names=["joan"] * 5)
    for option in ({"logits_to_keep": 1}, {"output_hidden_states": True}, {"return_dict": False}):
        with pytest.raises(ValueError, match=f"or under .*, takes input_ids.*{next(iter(option))}"):
            unlearner(**batch, adapter_names=NAMES, **option)
    with pytest.raises(ValueError, match="adapter_names has 5 names for 2 rows"):
        unlearner(batch["input_ids"][:2], adapter_names=NAMES)


def test_a_deleted_prompt_is_no_name_any_more_and_without_any_the_base_is_left():
    unlearner, batch = several(build("llama")), plain_batch()
    unlearner.delete_adapter("short")
    with pytest.raises(ValueError, match=r"holds \['short'\]"):
        unlearner(**batch, adapter_names=NAMES)
    for name in ("long", "default"):
        unlearner.delete_adapter(name)
    assert not unlearner.enabled
    base = unlearner.get_base_model()
    with torch.no_grad():
        torch.testing.assert_close(unlearner(**batch).logits, base(**batch).logits)
        torch.testing.assert_close(unlearner(**batch, adapter_names=["__base__"] * 5).logits, base(**batch).logits)
    assert torch.equal(unlearner.generate(**batch, **GREEDY), base.generate(**batch, **GREEDY))
    with pytest.raises(ValueError, match=r"its prompts are \['__base__'\]"):
        unlearner(**batch, adapter_names=["default"] * 5)


def test_a_view_under_another_prompt_leaves_the_active_one_to_other_threads():
    unlearner, batch = several(build("llama")), plain_batch()
    with torch.no_grad():
        expected = unlearner(**batch).logits
    seen, stop = [], threading.Event()

    def others():
        with torch.no_grad():
            while not stop.is_set():
                seen.append(unlearner(**batch).logits)

    thread = threading.Thread(target=others)
    thread.start()
    with torch.no_grad():
        for _ in range(20):
            unlearner(**batch, adapter_names=NAMES)
    stop.set()
    thread.join()
    assert seen
    assert all(torch.equal(one, expected) for one in seen)
    view = under(unlearner, "long")
    assert (view.active_adapter, unlearner.active_adapter) == ("long", "default")


def test_prompts_of_a_batch_are_cached_by_name():
    unlearner, batch = several(build("llama")), plain_batch()
    with unlearner.cached_prompts(), torch.no_grad():
        unlearner(**batch, adapter_names=NAMES)
        assert set(unlearner.__dict__["_cached_prompts"]) == {"short", "default", "long"}
    assert build_unlearner().active_adapter == "default"


def gemma2():
    """Its generation from left-padded rows differs from that of a row alone."""
    shape = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, **shape, sliding_window=6))


def gptj():
    """Its forward behind prefixes of different lengths differs from that of a row alone."""
    tokens = {key: SHAPE[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    return GPTJForCausalLM(GPTJConfig(**tokens, n_embd=32, n_layer=2, n_head=4, n_positions=96, rotary_dim=4))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("make", [gemma2, gptj])
def test_families_that_take_no_such_batch_run_it_in_groups(make, prompt_type, side):
    torch.manual_seed(0)
    base, batch = make(), plain_batch(side)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    unlearner = several(base.eval(), prompt_type)  # Gemma 2's own forward of padded rows is NaN in float64
    with torch.no_grad():
        out = unlearner(**batch, adapter_names=NAMES)
    for names in (NAMES, ["default"] * 5):
        found = unlearner.generate(**batch, adapter_names=names, **GREEDY)
        for name, ids, answer in zip(names, real_rows(batch), found, strict=True):
            assert answer[batch["input_ids"].shape[1] :].tolist() == by_hand(unlearner, name, ids)
    positions = torch.zeros(5, 1, dtype=torch.long)
    if side == "right":
        first = unlearner.response_logits(**batch, positions=positions, adapter_names=NAMES)[:, 0]
    for i, (name, ids, mask) in enumerate(zip(NAMES, real_rows(batch), batch["attention_mask"], strict=True)):
        expected = plain_row(unlearner, name, ids)
        torch.testing.assert_close(out.logits[i][mask.bool()], expected, rtol=1e-4, atol=1e-4)
        if side == "right":
            torch.testing.assert_close(first[i], expected[0], rtol=1e-4, atol=1e-4)


def test_rows_without_a_prompt_may_be_padded_on_the_right():
    unlearner, batch = several(build("llama")), plain_batch("right")
    found = unlearner.generate(**batch, adapter_names=["__base__"] * 5, **GREEDY)
    for ids, answer in zip(real_rows(batch), found, strict=True):
        assert answer[batch["input_ids"].shape[1] :].tolist() == by_hand(unlearner, "__base__", ids)
