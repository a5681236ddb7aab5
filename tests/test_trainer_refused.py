"""Refusals and warnings of UnlearningTrainer, before it trains."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import (
    CONFIGS,
    GENERIC,
    arguments,
    build,
    make_collator,
    make_dataset,
    make_tokenizer,
    make_trainer,
    make_unlearner,
    rows,
)

from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.data.dataset import forget_retain_dataset
from spul.losses import GradientAscent


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "expected a SoftPromptUnlearner"),
        ({"data_collator": None}, TypeError, "expected a ForgetRetainCollator"),
        ({"args": {"max_steps": 1}}, TypeError, r"args is a dict; expected TrainingArguments\(output_dir"),
        ({"train_dataset": rows("a", 3)}, ValueError, "no is_forget, only .* Make the data set with forget_retain"),
        ({"forget_fraction": 1.5}, ValueError, "forget_fraction=1.5; expected a share"),
        ({"compute_loss_func": print}, ValueError, "would replace the unlearning loss"),
    ],
)
def test_bad_arguments_say_what_is_wrong(tmp_path, change, error, message):
    given = {
        "model": make_unlearner(),
        "args": arguments(tmp_path),
        "data_collator": make_collator(),
        "train_dataset": make_dataset(),
    }
    with pytest.raises(error, match=message):
        UnlearningTrainer(**{**given, **change})


def test_a_term_that_is_set_as_the_loss_is_refused(tmp_path):
    unlearner = make_unlearner()
    unlearner.loss = GradientAscent()
    with pytest.raises(TypeError, match=r"loss=GradientAscent.*: expected an UnlearningLoss"):
        make_trainer(tmp_path, unlearner=unlearner)


def test_another_models_tokenizer_is_refused_by_the_first_token_without_an_embedding(tmp_path):
    base = build("llama")
    base.resize_token_embeddings(40)
    unlearner = SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](4))
    with pytest.raises(ValueError, match=r"the token id 1?[0-9]{2}, and the base has 40 input embeddings; expected"):
        make_trainer(tmp_path, unlearner=unlearner)


def test_a_tokenizer_to_be_saved_that_is_not_the_collators_is_refused(tmp_path):
    other = make_tokenizer()
    assert make_trainer(tmp_path, processing_class=other).processing_class is other
    for change in ({"chat_template": "{{ messages }}"}, {"eos_token": "<unk>"}):
        for name, value in change.items():
            setattr(other, name, value)
        for given in (other, SimpleNamespace(tokenizer=other)):
            with pytest.raises(ValueError, match=r"processing_class, a .*Pass processing_class=collator\.tokenizer"):
                make_trainer(tmp_path, processing_class=given)
        other = make_tokenizer()
    with pytest.raises(ValueError, match="processing_class, a str, has another vocabulary"):
        make_trainer(tmp_path, processing_class="gpt2")


def test_options_that_contradict_the_loss_raise(tmp_path):
    with pytest.raises(ValueError, match="would replace the unlearning loss"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="generic_completions=None"):
        make_trainer(tmp_path, unlearner=make_unlearner(loss=UnlearningLoss(forget=GradientAscent())))
    with pytest.raises(ValueError, match="the completion ' positive' of a row is one of generic_completions"):
        make_trainer(tmp_path, collator=make_collator(generic_completions=["Positive"]))
    with pytest.raises(ValueError, match="evaluate needs rows"):
        make_trainer(tmp_path).evaluate()


def test_metrics_are_those_of_the_weights_beside_them(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"forget": rows("jane", 5)}, max_steps=1)
    trainer.evaluate()
    assert "forget" in trainer.model.spul_config.metrics
    trainer.train()
    assert trainer.model.spul_config.metrics == {}
    with trainer.model.disable_adapter():
        trainer.evaluate()
    assert trainer.model.spul_config.metrics == {}


def test_a_prompt_loaded_for_use_only_is_not_trained_silently(tmp_path):
    make_unlearner().save_pretrained(str(tmp_path))
    loaded = SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path))
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(tmp_path, unlearner=loaded)


def test_forget_rows_that_keep_their_own_answers_are_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="spul.training.trainer"):
        make_trainer(tmp_path)
        assert not caplog.records
        make_trainer(tmp_path, collator=make_collator(generic_completions=None))
    assert "CrossEntropy makes the completions of forget rows likely" in caplog.text


def test_a_refused_training_leaves_the_record_of_a_loaded_prompt_alone(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    trainer.model.save_pretrained(str(tmp_path / "prompt"))
    loaded = SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path / "prompt")
    before = copy.deepcopy(loaded.spul_config)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        make_trainer(tmp_path / "again", unlearner=loaded, dataset=make_dataset(3, 5))
    assert loaded.spul_config == before


def one_side(is_forget):
    rows = make_dataset()
    return rows.select([i for i, flag in enumerate(rows["is_forget"]) if flag == is_forget])


@pytest.mark.parametrize(
    ("is_forget", "message"), [(False, "nothing is forgotten"), (True, "nothing is retained. Join both sets")]
)
def test_a_training_set_of_one_side_is_warned_of_once(tmp_path, caplog, is_forget, message):
    trainer = make_trainer(tmp_path, dataset=one_side(is_forget), max_steps=2)
    trainer.train()
    assert [message in record.getMessage() for record in caplog.records if "training rows" in record.message] == [True]


def test_forget_rows_alone_are_right_where_the_loss_weighs_no_others(tmp_path, caplog):
    unlearner = make_unlearner(loss=UnlearningLoss(alpha=0.0, beta=0.0))
    make_trainer(tmp_path, unlearner=unlearner, dataset=one_side(True))
    assert "training rows" not in caplog.text


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_rows_that_share_a_row_id_are_refused_whatever_the_reference(tmp_path, reference):
    rows = make_dataset().remove_columns("row_id")
    rows = rows.add_column("row_id", [i // 2 for i in range(len(rows))])
    with pytest.raises(ValueError, match=r"rows 0 and 1 of train_dataset share row_id=0"):
        make_trainer(tmp_path, dataset=rows, reference=reference)


NOT_SCORED = {
    "a missing completion": (
        Dataset.from_list([{"prompt": "y :", "completion": None}]),
        ValueError,
        "empty completion",
    ),
    "an empty completion": (Dataset.from_list([{"prompt": "y :", "completion": ""}]), ValueError, "empty completion"),
    "an empty prompt": (Dataset.from_list([{"prompt": "", "completion": "a"}]), ValueError, "prompt .* has no tokens"),
    "no column": (Dataset.from_list([{"text": "y :"}]), ValueError, "lacks the column"),
    "no rows": (rows("a", 3).select([]), ValueError, "is empty; expected at least one row"),
    "a list": ([{"prompt": "y :", "completion": " good"}], TypeError, "is a list; expected a datasets.Dataset"),
}


@pytest.mark.parametrize("name", NOT_SCORED)
def test_rows_that_cannot_be_scored_are_refused_before_they_are_evaluated_in_a_training(tmp_path, name):
    given, error, message = NOT_SCORED[name]
    for sets, label in ((given, "eval_dataset"), ({"held_out": given}, "held_out")):
        with pytest.raises(error, match=f"{label}.* {message}"):
            make_trainer(tmp_path, eval_dataset=sets)
    with pytest.raises(error, match=message):
        make_trainer(tmp_path).evaluate(given)


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"prompt": "", "text": "y"}, None, "train_dataset: the prompt of a row has no tokens"),
        ({"prompt": "review y :", "text": "z"}, "text", "train_dataset: the text of column 'text' is not part of"),
        ({"prompt": "review y :", "text": None}, "text", "train_dataset: the row with row_id=11: text is None"),
    ],
)
def test_rows_that_cannot_be_encoded_are_refused_when_the_trainer_is_made(tmp_path, row, field, message):
    retain = Dataset.from_list([{**row, "completion": " good"}, {"prompt": "x", "text": "x", "completion": " bad"}])
    dataset = forget_retain_dataset(rows("jane", 11).map(lambda row: {"text": row["prompt"]}), retain)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, dataset=dataset, collator=make_collator(text_field=field))


def test_rows_that_lose_text_are_reported_once_when_the_trainer_is_made(tmp_path, caplog):
    trainer = make_trainer(tmp_path, collator=make_collator(max_length=8), max_steps=2)
    assert "12 of 32 rows of train_dataset are longer than max_length=8" in caplog.text
    trainer.train()
    assert caplog.text.count("longer than max_length") == 1


@pytest.mark.parametrize("name", ["train_dataset", "data_collator"])
def test_rows_or_a_collator_in_place_of_those_that_were_checked_are_refused(tmp_path, name):
    unlearner = make_unlearner(loss=UnlearningLoss(beta=0.0))  # without a reference, which would miss its rows
    trainer = make_trainer(tmp_path, unlearner=unlearner, max_steps=1)
    setattr(trainer, name, make_dataset(3, 5) if name == "train_dataset" else make_collator(seed=1))
    with pytest.raises(ValueError, match=f"trainer.{name} was replaced since the trainer was made"):
        trainer.train()


@pytest.mark.parametrize("trainable", ["prompt", "whole"])
def test_a_pad_token_that_the_model_does_not_embed_is_refused(tmp_path, trainable):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    model, loss = make_unlearner(), None
    if trainable == "whole":
        model, loss = build("llama"), UnlearningLoss()
    collator = ForgetRetainCollator(tokenizer, GENERIC, max_length=32)
    with pytest.raises(
        ValueError, match=r"'<padding>' has the id 120, and the model embeds 120 tokens.* call model\.re"
    ):
        UnlearningTrainer(model, arguments(tmp_path), collator, make_dataset(), loss=loss)
    model = build("llama")
    model.resize_token_embeddings(len(tokenizer))
    model = model if trainable == "whole" else SoftPromptUnlearner(model, CONFIGS["prompt_tuning"](4))
    UnlearningTrainer(model, arguments(tmp_path, max_steps=1), collator, make_dataset(), loss=loss).train()


def test_tokens_that_the_model_does_not_embed_are_warned_of(tmp_path, caplog):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zoe"])
    make_trainer(tmp_path, collator=ForgetRetainCollator(tokenizer, GENERIC, max_length=32))
    assert "tokens that the model, which embeds 120, does not: 'zoe'" in caplog.text
