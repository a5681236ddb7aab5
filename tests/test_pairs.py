"""Pairs of responses from rows to the optimizer step: collator, loss, cached reference, trainer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GENERIC,
    ONE_STEP,
    arguments,
    assert_same,
    build,
    lora,
    make_answers,
    make_collator,
    make_dataset,
    make_tokenizer,
    make_unlearner,
    with_alternates,
)
from plain import row_logits

from spul import ForgetRetainCollator, ReferenceCache, UnlearningLoss, UnlearningTrainer, unlearning_forward
from spul.losses import DPO, CrossEntropy
from spul.models.noise import zero_dropout
from spul.training import step_counts
from spul.training.options import check_dispatch

LOSS = UnlearningLoss(alpha=0.5, beta=0.0, forget=DPO(inverse_temperature=0.5), retain=CrossEntropy(reduction="mean"))


def pairs(**kwargs):
    return make_collator(**{"pairs": True, **kwargs})


def alternating(**kwargs):
    return ForgetRetainCollator(
        make_tokenizer(), None, **{"max_length": 64, "alternates": "alternates", "pairs": True, **kwargs}
    )


def texts_of(batch, collator):
    return [collator.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


# ---- collator ----


def test_a_forget_row_is_a_chosen_row_and_after_it_the_rejected_one():
    dataset, collator = make_dataset(2, 1), pairs()
    batch = collator([dataset[0], dataset[2], dataset[1]])
    assert batch["is_forget"].tolist() == [True, True, False, True, True]
    assert batch["is_rejected"].tolist() == [False, True, False, False, True]
    texts = texts_of(batch, collator)
    assert [texts[i] in GENERIC for i in range(5)] == [True, False, False, True, False]
    assert [texts[i] for i in (1, 2, 4)] == [dataset[i]["completion"] for i in (0, 2, 1)]
    for chosen, rejected in ((0, 1), (3, 4)):
        prompts = [batch["input_ids"][i][(batch["labels"][i] == -100) & (batch["attention_mask"][i] == 1)]
                   for i in (chosen, rejected)]  # fmt: skip
        assert torch.equal(*prompts)
        assert batch["row_id"][chosen] == batch["row_id"][rejected]


def test_draws_are_those_of_a_collator_without_pairs():
    dataset = make_dataset(4, 1).select(range(4))
    for _ in range(3):
        plain, paired = make_collator(), pairs()
        batch = paired(list(dataset))
        assert texts_of(plain(list(dataset)), plain) == texts_of(batch, paired)[::2]


def test_both_rows_of_a_pair_are_cut_alike():
    collator = pairs(max_length=12, generic_completions=[" neutral unknown neutral"])
    batch = collator([{"prompt": "review of the film " * 4 + ":", "completion": " good", "is_forget": True}])
    prompts = [ids[(labels == -100) & (mask == 1)] for ids, labels, mask in
               zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert torch.equal(*prompts)
    assert int(batch["attention_mask"][0].sum()) == 12


@pytest.mark.parametrize("tokenized", [False, True])
def test_alternates_are_drawn_from_the_rows_own_list(tokenized):
    dataset, collator = with_alternates(make_answers(3, 2)), alternating()
    rows = dataset.map(collator.tokenize, remove_columns=["prompt", "completion"]) if tokenized else dataset
    seen = [set() for _ in range(3)]
    for _ in range(12):
        texts = texts_of(collator(list(rows)), collator)
        for i in range(3):
            seen[i].add(texts[2 * i])
            assert texts[2 * i + 1] == dataset[i]["completion"]
        assert texts[6:] == dataset["completion"][3:]
    assert [sorted(found) for found in seen] == [sorted(row) for row in dataset["alternates"][:3]]


def test_alternates_in_place_of_generic_completions_work_without_pairs():
    dataset, collator = with_alternates(make_answers(3, 2)), alternating(pairs=False)
    batch = collator(list(dataset))
    assert "is_rejected" not in batch
    assert all(text in own for text, own in zip(texts_of(batch, collator), dataset["alternates"][:3], strict=False))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "alternates is None; expected a list of one or more texts"),
        ([], r"alternates is \[\]; expected a list of one or more texts"),
        ("text", "alternates is 'text'; expected a list"),
        ([" other", "  "], r"alternates\[1\] is '  ', empty or the row's own completion"),
        ([" Good"], r"alternates\[0\] is ' Good', empty or the row's own completion"),
        ([[3], []], r"alternates\[1\] is empty; expected at least one token id"),
    ],
)
def test_alternates_that_cannot_be_drawn_are_refused(value, message):
    row = {"prompt": "review :", "completion": " good", "is_forget": True, "alternates": value}
    with pytest.raises(ValueError, match=message):
        alternating()([row])


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"alternates='alternates' names a column.*generic_completions"):
        make_collator(alternates="alternates")
    with pytest.raises(ValueError, match="pairs=True needs completions that are preferred"):
        make_collator(generic_completions=None, pairs=True)


# ---- loss of a batch ----


def plain_loss(batch, logits_of, base_logits_of):
    """The loss of a batch, one row at a time, by the formula of `LOSS`."""
    ratios, retain = {False: [], True: []}, []
    for ids, mask, labels, is_forget, is_rejected in zip(
        *(batch[name] for name in ("input_ids", "attention_mask", "labels", "is_forget", "is_rejected")), strict=True
    ):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        at = [i for i in range(1, len(ids)) if labels[i] != -100]
        own = torch.stack([F.log_softmax(logits_of(ids)[i - 1], -1)[labels[i]] for i in at])
        if is_forget:
            with torch.no_grad():
                base = torch.stack([F.log_softmax(base_logits_of(ids)[i - 1], -1)[labels[i]] for i in at])
            ratios[bool(is_rejected)].append((own - base).sum())
        else:
            retain.append(-own.mean())
    b = LOSS.forget.inverse_temperature
    margins = [chosen - rejected for chosen, rejected in zip(ratios[False], ratios[True], strict=True)]
    dpo = [-2 / b * torch.log(torch.sigmoid(b * margin)) for margin in margins]
    return sum(dpo) / len(dpo) + LOSS.alpha * sum(retain) / len(retain)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_a_prompts_loss_and_gradient_are_those_of_the_plain_formula():
    unlearner = make_unlearner(loss=LOSS).double()
    batch = pairs(max_length=64)(list(make_answers(3, 2)))
    out = unlearner(**batch)
    out.loss.backward()
    found = gradients(unlearner)
    unlearner.zero_grad()
    plain = plain_loss(batch, lambda ids: row_logits(unlearner, ids), lambda ids: row_logits(unlearner, ids, False))
    plain.backward()
    torch.testing.assert_close(out.loss, plain)
    assert_same(found, gradients(unlearner), rtol=1e-4, atol=1e-6)


def test_loras_loss_and_gradient_are_those_of_the_plain_formula():
    model = lora(build("llama", torch.float64))
    batch = pairs(max_length=64)(list(make_answers(3, 2)))
    out = unlearning_forward(model, LOSS, **batch)
    out.loss.backward()
    found = gradients(model)
    model.zero_grad()

    def base_logits(ids):
        with model.disable_adapter():
            return model(ids[None]).logits[0]

    plain = plain_loss(batch, lambda ids: model(ids[None]).logits[0], base_logits)
    plain.backward()
    torch.testing.assert_close(out.loss, plain)
    assert_same(found, gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("kind", ["generic", "alternates"])
def test_a_cached_reference_has_every_pair_that_may_be_drawn(tmp_path, kind, resample):
    model = lora(build("llama"))
    dataset = with_alternates(make_answers(3, 2))
    collator = (pairs if kind == "generic" else alternating)(resample=resample, max_length=64)
    reference = ReferenceCache.build(model, dataset, collator, tmp_path, loss=LOSS)
    assert len(reference) == 3 * ((2 if resample else 1) + 1)  # the drawn ones and the row's own
    for _ in range(4):
        batch = collator(list(dataset))
        live = unlearning_forward(model, LOSS, **batch)
        cached = unlearning_forward(model, LOSS, **batch, reference_logits=reference.logits(batch))
        torch.testing.assert_close(live.loss, cached.loss, rtol=1e-5, atol=1e-6)


# ---- trainer and loops ----


def model_of(trainable):
    if trainable == "prompt":
        return make_unlearner(loss=LOSS)
    base = build("llama")
    zero_dropout(base)
    return lora(base) if trainable == "lora" else base.requires_grad_(True)


@pytest.mark.parametrize("trainable", ["prompt", "lora", "full"])
def test_one_batch_accumulated_batches_and_a_loop_make_the_same_step(tmp_path, trainable):
    dataset, states = make_dataset(7, 9), []
    loss = None if trainable == "prompt" else LOSS
    for size, steps in ((16, 1), (4, 4)):
        model = model_of(trainable)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **ONE_STEP}
        collator = pairs(resample=False)
        trainer = UnlearningTrainer(model, arguments(tmp_path, **settings), collator, dataset, loss=loss)
        trainer.train()
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    model, collator = model_of(trainable), pairs(resample=False)
    reference = ReferenceCache.build(model, dataset, collator, tmp_path / "reference", loss=LOSS)
    batches = [collator([dataset[i] for i in range(start, start + 8)]) for start in (0, 8)]
    counts = step_counts(batches)
    assert counts.tolist() == [7, 9]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for batch in batches:
        more = {"group_counts": counts, "reference_logits": reference.logits(batch)}
        out = model(**batch, **more) if loss is None else unlearning_forward(model, loss, **batch, **more)
        out.loss.backward()
    states.append({name: before[name] - 1e-2 * p.grad for name, p in model.named_parameters() if name in before})
    assert any((states[0][name] - before[name]).abs().max() > 1e-4 for name in before)
    assert_same(states[0], states[1], rtol=0, atol=2e-6)
    assert_same(states[0], states[2], rtol=0, atol=2e-6)


def test_a_loss_and_a_collator_that_do_not_fit_are_refused(tmp_path):
    dataset = make_dataset(3, 3)
    with pytest.raises(ValueError, match=r"DPO compares two responses.*pairs=False; use.*pairs=True"):
        UnlearningTrainer(make_unlearner(loss=LOSS), arguments(tmp_path), make_collator(), dataset)
    with pytest.raises(ValueError, match=r"CrossEntropy does not compare two responses.*pairs=True; use.*pairs=False"):
        UnlearningTrainer(make_unlearner(), arguments(tmp_path), pairs(), dataset)


def test_processes_that_share_a_batch_would_part_its_pairs():
    class Config:
        dispatch_batches, split_batches = True, True

    check_dispatch([], Config, num_processes=1, pairs=True)
    check_dispatch([], Config, num_processes=2)
    with pytest.raises(ValueError, match=r"2 processes would share each batch.*'dispatch_batches': False"):
        check_dispatch([], Config, num_processes=2, pairs=True)
