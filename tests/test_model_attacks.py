"""Relearning, quantization and probes: what they change, what they leave, and cases by hand."""

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, build, make_collator, make_unlearner, rows, scored

import spul.evaluation.attacks.probe as probe_module
from spul import SoftPromptUnlearner, UnlearningLayers
from spul.evaluation.attacks import linear_probe, quantized, relearn
from spul.evaluation.metrics.scoring import response_logits, score_completions


def trainables():
    return {
        "whole": lambda: build("llama"),
        "layers": lambda: UnlearningLayers(build("llama")),
        **{name: lambda name=name: make_unlearner(name) for name in CONFIGS},
    }


@pytest.mark.parametrize("trainable", trainables())
def test_relearning_lowers_the_loss_of_other_rows_and_puts_the_model_back(trainable):
    model, data, collator = trainables()[trainable](), rows("jane", 12), make_collator()
    few, others = data.select(range(4)), data.select(range(4, 12))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = relearn(model, few, others, collator.encoder, scored, lr=1e-2, at=(2, 12))
    assert [record["step"] for record in found] == [0, 2, 12]
    assert found[0]["loss"] == pytest.approx(score_completions(model, others, collator)["loss"])
    assert found[2]["loss"] < found[1]["loss"] < found[0]["loss"]
    assert modes == [module.training for module in model.modules()]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    again = relearn(model, few, others, collator.encoder, scored, lr=1e-2, at=(2,))
    assert again[1]["loss"] == pytest.approx(found[1]["loss"])


def test_a_step_of_relearning_is_one_on_the_true_completions_under_the_prompt():
    """Plain gradient descent by hand, clipped, with the loss of PEFT's own forward."""
    model, twin, data, collator = make_unlearner(), make_unlearner(), rows("jane", 6), make_collator()
    few, others = data.select(range(3)), data.select(range(3, 6))
    found = relearn(model, few, others, collator.encoder, scored, lr=0.05, at=(1,), optimizer=torch.optim.SGD)
    losses = []
    for row in few:
        batch = collator.encoder.batch([row])
        logits = twin(input_ids=batch["input_ids"]).logits[0, 4:]
        at = (batch["labels"][0] != -100).nonzero().flatten()
        losses += [torch.nn.functional.cross_entropy(logits[i - 1], batch["labels"][0, i]) for i in at.tolist()]
    torch.stack(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(twin.prompt_encoder.parameters(), 1.0)
    with torch.no_grad():
        for parameter in twin.prompt_encoder.parameters():
            parameter -= 0.05 * parameter.grad
    expected = score_completions(twin, others, collator)["loss"]
    assert found[1]["loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - found[0]["loss"]) > 1e-3


def test_small_steps_are_not_rounded_away_in_16_bit():
    data, collator = rows("jane", 6), make_collator()
    few, others = data.select(range(3)), data.select(range(3, 6))
    gains = []
    for dtype in (torch.float32, torch.bfloat16):
        found = relearn(build("llama", dtype), few, others, collator.encoder, scored, lr=1e-5, at=(64,))
        gains.append(found[0]["loss"] - found[1]["loss"])
    assert gains[0] > 0.01
    assert gains[1] == pytest.approx(gains[0], rel=0.5)


def test_relearning_refuses_what_it_cannot_measure():
    data, collator = rows("jane", 6), make_collator()
    few, others = data.select(range(3)), data.select(range(3, 6))
    with pytest.raises(ValueError, match="3 prompts stand in both"):
        relearn(build("llama"), data, others, collator.encoder, scored)
    with pytest.raises(ValueError, match="0 parameters require gradients"):
        relearn(build("llama").requires_grad_(False), few, others, collator.encoder, scored)
    for wrong in (
        *({"at": at} for at in ((0, 3), (), 16, (1.5,), (True,), "12")),
        *({"lr": float("inf")}, {"lr": -1.0}, {"batch_size": 0}, {"batch_size": 1.5}),
    ):
        with pytest.raises(ValueError, match=r"at=.*expected .* a tuple of whole numbers of steps"):
            relearn(build("llama"), few, others, collator.encoder, scored, **wrong)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases_take_the_same_prompt_and_answer_nearly_as_before(tmp_path, bits):
    unlearner, collator, data = make_unlearner(), make_collator(), rows("jane", 3)
    unlearner.get_base_model().save_pretrained(tmp_path / "base")
    unlearner.save_pretrained(str(tmp_path / "prompt"))
    batch = collator.encoder.batch(list(data))
    positions = torch.tensor([[3], [3], [3]])
    base = quantized(tmp_path / "base", bits)
    kinds = {type(module).__name__ for module in base.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trained on other weights")
        loaded = SoftPromptUnlearner.from_pretrained(base, str(tmp_path / "prompt"))
    with torch.no_grad():
        before, after = (response_logits(model.eval(), batch, positions).float() for model in (unlearner, loaded))
    similarity = torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    assert (0.9 if bits == 4 else 0.99) < similarity < 0.999999
    with pytest.raises(ValueError, match="bits=2"):
        quantized(tmp_path / "base", 2)


# ---- the probe ----


def labeled(name, labels):
    return Dataset.from_list([{"prompt": f"{name} {i} :", "completion": label} for i, label in enumerate(labels)])


def put_states(monkeypatch, of):
    """Hidden states made up from a row's completion, instead of a model's."""
    found = np.random.default_rng(0)

    def states(model, rows, *args):
        return np.stack([of(c) + 0.1 * found.standard_normal(3) for c in rows["completion"]]).astype(np.float32)

    monkeypatch.setattr(probe_module, "response_embeddings", states)


def test_a_probe_reads_what_the_states_hold_and_its_controls_do_not(monkeypatch):
    train, test = labeled("jane", [" a", " b", " b"] * 20), labeled("film", [" a", " a", " b", " c"] * 5)
    put_states(monkeypatch, lambda completion: np.array([1.0, 0, 0]) * (1 if completion == " a" else -1))
    found = linear_probe(build("llama"), train, test, make_collator().encoder)
    assert found["accuracy"] == 0.75  # a class that no training row has is never said
    assert found["majority"] == 0.25
    assert found["shuffled"] < 0.6
    put_states(monkeypatch, lambda completion: np.zeros(3))
    assert linear_probe(build("llama"), train, test, make_collator().encoder)["accuracy"] < 0.5


def test_a_probe_is_of_the_model_with_its_prompt_and_of_the_base_without():
    model, collator = make_unlearner(), make_collator()
    with torch.no_grad():
        next(model.prompt_encoder.parameters()).mul_(20)
    train, test = labeled("jane", [" a", " b"] * 12), labeled("film 7 good", [" b", " a"] * 12)
    with model.disable_adapter():
        detached = linear_probe(model, train, test, collator.encoder)
    assert detached == linear_probe(build("llama"), train, test, collator.encoder)
    with pytest.raises(ValueError, match="at least two different"):
        linear_probe(model, labeled("jane", [" a"] * 3), test, collator.encoder)
    with pytest.raises(ValueError, match=r"num_shuffles=1\.5; expected"):
        linear_probe(model, train, test, collator.encoder, num_shuffles=1.5)
    with pytest.raises(ValueError, match="stand in both"):
        linear_probe(model, train, train, collator.encoder)
