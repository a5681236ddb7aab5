"""Prompts and rows beyond a base's positions: refused where the base would fail, as it is where it runs on."""

import pytest
import torch
from helpers import CONFIGS, SHAPE, build, build_unlearner
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BioGptConfig,
    BloomConfig,
    CodeGenConfig,
    GenerationConfig,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    RoFormerConfig,
    XGLMConfig,
)

from spul.models.causal_lm import fails_beyond_positions

SMALL = {"vocab_size": 120, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 96}
OTHERS = {
    "bart": BartConfig(vocab_size=120, d_model=32, decoder_layers=1, decoder_ffn_dim=48, max_position_embeddings=96),
    "biogpt": BioGptConfig(**SHAPE, intermediate_size=48),
    "bloom": BloomConfig(vocab_size=120, hidden_size=32, n_layer=1, n_head=4),
    "codegen": CodeGenConfig(**SMALL, rotary_dim=4),
    "gpt_bigcode": GPTBigCodeConfig(**SMALL),
    "gptj": GPTJConfig(**SMALL, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(
        vocab_size=120,
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        attention_types=[[["global"], 1]],
        max_position_embeddings=96,
    ),
    "roformer": RoFormerConfig(**SHAPE, intermediate_size=48, is_decoder=True),
    "xglm": XGLMConfig(
        vocab_size=120, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4, max_position_embeddings=96
    ),
}
MOST = {"suppress_tokens": [2], "do_sample": False, "pad_token_id": 0}  # no answer ends early


def ids_of(length):
    return torch.randint(3, 120, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3", "gpt_neox", *OTHERS])
def test_a_base_fails_beyond_its_positions_where_it_is_said_to(name):
    base = AutoModelForCausalLM.from_config(OTHERS[name]).eval() if name in OTHERS else build(name)
    with torch.no_grad():
        base(input_ids=ids_of(96))
        try:
            base(input_ids=ids_of(110))
        except (IndexError, RuntimeError):
            fails = True
        else:
            fails = False
    assert fails_beyond_positions(base) is fails


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_forwards_beyond_positions_that_are_looked_up_are_refused(family, prompt_type):
    unlearner, ids = build_unlearner(family, prompt_type), ids_of(92)
    embeds, mask = unlearner.word_embeddings(ids), torch.ones_like(ids)
    names = {"adapter_names": ["default"]}
    calls = [
        lambda: unlearner(input_ids=ids),
        lambda: unlearner(inputs_embeds=embeds),
        lambda: unlearner(input_ids=ids, **names),
        lambda: unlearner.embedding_logits(embeds, mask, torch.tensor([[91]])),
        lambda: unlearner.response_logits(ids, mask, torch.tensor([[91]])),
    ]
    for gradient in (True, False):
        for call in calls:
            with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match="exceed the model's 96 positions"):
                call()
    assert unlearner(input_ids=ids, adapter_names=["__base__"]).logits.shape[1] == 92
    assert unlearner(input_ids=ids[:, 1:]).logits.shape[1] >= 91


def test_pads_count_where_the_base_gives_them_positions():
    ids, mask = torch.cat([ids_of(60)] * 2), torch.ones(2, 94, dtype=torch.long)
    ids, mask[:, 60:] = torch.nn.functional.pad(ids, (0, 34)), 0
    opt, gpt2 = build_unlearner("opt"), build_unlearner("gpt2")
    assert opt(input_ids=ids, attention_mask=mask).logits.shape[1] >= 94
    with pytest.raises(ValueError, match="5 virtual tokens and 94 tokens exceed the model's 96 positions"):
        gpt2(input_ids=ids, attention_mask=mask)
    mask[1] = 1  # of a row without a prompt
    with torch.no_grad():
        assert gpt2(input_ids=ids, attention_mask=mask, adapter_names=["default", "__base__"]).logits.shape[1] == 94


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_base_that_computes_positions_runs_on_as_without_a_prompt(prompt_type):
    unlearner, ids = build_unlearner("llama", prompt_type), ids_of(92)
    assert unlearner(input_ids=ids, adapter_names=["default"]).logits.shape[1] == 92
    assert unlearner(input_ids=ids).logits.shape[1] >= 92
    assert unlearner.generate(ids[:, 4:], max_new_tokens=9, **MOST).shape == (1, 97)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_default_length_ends_at_the_last_position_and_a_given_one_beyond_it_is_refused(family, prompt_type):
    unlearner, ids = build_unlearner(family, prompt_type), ids_of(84)  # 5 virtual tokens leave 7 positions
    found = unlearner.generate(ids, **MOST)
    assert found.shape == (1, 91)
    assert unlearner.generate(ids, max_new_tokens=8, **MOST)[:, :91].tolist() == found.tolist()
    for given in ({"max_new_tokens": 9}, {"max_length": 93}, {"generation_config": GenerationConfig(max_length=93)}):
        with pytest.raises(ValueError, match="generate at most max_new_tokens=8"):
            unlearner.generate(ids, **given, **MOST)
    unlearner.get_base_model().generation_config.max_length = 96  # as a base may have it, which knows of no prompt
    assert unlearner.generate(ids, **MOST).tolist() == found.tolist()


def test_a_batch_ends_where_its_longest_row_does_which_pads_do_not_lengthen():
    unlearner, ids = build_unlearner("gpt2"), ids_of(84)
    batch, mask = torch.cat([ids, ids]), torch.ones(2, 84, dtype=torch.long)
    batch[1, :6] = mask[1, :6] = 0
    found = unlearner.generate(batch, attention_mask=mask, **MOST)
    assert found.shape == (2, 91)
    alone = unlearner.generate(batch[1:, 6:], max_new_tokens=7, **MOST)
    assert found[1, 6:].tolist() == alone[0].tolist()
    assert unlearner.generate(batch[1:], attention_mask=mask[1:], max_new_tokens=13, **MOST).shape == (1, 97)
