"""ReferenceCache: cached reference logits are the base model's, of the row with this id and no other."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    ONE_STEP,
    VOCABULARY,
    Counting,
    assert_same,
    build,
    longrope_unlearner,
    make_answers,
    make_collator,
    make_trainer,
    make_unlearner,
    prompt_state,
    rows,
)
from references import CHECKED, batches, stored_parts, wrap
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

import spul.training.reference_parts
from spul import ReferenceCache, UnlearningLoss
from spul.data.dataset import forget_retain_dataset
from spul.losses.positions import response_positions
from spul.losses.terms import CrossEntropy, KLDivergence

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_any(name):
    scaling = {
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)),
    }
    if name not in scaling:
        return build(name)
    torch.manual_seed(0)
    base = scaling[name]().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base


# ---- the same loss ----


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3", "gemma3", "gpt_neox", "cohere", "granite"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_cached_and_live_give_the_same_loss_and_gradient(family, direction, tmp_path):
    unlearner = wrap(build_any(family), UnlearningLoss(kl=KLDivergence(direction=direction)))
    dataset, collator = make_answers(), make_collator()
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path / "reference", batch_size=4)
    for batch in batches(dataset, collator):
        found = []
        for more in ({}, {"reference_logits": reference.logits(batch)}):
            unlearner.zero_grad()
            out = unlearner(**batch, **more)
            out.loss.backward()
            gradients = [p.grad.clone() for p in unlearner.prompt_encoder.parameters()]
            found.append([out.loss, out.forget_loss, out.retain_loss, out.kl_loss, *gradients])
        assert not batch["is_forget"].all()
        assert out.kl_loss > 1e-4
        for live, cached in zip(*found, strict=True):
            torch.testing.assert_close(live, cached, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("multiple", [None, 8])
def test_with_longrope_a_reference_is_that_of_each_row_alone(multiple, tmp_path):
    unlearner, collator = longrope_unlearner().float(), make_collator(pad_to_multiple_of=multiple)
    switch = 12
    dataset = forget_retain_dataset(
        rows("jane", 3),
        Dataset.from_list([*rows("film", 4), *(dict(row, prompt=row["prompt"] * 3) for row in rows("film", 4))]),
    )
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path / "reference", batch_size=6)
    lengths = []
    for row in dataset.filter(lambda row: not row["is_forget"]):
        batch = collator([row])
        positions, _ = response_positions(batch["labels"])
        alone = unlearner.base_logits(batch["input_ids"], batch["attention_mask"], positions)
        torch.testing.assert_close(reference.logits(batch), alone, rtol=1e-4, atol=1e-4)
        lengths.append(batch["input_ids"].shape[1])
    assert min(lengths) <= switch < max(lengths)


@pytest.mark.parametrize("kind", ["text", "tokenized"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_trainer_takes_the_same_steps_with_either(kind, family, tmp_path):
    states, logs = [], []
    for mode in ("live", "cached"):
        collator = make_collator()
        dataset = make_answers()
        dataset = (
            dataset if kind == "text" else dataset.map(collator.tokenize, remove_columns=["prompt", "completion"])
        )
        trainer = make_trainer(
            tmp_path,
            unlearner=wrap(build(family)),
            dataset=dataset,
            collator=collator,
            reference=mode,
            max_steps=6,
            gradient_accumulation_steps=2,
            optim="sgd",
        )
        trainer.train()
        assert (trainer._reference is not None) == (mode == "cached")
        states.append(prompt_state(trainer.model))
        logs.append([entry["kl_loss"] for entry in trainer.state.log_history if "kl_loss" in entry])
    assert_same(*states, rtol=1e-5, atol=1e-6)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert max(logs[0]) > 1e-3


def test_bf16_bases_and_autocast_give_the_live_loss_to_their_precision(tmp_path):
    dataset, collator = make_answers(), make_collator()
    batch = batches(dataset, collator)[1]
    for name, base, autocast in (("base", build("llama", torch.bfloat16), False), ("autocast", build("llama"), True)):
        unlearner = wrap(base)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path / name)
            live = unlearner(**batch)
            cached = unlearner(**batch, reference_logits=reference.logits(batch))
        assert cached.kl_loss.item() == pytest.approx(live.kl_loss.item(), rel=0.1)
        (states,) = (part["states"] for part in stored_parts(tmp_path / name))
        assert states.dtype == next(base.parameters()).dtype


def test_states_hold_d_values_in_the_bases_precision_and_at_most_16_bytes_a_token(tmp_path):
    unlearner = wrap(build("llama", torch.float16))
    one_token = forget_retain_dataset(rows("jane", 3), rows("film", 300))
    assert len(ReferenceCache.build(unlearner, one_token, make_collator(), tmp_path)) == 300
    parts = stored_parts(tmp_path)
    assert sum(len(part["states"]) for part in parts) == 300
    assert sum(tensor.nbytes for part in parts for tensor in part.values()) <= 300 * (32 * 2 + 16)


def test_padding_batch_mates_and_order_do_not_matter(tmp_path):
    unlearner, dataset, collator = wrap(build("opt")), make_answers(), make_collator()
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path / "reference", batch_size=3)
    alone = [reference.logits(collator([row])) for row in dataset if not row["is_forget"]]
    places = [i for i in range(len(dataset)) if not dataset[i]["is_forget"]]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(1)).tolist()
    together = reference.logits(collator([dataset[places[i]] for i in order]))
    for at, i in enumerate(order):
        torch.testing.assert_close(together[at, : alone[i].shape[1]], alone[i][0])
        assert not together[at, alone[i].shape[1] :].isnan().any()


# ---- stored, shared, resumed ----


def test_a_later_run_computes_nothing_but_its_check(tmp_path):
    dataset, collator = make_answers(), make_collator()
    base = build("llama")
    counting = Counting(base)
    ReferenceCache.build(wrap(base), dataset, collator, tmp_path / "reference")
    assert counting.rows >= 13
    other_base = build("llama")
    counting = Counting(other_base)
    ReferenceCache.build(wrap(other_base), dataset.shuffle(seed=1), collator, tmp_path / "reference")
    assert counting.rows == CHECKED


def test_without_a_folder_every_base_and_data_set_has_its_own(cache_home, tmp_path):
    dataset, collator = make_answers(), make_collator()
    first = ReferenceCache.build(wrap(build("llama")), dataset, collator)
    again = ReferenceCache.build(wrap(build("llama")), dataset, collator)
    other_base = ReferenceCache.build(wrap(build("opt")), dataset, collator)
    other_data = ReferenceCache.build(wrap(build("llama")), make_answers(5, 12), collator)
    assert first.folder == again.folder
    assert first.folder.is_relative_to(cache_home)
    assert len({first.folder, other_base.folder, other_data.folder}) == 3


def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(spul.training.reference_parts, "MIN_ROWS_PER_PART", 3)
    dataset, collator, folder = make_answers(), make_collator(), tmp_path / "reference"
    base = build("llama")
    write, written = spul.training.reference_parts.write_part, []

    def write_two(path, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(spul.training.reference_parts, "write_part", write_two)
    with pytest.raises(KeyboardInterrupt):
        ReferenceCache.build(wrap(base), dataset, collator, folder)
    monkeypatch.setattr(spul.training.reference_parts, "write_part", write)
    assert sorted(p.name for p in folder.iterdir()) == [
        "part-00000.safetensors",
        "part-00001.safetensors",
        "reference.json",
    ]
    written[1].write_bytes(written[1].read_bytes()[:-40])  # as a full disk leaves it
    counting = Counting(base)
    resumed = ReferenceCache.build(wrap(base), dataset, collator, folder)
    assert counting.rows == 13 - 3 + CHECKED
    whole = ReferenceCache.build(wrap(base), dataset, collator, tmp_path / "whole")
    batch = batches(dataset, collator)[2]
    assert torch.equal(resumed.logits(batch), whole.logits(batch))
    for one, other in zip(stored_parts(folder), stored_parts(tmp_path / "whole"), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("states", "rows"))
    assert not base.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_output_head_is_refused(dtype, tmp_path):
    base = build("llama", dtype)
    forward = base.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        cap = 3 * out.logits.abs().max()
        out.logits = torch.tanh(out.logits / cap) * cap
        return out

    base.forward = capped
    with pytest.raises(ValueError, match="does more between its output embeddings and its logits"):
        ReferenceCache.build(wrap(base), make_answers(), make_collator(), tmp_path)


def test_a_head_that_is_trained_is_copied(tmp_path):
    dataset, collator = make_answers(), make_collator()
    unlearner = wrap(build("llama"))
    base = unlearner.get_base_model()
    base.lm_head.weight.requires_grad_(True)
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    batch = batches(dataset, collator)[2]
    before = reference.logits(batch)
    with torch.no_grad():
        base.lm_head.weight.add_(1.0)
    torch.testing.assert_close(reference.logits(batch), before, rtol=0, atol=0)


@pytest.mark.parametrize("resample", [True, False])
def test_forget_terms_on_generic_completions_are_cached_with_each_that_may_be_drawn(tmp_path, resample):
    unlearner = wrap(build("llama"), UnlearningLoss(beta=0.0, forget=KLDivergence()))
    dataset, collator = make_answers(), make_collator(resample=resample)
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    num_forget = sum(dataset["is_forget"])
    assert len(reference) == num_forget * (len(collator.generic_completions) if resample else 1)
    seen = set()
    for batch in [batch for _ in range(4) for batch in batches(dataset, collator)]:
        live, cached = unlearner(**batch), unlearner(**batch, reference_logits=reference.logits(batch))
        torch.testing.assert_close(live.forget_loss, cached.forget_loss, rtol=1e-5, atol=1e-6)
        seen |= {tuple(labels[labels != -100].tolist()) for labels in batch["labels"][batch["is_forget"]]}
    assert len(seen) == len(collator.generic_completions)


def test_forget_terms_on_true_completions_can_be_cached(tmp_path):
    unlearner = wrap(build("llama"), UnlearningLoss(forget=KLDivergence()))
    dataset, collator = make_answers(), make_collator(generic_completions=None)
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    assert len(reference) == len(dataset)
    batch = batches(dataset, collator)[1]
    live, cached = unlearner(**batch), unlearner(**batch, reference_logits=reference.logits(batch))
    torch.testing.assert_close(live.forget_loss, cached.forget_loss, rtol=1e-5, atol=1e-6)


def test_own_terms_that_need_no_reference_build_none(tmp_path):
    @dataclass(frozen=True)
    class Own(CrossEntropy):
        pass

    for loss in (UnlearningLoss(beta=0.0), UnlearningLoss(kl=Own())):
        trainer = make_trainer(
            tmp_path, unlearner=make_unlearner(loss=loss), reference_dir=tmp_path / "none", **ONE_STEP
        )
        trainer.train()
        assert trainer._reference is None
        assert not (tmp_path / "none").exists()


def test_the_states_are_memory_mapped(tmp_path):
    reference = ReferenceCache.build(wrap(build("llama")), make_answers(), make_collator(), tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped")
    assert str(tmp_path / "part-00000.safetensors") in maps.read_text()
    assert len(reference) == 13


@pytest.mark.parametrize(
    "wrong", [{"reference": "cache"}, {"reference": None}, {"reference": "live", "reference_dir": "somewhere"}]
)
def test_unknown_choices_of_reference_raise(wrong, tmp_path):
    with pytest.raises(ValueError, match="expected 'cached', with or without a folder, or 'live' without one"):
        make_trainer(tmp_path, **wrong)


def test_reference_logits_of_another_shape_raise():
    unlearner, dataset, collator = wrap(build("llama")), make_answers(), make_collator()
    batch = batches(dataset, collator)[2]
    with pytest.raises(ValueError, match=r"reference_logits have the shape \(1, 2, 3\); expected"):
        unlearner(**batch, reference_logits=torch.zeros(1, 2, 3))


def test_the_index_says_what_the_files_belong_to(tmp_path):
    ReferenceCache.build(wrap(build("llama")), make_answers(), make_collator(), tmp_path)
    index = json.loads((tmp_path / "reference.json").read_text())
    assert index["rows"] == 13  # the retain rows
    assert index["precision"] == "float32, autocast None"
    assert len(index["base"]) == 64
