"""Last-layer embeddings are what the model itself computes where it is about to answer."""

import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, build, make_collator, make_tokenizer, rows
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from spul import SoftPromptUnlearner
from spul.data import batching as batches
from spul.evaluation.metrics import response_embeddings
from spul.evaluation.metrics.scoring import DivergedError, with_adapter_names
from spul.gates import GatedUnlearner


def last_states(base, **inputs):
    """The last token's final hidden state, one row, nothing padded."""
    return base.base_model(**inputs).last_hidden_state[0, -1]


def prompts(data, collator):
    return [torch.tensor(collator.encoder.encode(row).prompt_ids)[None] for row in data]


def test_of_a_bare_model(family):
    model, data, collator = build(family), rows("jane", 5), make_collator()
    found = response_embeddings(model, data, collator.encoder, batch_size=2)
    with torch.no_grad():
        expected = torch.stack([last_states(model, input_ids=ids) for ids in prompts(data, collator)])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_of_a_prompted_model_and_of_the_same_detached(prompt_type):
    torch.manual_seed(0)
    unlearner = SoftPromptUnlearner(build("llama"), CONFIGS[prompt_type](4))
    base, data, collator = unlearner.get_base_model(), rows("jane", 5), make_collator()
    found = response_embeddings(unlearner, data, collator.encoder, batch_size=2)
    expected = []
    with torch.no_grad():
        for ids in prompts(data, collator):
            prompt = unlearner.get_prompt(batch_size=1)
            if prompt_type == "prefix_tuning":
                assert isinstance(prompt, DynamicCache)
                expected.append(last_states(base, input_ids=ids, past_key_values=prompt))
            else:
                embeds = torch.cat([prompt, unlearner.word_embeddings(ids)], dim=1)
                expected.append(last_states(base, inputs_embeds=embeds))
    torch.testing.assert_close(torch.from_numpy(found), torch.stack(expected), rtol=1e-4, atol=1e-5)
    with unlearner.disable_adapter():
        detached = response_embeddings(unlearner, data, collator.encoder)
    torch.testing.assert_close(detached, response_embeddings(base, data, collator.encoder), rtol=1e-5, atol=1e-6)
    assert abs(detached - found).max() > 1e-3


def test_of_a_model_under_lora_and_without_moving_its_mode():
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build("opt"), config).train()
    data, collator = rows("jane", 3), make_collator()
    found = response_embeddings(model, data, collator.encoder)
    assert model.training
    model.eval()
    with torch.no_grad():
        expected = torch.stack([last_states(model.get_base_model(), input_ids=i) for i in prompts(data, collator)])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_like_length_go_together_and_long_ones_in_smaller_batches(monkeypatch):
    model, collator, widths = build("llama"), make_collator(), []
    texts = [word * num + " :" for word, num in zip("abcdefgh", (20, 2, 20, 3, 20, 3, 20, 2), strict=True)]
    data = Dataset.from_list([{"prompt": text, "completion": " positive"} for text in texts])
    with torch.no_grad():
        expected = torch.stack([last_states(model, input_ids=ids) for ids in prompts(data, collator)])
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(batches, "TOKENS_PER_ROW", 8)
    found = response_embeddings(model, data, collator.encoder, batch_size=8)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    assert all(rows * width <= 64 for rows, width in widths)
    assert [rows for rows, _ in widths] == [2, 2, 4]


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows is empty"):
        response_embeddings(build("llama"), rows("jane", 1).select([]), make_collator().encoder)


def test_a_model_that_has_diverged_raises():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(DivergedError, match="hidden states are NaN or infinite"):
        response_embeddings(model, rows("jane", 3), make_collator().encoder)


@pytest.mark.parametrize("by_gate", [True, False])
def test_rows_behind_virtual_tokens_of_several_numbers_are_refused_where_logits_are_at_all_positions(
    by_gate, monkeypatch
):
    monkeypatch.setattr("spul.models.causal_lm.selects_positions", lambda base: False)
    monkeypatch.setattr("spul.prompts.shared_prefix.shares_prefix", lambda base, num: False)
    model, data = SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](5)).eval(), rows("jane", 3)
    encoder = make_collator().encoder
    assert response_embeddings(model, data, encoder).shape == (3, 32)
    if by_gate:
        model = GatedUnlearner(model, make_tokenizer(), {"default": lambda texts: [True] * len(texts)}).eval()
    else:
        data = with_adapter_names(model, data, ["default", "__base__", "default"])
    with pytest.raises(ValueError, match="at virtual tokens of different numbers"):
        response_embeddings(model, data, encoder)
