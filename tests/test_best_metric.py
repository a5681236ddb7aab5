"""The metric of the best checkpoint is one that evaluations have, and does not choose what forgot least."""

import pytest
from helpers import make_dataset, make_trainer, rows
from transformers import TrainerCallback

SETS = {"train_forget": rows("jane", 3), "train_retain": rows("film", 3)}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
BEST |= {"load_best_model_at_end": True}


def trained(folder, sets=None, **settings):
    trainer = make_trainer(folder, eval_dataset=SETS if sets is None else sets, **{**BEST, **settings})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric_for_best_model": "eval_forget_accuracy"},
        {"load_best_model_at_end": False, "lr_scheduler_type": "reduce_lr_on_plateau"},
    ],
)
def test_a_metric_that_no_set_has_is_refused_before_the_first_step(tmp_path, settings):
    trainer = make_trainer(tmp_path, eval_dataset=SETS, **{**BEST, **settings})
    with pytest.raises(ValueError, match=r"is no metric of eval_dataset.*train_forget_accuracy, .*train_retain_loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_metrics_that_sets_have_are_taken(tmp_path):
    for i, (sets, name) in enumerate(
        [(SETS, "train_retain_f1"), (SETS, "eval_train_retain_loss"), (rows("a", 3), None)]
    ):
        named = {} if name is None else {"metric_for_best_model": name}
        assert trained(tmp_path / str(i), sets, **named).state.best_model_checkpoint.endswith("checkpoint-1")


def test_a_metric_that_a_callback_adds_is_taken(tmp_path):
    class Adds(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_mine"] = 1.0

    assert trained(tmp_path, callbacks=[Adds()], metric_for_best_model="mine").state.best_metric == 1.0


@pytest.mark.parametrize(
    ("name", "better", "is_warned"),
    [
        ("eval_train_forget_accuracy", None, True),
        ("train_forget_accuracy", False, False),
        ("train_forget_loss", None, True),
        ("train_forget_loss", True, False),
        ("train_forget_generic", None, False),
        ("train_retain_accuracy", None, False),
    ],
)
def test_a_best_checkpoint_that_forgot_least_is_warned_of(tmp_path, caplog, name, better, is_warned):
    trained(tmp_path, metric_for_best_model=name, greater_is_better=better)
    assert ("forgot least" in caplog.text) == is_warned


@pytest.mark.parametrize("flag", [True, False])
def test_flags_of_rows_say_which_are_forgotten_before_the_name_of_their_set_does(tmp_path, caplog, flag):
    name = "retain" if flag else "forget"
    some = make_dataset().filter(lambda row: row["is_forget"] == flag)
    trained(tmp_path, {name: some}, metric_for_best_model=f"{name}_accuracy")
    assert ("forgot least" in caplog.text) == flag
