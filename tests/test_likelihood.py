"""Likelihoods of responses against slow float64 twins, row by row; the measures of them against cases by hand."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, build, prompted
from likelihoods import answer_collator, free_form, of, plain_likelihood, plain_logits
from peft import LoraConfig, PeftModel, get_peft_model

from spul.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    kl_to,
    probability,
    response_likelihoods,
    truth_ratio,
    truth_ratio_on_forget,
    truth_ratio_on_retain,
)


def assert_like_twin(model, found, rows, collator, rtol=1e-5):
    assert len(found) == len(rows)
    for row, likelihood in zip(rows, found, strict=True):
        expected = plain_likelihood(model, row, collator)
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(likelihood, name), values, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_bare_model_equal_the_twin_whatever_side_the_tokenizer_pads(family, side):
    model, rows, collator = build(family, torch.float64), free_form(), answer_collator()
    collator.tokenizer.padding_side = side
    assert_like_twin(model, response_likelihoods(model, rows, collator.encoder, batch_size=3), rows, collator)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_of_a_prompted_model_equal_the_twin(family, prompt_type):
    model, rows, collator = prompted(family, prompt_type), free_form(4), answer_collator(pad_to_multiple_of=8)
    found = response_likelihoods(model, rows, collator.encoder, batch_size=3)
    assert_like_twin(model, found, rows, collator)
    with model.disable_adapter():
        bare = response_likelihoods(model, rows, collator.encoder, batch_size=3)
    assert_like_twin(model.get_base_model(), bare, rows, collator)
    assert any(abs(a.log_probs - b.log_probs).max() > 1e-2 for a, b in zip(found, bare, strict=True))


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_of_a_plain_peft_model_equal_those_of_the_unlearner(tmp_path, prompt_type):
    model = prompted(prompt_type=prompt_type, dtype=torch.float32)
    model.save_pretrained(str(tmp_path))
    plain, rows, collator = PeftModel.from_pretrained(build("llama"), str(tmp_path)), free_form(), answer_collator()
    ours, theirs = (response_likelihoods(m, rows, collator.encoder, batch_size=3) for m in (model, plain))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-5)
    divergences = [np.stack(list(kl_to(m, rows, collator.encoder, batch_size=3).values())) for m in (model, plain)]
    np.testing.assert_allclose(*divergences, rtol=1e-3, atol=1e-6)
    assert divergences[0].min() > 1e-3


def test_greedy_tokens_are_recognized():
    """Answers that the model itself gives agree everywhere; the twin's cases above hardly ever do."""
    model, collator = prompted(), answer_collator()
    prompt = collator.encoder.encode({"prompt": "the film :", "completion": " x"}).prompt_ids
    answer = []
    for _ in range(4):
        answer.append(int(plain_logits(model, prompt, [*answer, 5])[-1].argmax()))
    tokenized = {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * 4}
    (found,) = response_likelihoods(model, Dataset.from_list([tokenized]), collator.encoder)
    assert found.is_greedy.tolist() == [True] * 4
    assert (extraction_strength([found])[0], exact_memorization([found])[0]) == (1.0, 1.0)


def test_modes_are_put_back_and_bad_rows_raise():
    model, rows = build("opt"), free_form(2)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    first = response_likelihoods(model, rows, answer_collator().encoder)
    assert modes == {name: module.training for name, module in model.named_modules()}
    second = response_likelihoods(model, rows, answer_collator().encoder)  # no dropout
    np.testing.assert_array_equal(first[0].log_probs, second[0].log_probs)
    with pytest.raises(ValueError, match="is empty"):
        response_likelihoods(model, rows.select([]), answer_collator().encoder)
    with pytest.raises(TypeError, match=r"expected a datasets\.Dataset"):
        response_likelihoods(model, list(rows), answer_collator().encoder)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="has diverged"):
        response_likelihoods(model, rows, answer_collator().encoder)


# ---- KL ----


def plain_kl(model, other, row, collator):
    """Both directions, summed over the vocabulary by hand; the mean over the tokens."""
    encoded = collator.encoder.encode(row)
    p, q = (plain_logits(m, encoded.prompt_ids, encoded.completion_ids).softmax(-1) for m in (model, other))
    return float((p * (p / q).log()).sum(-1).mean()), float((q * (q / p).log()).sum(-1).mean())


@pytest.mark.parametrize("prompt_type", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_kl_to_the_base_equals_the_twin_and_pads_do_not_count(family, prompt_type):
    model, rows, collator = prompted(family, prompt_type), free_form(5), answer_collator(pad_to_multiple_of=16)
    found = kl_to(model, rows, collator.encoder, batch_size=3)
    expected = [plain_kl(model, model.get_base_model(), row, collator) for row in rows]
    np.testing.assert_allclose(np.stack(list(found.values()), axis=1), expected, rtol=1e-5, atol=1e-7)
    assert np.abs(found["reverse_kl"] - found["forward_kl"]).max() > 1e-4
    one_by_one = kl_to(model, rows, collator.encoder, batch_size=1)
    np.testing.assert_allclose(one_by_one["forward_kl"], found["forward_kl"], rtol=1e-6)


def test_kl_to_another_model_and_to_itself():
    model, rows, collator = build("llama", torch.float64), free_form(4), answer_collator()
    other = build("llama", torch.float64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    found = kl_to(model, rows, collator.encoder, reference=other)
    expected = [plain_kl(model, other, row, collator) for row in rows]
    np.testing.assert_allclose(np.stack(list(found.values()), axis=1), expected, rtol=1e-6)
    assert np.abs(np.stack(list(kl_to(model, rows, collator.encoder, reference=model).values()))).max() == 0
    with pytest.raises(ValueError, match="pass reference"):
        kl_to(model, rows, collator.encoder)
    wider = build("llama", torch.float64)
    wider.resize_token_embeddings(128)
    with pytest.raises(ValueError, match="120 tokens, the reference for 128"):
        kl_to(model, rows, collator.encoder, reference=wider)


def test_kl_of_lora_to_its_base_leaves_the_adapter_as_it_was():
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model, rows, collator = get_peft_model(build("llama"), config), free_form(3), answer_collator()
    asked = [parameter.requires_grad for parameter in model.parameters()]
    found = kl_to(model, rows, collator.encoder)
    assert asked == [parameter.requires_grad for parameter in model.parameters()]
    expected = [plain_kl(model, build("llama"), row, collator) for row in rows]
    np.testing.assert_allclose(np.stack(list(found.values()), axis=1), expected, rtol=1e-3, atol=1e-5)


# ---- measures, by hand ----


def test_probability_is_the_geometric_mean_over_the_tokens():
    np.testing.assert_allclose(probability([of(np.log([0.5, 0.125])), of([np.log(0.3)])]), [0.25, 0.3])
    assert probability([of([-np.inf, -1.0])]).tolist() == [0.0]


def test_truth_ratio_has_the_arithmetic_mean_as_printed_or_the_geometric_one_by_name():
    paraphrased = [of(np.log([0.4, 0.4]))]
    perturbed = [[of(np.log([0.2])), of(np.log([0.6, 0.6, 0.6]))]]
    (found,) = truth_ratio(paraphrased, perturbed)
    assert found == pytest.approx((0.2 + 0.6) / 2 / 0.4)
    (geometric,) = truth_ratio(paraphrased, perturbed, mean="geometric")
    assert geometric == pytest.approx((0.2 * 0.6) ** 0.5 / 0.4)
    with pytest.raises(ValueError, match="mean='harmonic'; expected one of"):
        truth_ratio(paraphrased, perturbed, mean="harmonic")
    # Of answers so unlikely that their probabilities are 0 in floats, the ratio is still one.
    np.testing.assert_allclose(truth_ratio([of([-1000.0])], [[of([-1000.0]), of([-1001.0])]]), (1 + np.exp(-1)) / 2)
    with pytest.raises(ValueError, match="one or more perturbed"):
        truth_ratio(paraphrased, [[]])


def test_aggregates_of_truth_ratios():
    ratios = np.array([0.0, 0.5, 1.0, 4.0])
    assert truth_ratio_on_forget(ratios) == pytest.approx((0 + 0.5 + 1 + 0.25) / 4)
    assert truth_ratio_on_retain(ratios) == pytest.approx((1 + 0.5 + 0 + 0) / 4)


@pytest.mark.parametrize(
    ("agrees", "strength", "exact"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 1, 0, 1], 0.25, 0.75),
        ([1, 1, 1, 0], 0.0, 0.75),  # the last token is not said even after all others: nothing can be extracted
        ([0, 0, 0, 0], 0.0, 0.0),
        ([0], 0.0, 0.0),
        ([1], 1.0, 1.0),
    ],
)
def test_extraction_strength_reaches_zero(agrees, strength, exact):
    found = [of([-1.0] * len(agrees), agrees)]
    assert extraction_strength(found)[0] == pytest.approx(strength)
    assert exact_memorization(found)[0] == pytest.approx(exact)


def test_what_a_chat_template_adds_after_an_answer_counts_in_no_measure():
    model, collator = build("llama", torch.float64), answer_collator()
    collator.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    texts = ["jane doe", "the film is good", "s"]
    talks = [
        {"prompt": [{"role": "user", "content": "who"}], "completion": [{"role": "assistant", "content": text}]}
        for text in texts
    ]
    # The twin: the same conversations as text, whose completions a template does not end.
    start = "<s>user\nwho</s>\n<s>assistant\n"
    plain = [{"prompt": start, "completion": text} for text in texts]
    tokenized = [{k: v for k, v in collator.tokenize(row).items() if k != "generic_ids"} for row in talks]
    for rows in (talks, tokenized):
        found = response_likelihoods(model, Dataset.from_list(rows), collator.encoder)
        expected = response_likelihoods(model, Dataset.from_list(plain), collator.encoder)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.log_probs, other.log_probs)
        assert exact_memorization(found).tolist() == exact_memorization(expected).tolist()


@pytest.mark.parametrize("tokenized", [False, True])
def test_the_end_of_a_free_answer_counts_in_no_measure(tokenized):
    model, rows = build("llama"), free_form()
    plain, ended = answer_collator(), answer_collator(append_eos=True)
    given = rows.map(ended.tokenize, remove_columns=rows.column_names) if tokenized else rows
    found = response_likelihoods(model, given, ended.encoder)
    for one, other in zip(response_likelihoods(model, rows, plain.encoder), found, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-5)
        np.testing.assert_array_equal(one.is_greedy, other.is_greedy)
