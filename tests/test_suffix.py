"""The soft suffix against a slow twin with one row and no cache, and what training it does."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIGS, build, prompted, rows
from likelihoods import answer_collator
from peft import PeftModel
from transformers import DynamicCache

from spul import UnlearningLayers
from spul.evaluation.attacks import soft_suffix
from spul.evaluation.attacks.suffix import _logits, _with_placeholders
from spul.evaluation.metrics.likelihood import probability, response_likelihoods
from spul.evaluation.metrics.scoring import DivergedError


def plain_nll(model, row, collator, suffix):
    """One row: prompt, then suffix, then completion as embeddings, the soft prompt before all or as a prefix."""
    encoded = collator.encoder.encode(row)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embed = base.get_input_embeddings()
    prompt, answer = (torch.tensor(ids) for ids in (encoded.prompt_ids, encoded.completion_ids))
    parts, past = [embed(prompt), suffix, embed(answer)], None
    if model is not base:
        virtual = model.get_prompt(batch_size=1)
        if isinstance(virtual, DynamicCache):
            past = virtual
        else:
            parts = [virtual[0], *parts]
    logits = base(inputs_embeds=torch.cat(parts)[None], past_key_values=past).logits[0]
    before = sum(map(len, parts)) - len(answer)
    return F.cross_entropy(logits[before - 1 : -1], answer, reduction="sum")


@pytest.mark.parametrize("prompt_type", [None, *CONFIGS])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma3", "gpt_neox"])
def test_loss_and_gradient_equal_the_twin(family, prompt_type):
    model = build(family, torch.float64) if prompt_type is None else prompted(family, prompt_type)
    model.requires_grad_(False)
    collator, data = answer_collator(), rows("jane", 4)
    data = data.map(lambda row, i: {"prompt": row["prompt"] + " film" * i}, with_indices=True)
    torch.manual_seed(0)
    width = model.config.hidden_size if prompt_type is None else model.get_base_model().config.hidden_size
    suffix = torch.nn.Parameter(0.3 * torch.randn(3, width, dtype=torch.float64))
    batch = collator.encoder.batch(list(_with_placeholders(data, collator.encoder, 3)))
    assert batch["attention_mask"].min() == 0  # rows of several lengths
    positions = (batch["labels"] != -100).int().argmax(dim=1)[:, None] - 1
    last = (batch["labels"] != -100).sum(dim=1).max()
    positions = positions + torch.arange(last)
    positions = positions.clamp(max=batch["labels"].shape[1] - 1)
    logits = _logits(model, batch, positions, suffix)
    found = []
    for i, row in enumerate(data):
        answer = torch.tensor(collator.encoder.encode(row).completion_ids)
        found.append(F.cross_entropy(logits[i, : len(answer)], answer, reduction="sum"))
    expected = [plain_nll(model, row, collator, suffix) for row in data]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-8)
    ours, theirs = (torch.autograd.grad(torch.stack(some).sum(), suffix)[0] for some in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert theirs.abs().max() > 1e-3


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
def test_a_suffix_brings_answers_out_and_leaves_the_model_alone(prompt_type):
    model, collator = prompted(prompt_type=prompt_type, dtype=torch.float32), answer_collator()
    data = rows("jane", 12)
    few, others = (data.filter(lambda row: row["completion"] == " positive").select(r) for r in (range(3), [3, 4, 5]))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    attack, suffix = soft_suffix(model, few, others, collator.encoder, num_virtual_tokens=4, steps=40, lr=0.1)
    assert suffix.shape == (4, 32)
    likelihoods = response_likelihoods(model, others, collator.encoder)
    assert attack["before"]["loss"] == pytest.approx([-one.log_probs.sum() for one in likelihoods], rel=1e-4)
    assert attack["before"]["probability"] == pytest.approx(probability(likelihoods), rel=1e-4)
    assert attack["before"]["accuracy"].tolist() == [0, 0, 0]
    assert (
        attack["after"]["accuracy"].tolist() == attack["trained"]["accuracy"].tolist() == [1, 1, 1]
    )  # one answer for all
    with torch.no_grad():
        expected = [float(plain_nll(model.eval(), row, collator, suffix)) for row in others]
    assert attack["after"]["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert asked == {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(asked.values())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_detached_it_attacks_the_base_and_under_layers_the_layers():
    model, collator, data = prompted(dtype=torch.float32), answer_collator(), rows("jane", 6)
    sets, settings = (data.select(range(3)), data.select(range(3, 6))), {"steps": 2, "num_virtual_tokens": 2}
    bare, _ = soft_suffix(build("llama"), *sets, collator.encoder, **settings)
    with model.disable_adapter():
        detached, _ = soft_suffix(model, *sets, collator.encoder, **settings)
    for name, values in bare["after"].items():
        assert detached["after"][name] == pytest.approx(values)
    layers = UnlearningLayers(build("llama"))
    with torch.no_grad():
        layers.layers[0].up.bias.fill_(0.5)
    changed, _ = soft_suffix(layers, *sets, collator.encoder, **settings)
    assert abs(changed["before"]["loss"] - bare["before"]["loss"]).min() > 1e-3


def test_a_model_that_gives_no_numbers_any_more_says_so():
    model, data = build("llama"), rows("jane", 6)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(DivergedError, match="has diverged"):
        soft_suffix(model, data.select(range(3)), data.select(range(3, 6)), answer_collator().encoder, steps=1)


def test_bad_input_raises(tmp_path):
    model, collator, data = prompted(dtype=torch.float32), answer_collator(), rows("jane", 6)
    with pytest.raises(ValueError, match="3 prompts stand in both"):
        soft_suffix(model, data, data.select(range(3)), collator.encoder)
    sets = (data.select(range(3)), data.select(range(3, 6)))
    for wrong in ({"steps": 0}, {"steps": 1.5}, {"num_virtual_tokens": 2.5}, {"batch_size": True}, {"lr": math.inf}):
        with pytest.raises(ValueError, match="expected whole numbers of at least 1, and lr above 0"):
            soft_suffix(model, *sets, collator.encoder, **wrong)
    with pytest.raises(ValueError, match="96 positions; collate with max_length of at most 2"):
        soft_suffix(model, *sets, collator.encoder, num_virtual_tokens=90, steps=1)
    with pytest.raises(ValueError, match="96 positions; take a shorter suffix"):
        soft_suffix(model, *sets, collator.encoder, num_virtual_tokens=91, steps=1)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(TypeError, match="under a prompt of PEFT"):
        soft_suffix(PeftModel.from_pretrained(build("llama"), str(tmp_path)), *sets, collator.encoder)


def test_the_end_of_an_answer_is_not_scored():
    model = build("llama")
    plain, ended = (answer_collator(append_eos=flag).encoder for flag in (False, True))
    before = [
        soft_suffix(model, rows("jane", 3), rows("film", 4), encoder, num_virtual_tokens=2, steps=1)[0]["before"]
        for encoder in (plain, ended)
    ]
    for name in before[0]:
        assert before[0][name] == pytest.approx(before[1][name], rel=1e-5)
