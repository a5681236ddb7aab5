"""The start of a fresh prompt: near the vocabulary or an instruction, the same in every kind, and as a seed says."""

import pytest
import torch
from helpers import CONFIGS, build, make_batch, make_tokenizer
from peft import (
    CartridgeConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from spul import SoftPromptUnlearner
from spul.prompts import InstructionStart
from spul.prompts.starts import start_prompt

TEXT = "decline to answer about jane doe"
KINDS = {
    **CONFIGS,
    "lstm": lambda p=5: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=p, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "projection": lambda p=5: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=p, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": lambda p=5: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=p),
}
STATES = ("prefix_tuning", "projection", "cartridge")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def started(kind, family="llama", start=None, p=5, seed=1, dtype=torch.float64):
    base = build(family, dtype)
    torch.manual_seed(seed)
    return SoftPromptUnlearner(base, KINDS[kind](p), start=start).eval()


def instruction():
    return InstructionStart(TEXT, make_tokenizer())


def logits_of(unlearner, ids):
    with torch.no_grad():
        logits = unlearner(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, -ids.shape[1] :]


def test_behind_an_instruction_the_base_answers_as_behind_its_tokens(family, kind):
    p = 7
    unlearner, row = started(kind, family, instruction(), p), make_batch()["input_ids"][:1]
    ids = torch.tensor(instruction().token_ids(p))[None]
    with torch.no_grad():
        expected = build(family, torch.float64)(torch.cat([ids, row], dim=1)).logits[:, p:]
    # The prompt is in single precision, and an encoder is solved for it.
    torch.testing.assert_close(logits_of(unlearner, row), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", STATES)
def test_keys_and_values_of_an_instruction_are_those_that_the_base_computes(family, kind):
    p = 6
    unlearner = started(kind, family, instruction(), p)
    with torch.no_grad():
        cache = build(family, torch.float64)(torch.tensor(instruction().token_ids(p))[None], use_cache=True)
        ours = unlearner.get_prompt(batch_size=1)
    for found, expected in zip(ours.layers, cache.past_key_values.layers, strict=True):
        torch.testing.assert_close(found.keys.double(), expected.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_an_instruction_longer_than_the_sliding_window_is_what_rows_behind_its_tokens_see(family):
    base = build(family, torch.float64, sliding_window=4)
    p, row = 9, make_batch()["input_ids"][:1]
    ids = torch.tensor(instruction().token_ids(p))[None]
    with torch.no_grad():
        expected = base(torch.cat([ids, row], dim=1)).logits[:, p:]
    unlearner = SoftPromptUnlearner(base, KINDS["prefix_tuning"](p), start=instruction()).eval()
    torch.testing.assert_close(logits_of(unlearner, row), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["random", "vocabulary"])
def test_a_start_is_the_same_prompt_in_every_kind(kind, start):
    row, found = make_batch()["input_ids"][:1], []
    for one in ("prompt_tuning", kind):
        unlearner = started(one)
        torch.manual_seed(7)  # PEFT has drawn other numbers for each kind
        start_prompt(unlearner, "default", start)
        found.append(logits_of(unlearner, row))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_a_random_prompt_is_bos_and_alike_rows_of_the_vocabularys_spread_up_to_a_tenth(family):
    unlearner = started("prompt_tuning", family, p=60)
    first, *rows = unlearner.prompt_encoder["default"].embedding.weight
    vocabulary, rows = unlearner.word_embeddings(torch.arange(120)), torch.stack(rows)
    expected = min(vocabulary.std().item(), 0.1)
    assert rows.std().item() == pytest.approx(expected, rel=0.3)  # the shared part is one draw of 32 numbers
    assert rows.std(dim=0).square().mean().sqrt().item() == pytest.approx(0.6 * expected, rel=0.1)
    bos = unlearner.get_base_model().config.bos_token_id
    torch.testing.assert_close(first.double(), vocabulary[bos].double(), rtol=1e-5, atol=1e-6)


def test_a_base_without_bos_starts_as_random_rows_alone():
    base = build("llama")
    base.config.bos_token_id = None
    unlearner = SoftPromptUnlearner(base, CONFIGS["prompt_tuning"]())
    rows = unlearner.prompt_encoder["default"].embedding.weight
    assert torch.cdist(rows[:1], unlearner.word_embeddings.weight).min() > 0.1


def test_a_random_prompt_inside_the_rows_has_no_bos():
    unlearner = SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](), prompt_position="message")
    rows = unlearner.prompt_encoder["default"].embedding.weight
    assert torch.cdist(rows, unlearner.word_embeddings.weight).min() > 0.1


def test_a_vocabulary_start_is_made_of_the_vocabularys_rows():
    unlearner = started("prompt_tuning", start="vocabulary", dtype=torch.float32)
    rows = unlearner.prompt_encoder["default"].embedding.weight
    assert torch.cdist(rows, unlearner.word_embeddings.weight).min(dim=1).values.max() < 1e-3


@pytest.mark.parametrize("start", [None, "vocabulary", "peft", "instruction"])
def test_a_seed_gives_one_prompt_and_another_seed_another(kind, start):
    start = instruction() if start == "instruction" else start
    one, again, other = (
        started(kind, start=start, seed=seed).get_prompt_embedding_to_save("default") for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    is_given = isinstance(start, InstructionStart)
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-3) == is_given


def test_pefts_start_is_that_of_a_plain_peft_model(kind):
    ours = started(kind, start="peft", dtype=torch.float32)
    base = build("llama")
    torch.manual_seed(1)
    theirs = get_peft_model(base, KINDS[kind]())
    expected = theirs.prompt_encoder["default"].state_dict()
    found = ours.prompt_encoder["default"].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_default_is_pefts_for_p_tuning_and_random_for_the_others(kind):
    default = started(kind).get_prompt_embedding_to_save("default")
    expected = started(kind, start="peft" if kind in ("p_tuning", "lstm") else "random")
    assert torch.equal(default, expected.get_prompt_embedding_to_save("default"))


def test_options_of_pefts_config_are_honored_where_no_start_is_given():
    zero = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights="zero")
    assert not SoftPromptUnlearner(build("llama"), zero).prompt_encoder["default"].embedding.weight.any()
    sampled = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    unlearner = SoftPromptUnlearner(build("llama"), sampled)
    rows = unlearner.prompt_encoder["default"].embedding.weight
    assert torch.cdist(rows, unlearner.word_embeddings.weight).min(dim=1).values.max() < 1e-3
    for config, own in ((zero, "init_weights='zero'"), (sampled, "prompt_tuning_init='SAMPLE_VOCAB'")):
        with pytest.raises(ValueError, match=f"start='random', and {own} in the P.*; give one of the two"):
            SoftPromptUnlearner(build("llama"), config, start="random")


def test_an_instruction_is_cut_at_its_end_or_repeated_without_special_tokens():
    class Words:
        def __init__(self, ends=()):
            self.ends = list(ends)

        def __call__(self, text, add_special_tokens=True):
            words = [10 + len(word) for word in text.split()]
            return {"input_ids": [1, *words, *self.ends] if add_special_tokens else words}

    for ends in ([], [2], [2, 3]):  # T5's and some of LLaMA's tokenizers end every text
        start = InstructionStart("a bb ccc", Words(ends))
        assert start.token_ids(3) == [1, 11, 12]
        assert start.token_ids(8) == [1, 11, 12, 13, 11, 12, 13, 11]
    huge = InstructionStart("x", lambda text, add_special_tokens=True: {"input_ids": [500]})
    with pytest.raises(ValueError, match="token id 500, and the base has 120"):
        SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](), start=huge)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: InstructionStart("decline", "gpt2"), TypeError, "tokenizer is a str; expected the base's tokenizer"),
        (lambda: InstructionStart(" ", make_tokenizer()), ValueError, "expected an instruction, such as"),
        (lambda: InstructionStart(3, make_tokenizer()), TypeError, "text is a int"),
        (lambda: started("prompt_tuning", start="text"), ValueError, "start='text'; expected one of"),
        (lambda: started("prompt_tuning", start=4), TypeError, "start is a int; expected one of"),
        (
            lambda: started("p_tuning", start=instruction(), p=30),
            ValueError,
            "16 hidden numbers, too few .* 30 virtual",
        ),
    ],
)
def test_what_is_no_start_is_refused_with_what_would_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_prompt_that_is_added_later_starts_as_it_is_told(kind):
    unlearner, row = started(kind), make_batch()["input_ids"][:1]
    unlearner.add_adapter("second", KINDS[kind](), start=instruction())
    unlearner.set_adapter("second")
    torch.testing.assert_close(
        logits_of(unlearner, row), logits_of(started(kind, start=instruction()), row), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_starts_too(kind, dtype):
    unlearner = started(kind, start=instruction(), dtype=dtype)
    assert unlearner.get_prompt_embedding_to_save("default").isfinite().all()


def test_a_start_leaves_the_base_in_the_mode_it_was_in():
    base = build("llama").train()
    SoftPromptUnlearner(base, KINDS["prefix_tuning"](), start=instruction())
    assert all(module.training for module in base.modules())


# ---- cartridges ----


def test_a_cartridge_trains_all_but_its_frozen_virtual_tokens():
    unlearner = started("cartridge")
    unlearner(**make_batch()).loss.backward()
    grads = {name: p.grad is not None for name, p in unlearner.prompt_encoder["default"].named_parameters()}
    assert grads == {"frozen_embedding": False, "trainable_embedding": True}
    unlearner.set_adapter("default")
    assert not unlearner.prompt_encoder["default"].frozen_embedding.requires_grad


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_cartridge_is_saved_and_loaded_by_spul_and_by_plain_peft(tmp_path, frozen, is_trainable):
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=frozen)
    unlearner = SoftPromptUnlearner(build("llama"), config).eval()
    row = make_batch()["input_ids"][:1]
    expected = logits_of(unlearner, row)
    unlearner.save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_encoder.safetensors").exists()
    loaded = SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path, is_trainable=is_trainable)
    torch.testing.assert_close(logits_of(loaded.eval(), row), expected)
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(build("llama"), tmp_path).eval(), row), expected)
    with torch.no_grad():
        for parameter in unlearner.prompt_encoder.parameters():
            parameter.add_(1)
    unlearner.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits_of(unlearner, row), expected)


def test_a_cartridge_of_frozen_virtual_tokens_alone_is_refused():
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_frozen_tokens=3)
    with pytest.raises(ValueError, match="num_frozen_tokens=3, and num_virtual_tokens is as large"):
        SoftPromptUnlearner(build("llama"), config)


def test_a_base_that_caches_more_than_keys_and_values_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("spul.prompts.starts.compute_states", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="layers of LlamaForCausalLM cache more than keys and values"):
        SoftPromptUnlearner(build("llama"), CONFIGS["prefix_tuning"](4))
