"""Predictions for compute_metrics and predict, against a loop over single rows; evaluation in half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import answers, make_collator, make_trainer, make_unlearner, rows
from likelihoods import plain_logits
from torch import nn

from spul.training.predictions import in_precision

NUM = 7


def some_rows():
    """Completions of one token and of many, so that a batch has unused slots."""
    return answers("jane", NUM)


def given_to(trainer, rows, **kwargs):
    """The arguments of compute_metrics in an evaluation, and the evaluation's metrics."""
    seen = []

    def compute_metrics(prediction, **called):
        seen.append((prediction, called))
        return {"calls": np.float64(len(seen)), "eval_mine": torch.tensor(2.0)}

    trainer.compute_metrics = compute_metrics
    for name, value in kwargs.items():
        setattr(trainer.args, name, value)
    return seen, trainer.evaluate(rows)


def check_logits(model, predictions, label_ids, rows, collator):
    """Row by row, without a batch."""
    assert len(predictions) == len(label_ids) == len(rows)
    for row, logits, labels in zip(rows, predictions, label_ids, strict=True):
        encoded = collator.encoder.encode(row)
        num = len(encoded.completion_ids)
        assert labels[:num].tolist() == encoded.completion_ids
        assert (labels[num:] == -100).all()
        expected = plain_logits(model, encoded.prompt_ids, encoded.completion_ids)
        torch.testing.assert_close(torch.tensor(logits[:num]).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_compute_metrics_gets_logits_and_labels_in_the_order_of_the_rows(tmp_path, batch_size):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=batch_size)
    plain = trainer.evaluate(some_rows())
    seen, metrics = given_to(trainer, some_rows())
    [(prediction, called)] = seen
    assert called == {}
    assert prediction.inputs is None
    assert prediction.losses is None
    model = trainer.model.eval()
    check_logits(model, prediction.predictions, prediction.label_ids, some_rows(), make_collator())
    assert (metrics["eval_calls"], metrics["eval_mine"]) == (1.0, 2.0)
    assert all(metrics[f"eval_{name}"] == plain[f"eval_{name}"] for name in ("accuracy", "f1", "generic", "loss"))
    greedy = (prediction.predictions.argmax(-1) == prediction.label_ids) | (prediction.label_ids == -100)
    assert greedy.all(axis=1).mean() == metrics["eval_accuracy"]


def test_every_set_of_a_dict_is_computed_and_the_record_keeps_its_own_measures(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.compute_metrics = lambda prediction: {"accuracy": 17.0, "rows": len(prediction.label_ids)}
    metrics = trainer.evaluate({"forget": rows("jane", 3), "retain": rows("film", 5)})
    assert (metrics["eval_forget_rows"], metrics["eval_retain_rows"]) == (3, 5)
    assert metrics["eval_forget_accuracy"] == 17.0
    assert 0 <= trainer.model.spul_config.metrics["forget"]["accuracy"] <= 1


def test_inputs_and_losses_come_where_they_are_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=3)
    seen, metrics = given_to(trainer, some_rows(), include_for_metrics=["inputs", "loss"])
    [(prediction, _)] = seen
    assert prediction.losses.mean() == pytest.approx(metrics["eval_loss"], rel=1e-5)
    encoder = make_collator().encoder
    for row, ids in zip(some_rows(), prediction.inputs, strict=True):
        encoded = encoder.encode(row)
        assert ids[: len(encoded)].tolist() == encoded.prompt_ids + encoded.completion_ids


def test_labels_are_the_entries_of_the_batch_that_label_names_names(tmp_path):
    numbered = some_rows().add_column("row_id", list(range(100, 100 + NUM)))
    trainer = make_trainer(tmp_path, label_names=["labels", "row_id"])
    seen, _ = given_to(trainer, numbered)
    labels, ids = seen[0][0].label_ids
    assert ids.tolist() == list(range(100, 100 + NUM))
    assert labels.shape == seen[0][0].predictions.shape[:2]
    with pytest.raises(ValueError, match="the evaluation rows have no row_id"):
        trainer.evaluate(some_rows())
    with pytest.raises(ValueError, match=r"label_names=\['answer'\]: a collated batch has no answer"):
        make_trainer(tmp_path, label_names=["answer"])


def test_logits_can_be_reduced_before_they_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    seen, _ = given_to(trainer, some_rows())
    whole = seen[0][0]
    trainer.preprocess_logits_for_metrics = lambda logits, labels: (logits.argmax(-1), labels * 2)
    seen, _ = given_to(trainer, some_rows())
    chosen, doubled = seen[0][0].predictions
    used = whole.label_ids != -100
    assert (chosen[used] == whole.predictions.argmax(-1)[used]).all()
    assert (doubled[used] == 2 * whole.label_ids[used]).all()


def test_metrics_by_batch_end_with_the_last_and_keep_no_batch(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=3)
    seen, metrics = given_to(trainer, some_rows(), batch_eval_metrics=True)
    assert [called["compute_result"] for _, called in seen] == [False, False, True]
    assert [len(prediction.label_ids) for prediction, _ in seen] == [3, 3, 1]
    assert all(torch.is_tensor(prediction.predictions) for prediction, _ in seen)
    assert metrics["eval_calls"] == 3


def test_batches_stay_apart_where_that_is_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=3, eval_do_concat_batches=False)
    seen, _ = given_to(trainer, some_rows())
    assert [len(labels) for labels in seen[0][0].label_ids] == [3, 3, 1]
    assert trainer.predict(some_rows()).metrics["test_loss"] > 0


def test_losses_only_calls_no_function(tmp_path):
    seen, metrics = given_to(make_trainer(tmp_path, prediction_loss_only=True), some_rows())
    assert seen == []
    assert "eval_calls" not in metrics


def test_predict_returns_what_compute_metrics_is_given(tmp_path):
    trainer = make_trainer(tmp_path)
    seen, metrics = given_to(trainer, some_rows())
    found = trainer.predict(some_rows(), metric_key_prefix="held")
    np.testing.assert_array_equal(found.predictions, seen[0][0].predictions)
    np.testing.assert_array_equal(found.label_ids, seen[0][0].label_ids)
    assert found.metrics["held_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert found.metrics["held_calls"] == 2


def test_metrics_of_the_users_choose_the_best_checkpoint(tmp_path):
    values = iter([3.0, 1.0, 2.0])
    trainer = make_trainer(
        tmp_path,
        eval_dataset={"forget": rows("jane", 4)},
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="forget_mine",
        greater_is_better=False,
    )
    trainer.compute_metrics = lambda prediction: {"mine": next(values)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


# ---- precision ----


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_an_evaluation_in_half_precision_leaves_the_model_as_it_was(tmp_path, half):
    trainer = make_trainer(tmp_path, max_steps=2)
    twin = make_unlearner().to(torch.float16 if half == "fp16" else torch.bfloat16)
    expected = make_trainer(tmp_path, unlearner=twin).evaluate(some_rows())["eval_loss"]
    whole = trainer.evaluate(some_rows())["eval_loss"]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    setattr(trainer.args, f"{half}_full_eval", True)
    found = trainer.evaluate(some_rows())["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != whole
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert trainer.predict(some_rows()).metrics["test_loss"] == pytest.approx(expected, rel=1e-2)
    setattr(trainer.args, f"{half}_full_eval", False)
    assert trainer.evaluate(some_rows())["eval_loss"] == whole


def test_training_after_and_evaluation_within_are_in_the_models_own_precision(tmp_path):
    logs = []
    for options in ({}, {"bf16_full_eval": True}):
        settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, **options}
        trainer = make_trainer(tmp_path, eval_dataset=rows("jane", 5), **settings)
        trainer.evaluate()
        trainer.train()
        logs.append([entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history])
    assert logs[0] == logs[1]


def test_weights_of_whole_numbers_and_tied_ones_keep_what_they_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.other.weight = self.one.weight
            self.register_buffer("count", torch.tensor([1, 2]))

    model = Model()
    before = model.one.weight.data_ptr()

    def fail():
        with in_precision(model, torch.bfloat16, torch.device("cpu")):
            assert model.one.weight is model.other.weight
            assert (model.one.weight.dtype, model.count.dtype) == (torch.bfloat16, torch.int64)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (model.one.weight.dtype, model.one.weight.data_ptr()) == (torch.float32, before)
    with in_precision(model, None, torch.device("cpu")):
        assert model.one.weight.dtype == torch.float32


@pytest.mark.parametrize("returned", [None, 3.0])
def test_metrics_that_are_no_dict_are_refused(tmp_path, returned):
    trainer = make_trainer(tmp_path, eval_dataset=rows("jane", 3))
    trainer.compute_metrics = lambda prediction: returned
    with pytest.raises(TypeError, match=f"compute_metrics returned {returned}, a .*; expected a dict of names"):
        trainer.evaluate()
