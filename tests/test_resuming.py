"""A training resumes with the rows and the loss that its checkpoint was made with, and with no others."""

import random
import re

import pytest
import torch
from datasets import Dataset
from helpers import (
    GENERIC,
    arguments,
    assert_same,
    build,
    make_collator,
    make_dataset,
    make_tokenizer,
    make_trainer,
    make_unlearner,
    prompt_state,
    rows,
)
from resumed import STEPS, make, with_rewritten
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from spul import UnlearningLoss, UnlearningTrainer, forget_retain_dataset
from spul.losses import CrossEntropy, KLDivergence
from spul.records import RewrittenRows
from spul.training.resuming import IDENTITY, saving_into


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a training of `make_dataset()`."""
    folder = tmp_path_factory.mktemp("saved")
    make(folder).train()
    return str(folder / "checkpoint-1")


CHANGED = {  # what is passed in place of what was saved, and what the error says of it
    "rows left out": (
        {"dataset": make_dataset(11, 20)},
        ["rows.retain: 21 saved, 20 passed"],
    ),
    "a row replaced": (
        {"dataset": forget_retain_dataset(rows("jane", 11), rows("filn", 21))},
        [r"rows.values: \w{12} saved, \w{12} passed"],
    ),
    "rows in another order": (
        {"dataset": make_dataset().select(range(31, -1, -1))},
        [r"rows.values: \w{12} saved, \w{12} passed"],
    ),
    "sides swapped": (
        {"dataset": forget_retain_dataset(rows("film", 21), rows("jane", 11))},
        ["rows.forget: 11 saved, 21 passed", "rows.retain: 21 saved, 11 passed"],
    ),
    "weights of rows": (
        {"dataset": forget_retain_dataset(rows("jane", 11), rows("film", 21), retain_weight=[2.0] + [1.0] * 20)},
        ["rows.values"],
    ),
    "alpha": ({"loss": UnlearningLoss(alpha=0.25)}, ["loss.alpha: 1.0 saved, 0.25 passed"]),
    "a reduction": (
        {"loss": UnlearningLoss(retain=CrossEntropy(reduction="mean"))},
        ["loss.retain.reduction: auto saved, mean passed"],
    ),
    "a term": (
        {"loss": UnlearningLoss(kl=KLDivergence(direction="forward"))},
        ["loss.kl.direction: reverse saved, forward passed"],
    ),
    "a budget": (
        {"loss": UnlearningLoss(retain_budget=0.1)},
        ["loss.retain_budget: none saved, 0.1 passed", "step_size: none saved, 0.01", "decay: none saved, 0.9"],
    ),
    "generic completions": (
        {"collator": make_collator(generic_completions=[" neutral"])},
        [re.escape(f"generic_completions: {GENERIC} saved, [' neutral'] passed")],
    ),
    "a cut": ({"collator": make_collator(max_length=31)}, ["max_length: 32 saved, 31 passed"]),
    "an end token": ({"collator": make_collator(append_eos=True)}, ["append_eos: False saved, True passed"]),
    "a seed of draws": ({"collator": make_collator(seed=7)}, ["seed_of_draws: 0 saved, 7 passed"]),
    "a seed of the order": ({"seed": 7}, ["seed_of_order: 42 saved, 7 passed"]),
    "shares": ({"own": {"forget_fraction": 0.5}}, ["forget_fraction: none saved, 0.5 passed"]),
    "the rows of a step": ({"gradient_accumulation_steps": 3}, [r"rows_of_a_step: \d+ saved, \d+ passed"]),
    "noise": ({"neftune_noise_alpha": 5.0}, ["neftune_noise_alpha: none saved, 5.0 passed"]),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_resumed_run_of_other_rows_or_loss_is_refused_and_says_which(saved, tmp_path, name):
    passed, expected = CHANGED[name]
    trainer = make(tmp_path, **passed)
    with pytest.raises(ValueError, match="is of a training with other rows or settings") as raised:
        trainer.train(resume_from_checkpoint=saved)
    message = str(raised.value)
    for one in expected:
        assert re.search(one, message)
    assert message.count(" passed") == len(expected)
    assert "in another folder" in message
    assert trainer.state.global_step == 0


def test_another_tokenizer_is_noticed(saved, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["jane film"])
    collator = make_collator()
    collator.tokenizer = collator.encoder.tokenizer = tokenizer
    with pytest.raises(ValueError, match=r"tokenizer: \w{12} saved, \w{12} passed"):
        make(tmp_path, collator=collator).train(resume_from_checkpoint=saved)


def test_another_base_is_noticed(saved, tmp_path):
    unlearner = make_unlearner()
    with torch.no_grad():
        next(unlearner.get_base_model().parameters()).mul_(2)
    with pytest.raises(ValueError, match=r"settings: base: \w{12} saved, \w{12} passed\. Resume"):
        make(tmp_path, unlearner=unlearner).train(resume_from_checkpoint=saved)


def test_a_base_that_is_not_in_memory_is_not_compared(saved, tmp_path, monkeypatch):
    trainer = make(tmp_path, max_steps=2)
    monkeypatch.setattr("spul.training.trainer.fingerprint", lambda base: None)
    trainer.train(resume_from_checkpoint=saved)
    assert trainer.state.global_step == 2


def test_a_whole_model_that_trains_resumes_from_weights_of_its_own(tmp_path):
    """Its weights after a checkpoint are others than before; the rows and the loss are compared."""

    def whole(dataset=None, model=None, **more):
        given = {"loss": UnlearningLoss(), "reference": "cached", "reference_dir": tmp_path / "reference"}
        args = arguments(tmp_path, **{**STEPS, **more})
        model = build("llama") if model is None else model
        return UnlearningTrainer(model, args, make_collator(), dataset or make_dataset(), **given)

    whole().train()
    with pytest.raises(ValueError, match=r"rows\.retain: 21 saved, 20 passed"):
        whole(make_dataset(11, 20)).train(resume_from_checkpoint=True)
    again = whole(max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"settings: base: \w{12} saved, \w{12} passed\. Resume"):
        whole(model=half, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again.args.max_steps = 3
    again.train(resume_from_checkpoint=True)  # with the reference that it has
    assert again.state.global_step == 3


def test_a_whole_model_without_a_reference_resumes_from_any_weights(tmp_path):
    def whole(model, **more):
        args = arguments(tmp_path, **{**STEPS, **more})
        return UnlearningTrainer(model, args, make_collator(), make_dataset(), loss=UnlearningLoss(beta=0.0))

    whole(build("llama")).train()
    again = whole(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1"), max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


@pytest.mark.parametrize("is_saved", [True, False])
def test_rewritten_rows_are_noticed_on_either_side(tmp_path, is_saved):
    sides = (rows("jane", 11), rows("film", 21))
    sets = [forget_retain_dataset(*sides), with_rewritten(*sides)]
    first, second = sets if not is_saved else sets[::-1]
    collator = make_collator(max_length=200)
    make(tmp_path, first, collator=collator).train()
    words = r"\d+ made of forget rows, \d+ made of retain rows \(capitals, .*\)"
    expected = f"rows.rewritten: {words} saved, none passed" if is_saved else f"none saved, {words} passed"
    with pytest.raises(ValueError, match=expected):
        make(tmp_path, second, collator=collator).train(resume_from_checkpoint=True)
    make(tmp_path, first, collator=collator).train(resume_from_checkpoint=True)


def test_rewritten_rows_are_counted_once_for_record_and_identity(tmp_path, monkeypatch):
    calls, of = [], RewrittenRows.of
    monkeypatch.setattr(RewrittenRows, "of", lambda *given: calls.append(given) or of(*given))
    trainer = make(
        tmp_path, with_rewritten(rows("jane", 11), rows("film", 21)), collator=make_collator(max_length=200)
    )
    said = trainer.identity()["rows"]["rewritten"]
    assert said == trainer.unlearner.spul_config.rewritten.in_words()
    assert len(calls) == 1


def test_what_changes_neither_rows_nor_loss_may_change(saved, tmp_path, caplog):
    again = make(
        tmp_path,
        max_steps=2,
        learning_rate=0.2,
        lr_scheduler_type="linear",
        logging_steps=1,
        own={"reference": "live"},
    )
    again.train(resume_from_checkpoint=saved)
    assert again.state.global_step == 2
    assert set(again.lr_scheduler.base_lrs) == {0.01}
    assert "optimizer.learning_rate: 0.01 saved, 0.2 passed, of no effect" in caplog.text
    caplog.clear()
    make(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # with what it began
    assert "of no effect" not in caplog.text


def test_a_checkpoint_that_has_all_steps_takes_none_beyond_them(saved, tmp_path):
    again = make(tmp_path)
    again.train(resume_from_checkpoint=saved)
    assert again.state.global_step == STEPS["max_steps"]


def test_equal_rows_of_another_format_are_the_same(saved, tmp_path):
    listed = make_dataset().to_list()
    again = make(tmp_path, Dataset.from_list(listed).with_format("numpy"), max_steps=2)
    again.train(resume_from_checkpoint=saved)
    assert again.state.global_step == 2


def test_rows_that_a_transform_draws_anew_resume_and_their_numbers_are_compared(tmp_path):
    draws = random.Random(0)

    def drawn(dataset):
        def transform(batch):
            return {**batch, "prompt": [f"{text} {draws.random()}" for text in batch["prompt"]]}

        return dataset.with_transform(transform)

    own = {"reference": "live"}
    make(tmp_path, drawn(make_dataset()), own=own).train()
    again = make(tmp_path, drawn(make_dataset()), own=own, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    fewer = drawn(make_dataset(10, 20))
    with pytest.raises(ValueError, match=r"rows\.forget: 11 saved, 10 passed; rows\.retain: 21 saved, 20 passed"):
        make(tmp_path, fewer, own=own, max_steps=3).train(resume_from_checkpoint=True)


def test_a_transform_reads_every_column_in_training_too(tmp_path):
    styled = make_dataset().add_column("style", ["Sir,"] * 32)

    def with_style(batch):
        return {
            **batch,
            "prompt": [f"{style} {text}" for style, text in zip(batch["style"], batch["prompt"], strict=True)],
        }

    trainer = make(tmp_path, styled.with_transform(with_style))
    trainer.train()
    plain_rows = styled.map(with_style, batched=True).remove_columns("style")
    plain = make(tmp_path / "plain", plain_rows)
    plain.train()
    assert_same(prompt_state(trainer.model), prompt_state(plain.model), rtol=0, atol=0)


def test_a_step_of_as_many_rows_in_other_batches_is_the_same(tmp_path):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    make(tmp_path, **sizes).train()
    more = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2}
    again = make(tmp_path, **more)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_the_rows_themselves_are_not_in_the_state(saved):
    with open(f"{saved}/trainer_state.json", encoding="utf-8") as file:
        text = file.read()
    assert IDENTITY in text
    assert "review" not in text


def test_states_of_callbacks_are_restored_without_a_word_of_what_this_library_keeps_there(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    loss = UnlearningLoss(retain_budget=0.1)
    make_trainer(tmp_path, unlearner=make_unlearner(loss=loss), max_steps=1, **settings).train()
    resumed = make_trainer(tmp_path, unlearner=make_unlearner(loss=loss), max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert "Ignoring" not in caplog.text
    assert {IDENTITY, "RetainMultiplier"} <= set(resumed.state.stateful_callbacks)


def test_an_error_in_a_save_that_is_none_of_writing_stays_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA out of memory"), saving_into(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_rows_of_a_step_are_those_of_the_batch_size_that_was_found(tmp_path):
    settings = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    first = make(tmp_path, **settings)
    step = first.training_step

    def with_memory_for_four(model, inputs, *more, **kwargs):
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *more, **kwargs)

    first.training_step = with_memory_for_four
    first.train()
    checkpoint = str(tmp_path / "checkpoint-1")
    found = first._train_batch_size
    assert found <= 4
    with pytest.raises(ValueError, match=f"rows_of_a_step: {found} saved, 8 passed"):
        make(tmp_path, per_device_train_batch_size=8, max_steps=2).train(resume_from_checkpoint=checkpoint)
    for more in ({"per_device_train_batch_size": found}, settings):  # Trainer goes on with the size that was found
        again = make(tmp_path, **{**more, "max_steps": 2})
        again.train(resume_from_checkpoint=checkpoint)
        assert again.state.global_step == 2
        assert again._train_batch_size == found


def test_rows_dropped_at_the_end_and_lengths_to_group_by_are_noticed(tmp_path):
    grouped = {"train_sampling_strategy": "group_by_length"}
    lengths = list(range(1, 33))
    make(tmp_path, make_dataset().add_column("length", lengths), **grouped).train()
    again = make(tmp_path, make_dataset().add_column("length", lengths[::-1]), max_steps=2, **grouped)
    with pytest.raises(ValueError, match=r"settings: lengths: \w{12} saved, \w{12} passed\. Resume"):
        again.train(resume_from_checkpoint=True)
    same = make_dataset().add_column("length", lengths)
    with pytest.raises(ValueError, match="settings: dataloader_drop_last: False saved, True passed"):
        make(tmp_path, same, max_steps=2, dataloader_drop_last=True, **grouped).train(resume_from_checkpoint=True)
    make(tmp_path, same, max_steps=2, **grouped).train(resume_from_checkpoint=True)


def test_the_batch_size_of_a_checkpoint_that_is_refused_is_not_taken(tmp_path):
    make(tmp_path, per_device_train_batch_size=4).train()
    again = make(tmp_path, loss=UnlearningLoss(alpha=0.25), auto_find_batch_size=True)
    with pytest.raises(ValueError, match=r"settings: loss\.alpha: 1\.0 saved, 0\.25 passed\. Resume"):
        again.train(resume_from_checkpoint=True)
    again.train()
    assert again.state.train_batch_size == 8


def test_a_callback_that_the_checkpoint_did_not_have_is_saved_with_the_next(tmp_path):
    make(tmp_path).train()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "max_steps": 2}
    own = {"callbacks": [EarlyStoppingCallback(3)], "eval_dataset": rows("jane", 3)}
    make(tmp_path, own=own, **settings).train(resume_from_checkpoint=True)
    again = make(tmp_path, own=own, **{**settings, "max_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert "EarlyStoppingCallback" in again.state.stateful_callbacks
