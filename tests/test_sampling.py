"""Success of many tries: the formula against tries that were made, and generation's bare essentials."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, build, prompted, rows
from likelihoods import answer_collator, free_form, plain_logits

from spul.evaluation.attacks import sampled_answers, sampled_success


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_success_is_that_of_independent_tries(family, prompt_type):
    model, data, collator = prompted(family, prompt_type), free_form(4), answer_collator()
    found = sampled_success(model, data, collator.encoder, num_tries=7, temperature=0.5, batch_size=3)
    for row, share in zip(data, found, strict=True):
        encoded = collator.encoder.encode(row)
        logits = plain_logits(model, encoded.prompt_ids, encoded.completion_ids) / 0.5
        probability = 1.0
        for at, token in zip(logits, encoded.completion_ids, strict=True):
            probability *= float(at.softmax(-1)[token])
        np.testing.assert_allclose(share, 1 - (1 - probability) ** 7, rtol=1e-6, atol=1e-15)


def test_certain_and_impossible_answers_are_found_always_and_never():
    model, collator = build("llama", torch.float64), answer_collator()
    data = rows("jane", 1)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    tokens = len(collator.encoder.completion_ids(data[0]["completion"]))
    (share,) = sampled_success(model, data, collator.encoder, num_tries=3)
    assert share == pytest.approx(1 - (1 - 120.0**-tokens) ** 3)
    prompt = collator.encoder.encode(data[0]).prompt_ids
    top = int(plain_logits(prompted(), prompt, [5])[0].argmax())
    for token, expected in ((top, 1.0), ((top + 1) % 120, 0.0)):
        row = {"input_ids": [*prompt, token], "completion_mask": [0] * len(prompt) + [1]}
        (share,) = sampled_success(prompted(), Dataset.from_list([row]), collator.encoder, 10, temperature=1e-4)
        assert share == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_drawn_first_tokens_have_the_probabilities_of_the_model(prompt_type):
    """At a low temperature few tokens share the mass; their frequencies are the softmax of the twin's logits."""
    model, data, collator = prompted("llama", prompt_type, dtype=torch.float32), rows("jane", 1), answer_collator()
    model.get_base_model().generation_config.top_k = 1  # a setting of the model's own, which does not count
    prompt = collator.encoder.encode(data[0]).prompt_ids
    expected = (plain_logits(model, prompt, [5])[0] / 2.0).softmax(-1)
    (answers,) = sampled_answers(model, data, collator.encoder, 600, temperature=2.0, max_new_tokens=1, batch_size=600)
    assert len(answers) == 600
    texts = [collator.tokenizer.decode([token], skip_special_tokens=True) for token in range(120)]
    top = int(expected.argmax())
    share = sum(answer == texts[top] for answer in answers) / 600
    probability = sum(float(expected[token]) for token in range(120) if texts[token] == texts[top])
    assert abs(share - probability) < 4 * (probability * (1 - probability) / 600) ** 0.5 + 1e-9
    assert len(set(answers)) > 5


def test_draws_are_seeded_and_leave_the_global_generator_alone():
    model, data, collator = prompted(dtype=torch.float32), rows("jane", 2), answer_collator()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = sampled_answers(model, data, collator.encoder, 5, max_new_tokens=4, batch_size=2)
    assert torch.equal(torch.rand(1), expected)
    assert [len(answers) for answers in first] == [5, 5]
    assert first == sampled_answers(model, data, collator.encoder, 5, max_new_tokens=4, batch_size=2)
    assert first != sampled_answers(model, data, collator.encoder, 5, max_new_tokens=4, batch_size=2, seed=1)
    assert len(set(first[0])) > 1


def test_bad_numbers_raise():
    for call in (sampled_success, sampled_answers):
        for num in (0, 2.5, True):
            with pytest.raises(ValueError, match=f"num_tries={num}, .* expected a whole number of at least 1"):
                call(build("llama"), rows("jane", 1), answer_collator(), num)
        for temperature in (0.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"temperature={temperature}; expected .* above 0"):
                call(build("llama"), rows("jane", 1), answer_collator(), 1, temperature=temperature)
