"""Membership attacks: formulae by hand, gradients against autograd's plain backward, members told from others."""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIGS, build, prompted
from likelihoods import answer_collator, free_form, of, plain_likelihood
from peft import LoraConfig, get_peft_model

from spul.evaluation.metrics import (
    DivergedError,
    Likelihood,
    attack_scores,
    gradient_norm_attack,
    loss_attack,
    min_k_attack,
    min_k_plus_plus_attack,
    reference_attack,
    response_likelihoods,
    zlib_attack,
)


def test_loss_zlib_and_reference_by_hand():
    found, others = [of([-1.0, -3.0]), of([-0.5])], [of([-2.0, -4.0]), of([-0.25])]
    np.testing.assert_allclose(loss_attack(found), [-2.0, -0.5])
    texts = ["aaaa" * 50, "Zoë"]
    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    np.testing.assert_allclose(zlib_attack(found, texts), [-2.0 / sizes[0], -0.5 / sizes[1]])
    np.testing.assert_allclose(reference_attack(found, others), [1.0, -0.25])
    with pytest.raises(ValueError, match="one text for each"):
        zlib_attack(found, texts[:1])
    with pytest.raises(ValueError, match="token for token"):
        reference_attack(found, others[::-1])


def test_min_k_is_the_mean_of_the_least_likely_and_takes_one_token_at_least():
    ten = of(-np.arange(10.0))
    np.testing.assert_allclose(min_k_attack([ten], 0.2), [-8.5])
    np.testing.assert_allclose(min_k_attack([ten], 0.29), [-8.5])  # rounded down
    np.testing.assert_allclose(min_k_attack([ten], 1.0), loss_attack([ten]))
    np.testing.assert_allclose(min_k_attack([of([-1.0, -2.0])], 0.2), [-2.0])
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            min_k_attack([ten], share)


def test_min_k_plus_plus_by_hand():
    found = Likelihood(np.array([-1.0, -5.0]), np.ones(2, bool), np.array([-2.0, -2.0]), np.array([0.5, 1.5]))
    np.testing.assert_allclose(min_k_plus_plus_attack([found], 0.5), [-2.0])
    np.testing.assert_allclose(min_k_plus_plus_attack([found], 1.0), [0.0])
    certain = Likelihood(np.zeros(1), np.ones(1, bool), np.zeros(1), np.zeros(1))
    assert min_k_plus_plus_attack([certain]).tolist() == [0.0]


def test_min_k_plus_plus_of_a_uniform_model_and_of_a_real_one():
    """From logits to score, by the definition: expectation over the next token under the model."""
    model, collator, rows = prompted(), answer_collator(), free_form(4)
    expected = []
    for row in rows:
        twin = plain_likelihood(model, row, collator)
        values = sorted((x - m) / s for x, m, s in zip(twin["log_probs"], twin["mean"], twin["std"], strict=True))
        kept = values[: max(1, int(0.4 * len(values)))]
        expected.append(sum(kept) / len(kept))
    np.testing.assert_allclose(
        min_k_plus_plus_attack(response_likelihoods(model, rows, collator.encoder), 0.4), expected, rtol=1e-5
    )


# ---- gradient norm ----


def plain_norm(model, row, collator, parameters):
    """An ordinary forward of one row and an ordinary backward."""
    encoded = collator.encoder.encode(row)
    ids = torch.tensor([encoded.prompt_ids + encoded.completion_ids])
    num = len(encoded.completion_ids)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -num - 1 : -1]
    F.cross_entropy(logits, torch.tensor(encoded.completion_ids)).backward()
    return float(sum(p.grad.double().square().sum() for p in parameters if p.grad is not None) ** 0.5)


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
def test_gradient_norms_of_a_prompted_model_by_what_is_asked(prompt_type):
    model, collator, rows = prompted(prompt_type=prompt_type), answer_collator(), free_form(3)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    found = {of: gradient_norm_attack(model, rows, collator.encoder, of) for of in ("model", "adapter")}
    assert asked == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    base, prompt = list(model.get_base_model().parameters()), list(model.prompt_encoder.parameters())
    for name, parameters in (("model", base), ("adapter", prompt)):
        expected = [-plain_norm(model, row, collator, parameters) for row in rows]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)
    assert not np.allclose(found["model"], found["adapter"])


def test_gradient_norms_of_a_bare_model_and_under_lora(family):
    collator, rows = answer_collator(), free_form(2)
    bare = build(family, torch.float64)
    expected = [-plain_norm(bare, row, collator, list(bare.parameters())) for row in rows]
    np.testing.assert_allclose(gradient_norm_attack(bare, rows, collator.encoder), expected, rtol=1e-5)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build(family, torch.float64), config).double()
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    found = gradient_norm_attack(model, rows, collator.encoder, "adapter")
    np.testing.assert_allclose(found, [-plain_norm(model, row, collator, lora) for row in rows], rtol=1e-5)


def test_a_gradient_that_cannot_be_had_is_said():
    model, collator, rows = prompted(dtype=torch.float32), answer_collator(), free_form(1)
    with pytest.raises(ValueError, match="expected 'model' or 'adapter'"):
        gradient_norm_attack(model, rows, collator.encoder, "prompt")
    with pytest.raises(ValueError, match="A bare model has no adapter"):
        gradient_norm_attack(build("llama"), rows, collator.encoder, "adapter")
    with model.disable_adapter(), pytest.raises(ValueError, match="enable the adapter"):
        gradient_norm_attack(model, rows, collator.encoder, "adapter")
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model.get_base_model().register_parameter("packed", weight)
    with pytest.raises(ValueError, match="1 of them quantized"):
        gradient_norm_attack(model, rows, collator.encoder)


def test_gradients_of_a_model_that_has_diverged_are_no_scores():
    model, collator, rows = build("llama"), answer_collator(), free_form(1)
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = torch.inf
    with pytest.raises(DivergedError, match="the model's gradients are NaN or infinite"):
        gradient_norm_attack(model, rows, collator.encoder)


# ---- all of them ----


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_every_attack_is_in_the_rows_order_and_of_the_model_at_hand(prompt_type):
    model, collator, rows = prompted(prompt_type=prompt_type), answer_collator(), free_form(5)
    base = model.get_base_model()
    found = attack_scores(model, rows, collator.encoder, reference=base, gradient_of="adapter", batch_size=2)
    assert list(found) == ["loss", "zlib", "min_k", "min_k++", "reference", "gradient_norm"]
    with pytest.raises(ValueError, match="needs the text"):
        attack_scores(model, rows.remove_columns("completion"), collator.encoder)
    assert list(attack_scores(model, rows, collator.encoder)) == ["loss", "zlib", "min_k", "min_k++"]
    ours, theirs = (response_likelihoods(m, rows, collator.encoder) for m in (model, base))
    np.testing.assert_allclose(found["loss"], loss_attack(ours), rtol=1e-6)
    np.testing.assert_allclose(found["reference"], loss_attack(ours) - loss_attack(theirs), rtol=1e-5, atol=1e-8)
    backwards = attack_scores(model, rows.select(range(4, -1, -1)), collator.encoder, base, "adapter", batch_size=3)
    for name, values in found.items():
        np.testing.assert_allclose(backwards[name][::-1], values, rtol=1e-5, atol=1e-8, err_msg=name)


def test_rows_that_were_trained_on_score_higher_in_every_attack():
    """The direction of each score, by training: every attack gives the rows more than before."""
    model, collator, rows = build("llama"), answer_collator(), free_form(6)
    before = attack_scores(model, rows, collator.encoder, reference=build("llama"), gradient_of="model")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(25):
        batch = collator.encoder.batch(list(rows))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = attack_scores(model, rows, collator.encoder, reference=build("llama"), gradient_of="model")
    for name in before:
        assert np.mean(after[name] > before[name]) > 0.9, name
