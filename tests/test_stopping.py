"""Training stops when held-out forget rows are forgotten within the margin, and the best weights are loaded."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from helpers import (
    arguments,
    make_collator,
    make_dataset,
    make_trainer,
    make_unlearner,
    rows,
    scored,
    trainable_model,
)
from transformers import TrainerCallback

from spul import UnlearningLoss, UnlearningTrainer
from spul.data import forget_retain_dataset, hold_out
from spul.losses import GradientAscent
from spul.models.noise import zero_dropout
from spul.training import HeldOutScore, StopWhenForgotten

BASE = 90.0
TRAINABLES = ("prompt_tuning", "p_tuning", "prefix_tuning", "layers", "lora", "full")


def held_out():
    return rows("jill", 4), rows("play", 6)


def trainer_of(folder, trainable="prompt_tuning", **kwargs):
    if "tuning" in trainable:
        return make_trainer(folder, trainable, **kwargs)
    model = trainable_model(trainable, dtype=torch.float32)
    zero_dropout(model)
    loss = UnlearningLoss(alpha=0.0, beta=0.0, forget=GradientAscent())
    return UnlearningTrainer(
        model, arguments(folder, **kwargs), make_collator(generic_completions=None), make_dataset(), loss=loss
    )


def told(monkeypatch, trainer, scores):
    """The trainer scores rows as told: (forget accuracy, retain accuracy) in percent, by step."""

    def score(rows, name):
        forget, retain = scores[trainer.state.global_step] if trainer.state.global_step else (BASE, BASE)
        return {"accuracy": (forget if "forget" in name else retain) / 100, "generic": 0.25}

    monkeypatch.setattr(trainer, "score", score)


class Weights(TrainerCallback):
    """Keeps what trains, by step."""

    def __init__(self, model):
        self.model, self.after = model, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = weights(self.model)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def watched(monkeypatch, folder, scores, trainable="prompt_tuning", max_steps=None, **kwargs):
    """A trainer, its callback and its weights by step, before training, scored as told after every step."""
    trainer = trainer_of(folder, trainable, max_steps=max_steps or max(scores))
    told(monkeypatch, trainer, scores)
    stop, kept = StopWhenForgotten(trainer, *held_out(), **{"every": 1, **kwargs}), Weights(trainer.model)
    trainer.add_callback(kept)
    trainer.add_callback(stop)
    return trainer, stop, kept


# ---- when it stops ----


@pytest.mark.parametrize(
    ("forget", "retain", "kwargs", "last", "best"),
    [
        ([80, 4, 3, 3, 3, 3], [90] * 6, {}, 5, 3),  # 3 %, and two scorings no better
        ([80, 4, 3, 0, 1, 1], [90] * 6, {}, 4, 4),  # nothing is left to forget
        ([80, 4, 3, 0, 1, 1], [90] * 6, {"patience": 0}, 2, 2),  # the first that meets the target
        ([0, 0, 4, 4, 4, 4], [50, 88.9, 89, 89, 89, 89], {}, 5, 3),  # what is outside the margin does not count
        ([0, 0, 4, 4, 4, 4], [50, 88.9, 89, 89, 89, 89], {"margin": 2}, 2, 2),
        ([80, 20, 10, 10, 10, 10], [90] * 6, {"target": 10.0}, 5, 3),
        ([80, 20, 10, 10, 10, 10], [90] * 6, {}, 6, 3),  # never met: as scheduled
        ([4, 4, 4, 4, 4, 4], [89, 90, 91, 91, 90, 91], {}, 5, 3),  # of equal ones the highest retain accuracy
        ([50, 40, 30, 20, 10, 0], [70, 72, 88, 60, 50, 40], {}, 6, 3),  # nothing within: the highest retain accuracy
    ],
)
def test_it_stops_when_forgetting_has_leveled_off_within_the_margin(
    tmp_path, monkeypatch, forget, retain, kwargs, last, best
):
    scores = dict(enumerate(zip(forget, retain, strict=True), start=1))
    trainer, stop, kept = watched(monkeypatch, tmp_path, scores, **kwargs)
    trainer.train()
    assert trainer.state.global_step == last
    assert stop.best.step == best
    assert [score.step for score in stop.scores] == list(range(1, last + 1))
    assert same(weights(trainer.model), kept.after[best])


def test_rows_are_scored_every_so_often_and_after_the_last_step(tmp_path, monkeypatch):
    scores = dict.fromkeys(range(1, 8), (80, 90))
    trainer, stop, _ = watched(monkeypatch, tmp_path, scores, every=3)
    trainer.train()
    assert [score.step for score in stop.scores] == [3, 6, 7]
    logged = [log for log in trainer.state.log_history if "held_out_forget_accuracy" in log]
    assert [(log["step"], log["held_out_retain_accuracy"]) for log in logged] == [(3, 0.9), (6, 0.9), (7, 0.9)]


def test_what_was_not_reached_is_warned_of_with_its_numbers(tmp_path, monkeypatch, caplog):
    trainer, stop, _ = watched(monkeypatch, tmp_path, {1: (60, 90), 2: (20, 89.5), 3: (0, 80)})
    trainer.train()
    assert not stop.is_met
    message = caplog.text
    assert "at most 5 % of forget rows answered and retain accuracy of at least 89.0 % (the base's 90.0 %" in message
    assert "forget accuracy 20.0 % (generic 25.0 %) and retain accuracy 89.5 % at step 2 of 3" in message
    assert str(tmp_path / "checkpoint-2") in message
    assert "within the margin" in message


def test_what_was_reached_is_not_warned_of(tmp_path, monkeypatch, caplog):
    trainer, stop, _ = watched(monkeypatch, tmp_path, {1: (60, 90), 2: (0, 89.5)})
    trainer.train()
    assert stop.is_met
    assert "not forgotten" not in caplog.text


def test_held_out_rows_that_the_base_does_not_know_are_warned_of(tmp_path, monkeypatch, caplog):
    trainer, *_ = watched(monkeypatch, tmp_path, {1: (95, 90)}, target=92.0)
    trainer.train()
    assert "the base itself answers 90.0 % of the held-out forget rows" in caplog.text


def test_a_training_too_short_to_be_scored_is_warned_of(tmp_path, monkeypatch, caplog):
    class Stopping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer, stop, _ = watched(monkeypatch, tmp_path, {9: (80, 90)}, every=5)
    trainer.add_callback(Stopping())
    trainer.train()
    assert stop.best is None
    assert "before the first scoring" in caplog.text


# ---- what it scores ----


@pytest.mark.parametrize("trainable", ["prompt_tuning", "layers", "lora", "full"])
def test_scores_are_those_of_the_rows_under_what_trains_and_of_the_base_without_it(tmp_path, trainable):
    trainer = trainer_of(tmp_path, trainable, max_steps=1, learning_rate=0.1)
    forget, retain = held_out()
    stop = StopWhenForgotten(trainer, forget, retain, every=1, margin=0)
    trainer.add_callback(stop)
    with trainer.unlearner.disable_adapter():
        base = [scored(trainer.model, rows) for rows in (forget, retain)]
    trained = [(name, p.requires_grad) for name, p in trainer.model.named_parameters()]
    trainer.train()
    assert stop.base[:2] + stop.base[3:] == (0, 100 * base[0]["accuracy"], 100 * base[1]["accuracy"])
    found = [scored(trainer.model, rows)["accuracy"] for rows in (forget, retain)]
    assert stop.scores == [HeldOutScore(1, 100 * found[0], stop.scores[0].forget_generic, 100 * found[1])]
    assert [(name, p.requires_grad) for name, p in trainer.model.named_parameters()] == trained


def test_scoring_does_not_change_training(tmp_path, monkeypatch):
    monkeypatch.setattr(StopWhenForgotten, "is_done", False)
    plain, watched = (make_trainer(tmp_path / name, max_steps=4) for name in ("plain", "watched"))
    watched.add_callback(StopWhenForgotten(watched, *held_out(), every=1))
    kept = Weights(watched.model)
    watched.add_callback(kept)
    plain.train()
    watched.train()
    assert same(weights(plain.model), kept.after[4])


def test_a_second_training_starts_anew(tmp_path, monkeypatch):
    trainer, stop, _ = watched(monkeypatch, tmp_path, {1: (60, 90), 2: (50, 90)})
    trainer.train()
    trainer.train()
    assert [score.step for score in stop.scores] == [1, 2]


# ---- checkpoints ----


@pytest.mark.parametrize("trainable", TRAINABLES)
def test_the_best_weights_are_loaded_whatever_trains(tmp_path, monkeypatch, trainable):
    scores = {1: (60, 90), 2: (20, 90), 3: (20, 80), 4: (20, 80)}
    trainer, stop, kept = watched(monkeypatch, tmp_path, scores, trainable)
    trainer.train()
    assert stop.best.step == 2
    assert not same(kept.after[2], kept.after[4])
    assert same(weights(trainer.model), kept.after[2])


def test_the_best_checkpoint_outlives_a_limit_of_checkpoints(tmp_path, monkeypatch):
    trainer, _, kept = watched(
        monkeypatch, tmp_path, {1: (60, 90), 2: (20, 90), 3: (30, 90), 4: (30, 90), 5: (30, 90)}
    )
    trainer.args.save_strategy, trainer.args.save_steps, trainer.args.save_total_limit = "steps", 1, 1
    trainer.state.save_steps = 1
    trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert not (tmp_path / "checkpoint-1").exists()
    assert same(weights(trainer.model), kept.after[2])


@pytest.mark.parametrize("trainable", ["prompt_tuning", "full"])
@pytest.mark.parametrize("resumed_from", [1, 2, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, trainable, resumed_from):
    scores = {1: (60, 90), 2: (4, 90), 3: (20, 90), 4: (4, 89), 5: (0, 80), 6: (0, 80)}
    whole, stop, _ = watched(monkeypatch, tmp_path / "run", scores, trainable, patience=3)
    whole.args.save_strategy, whole.args.save_steps = "steps", 2
    whole.train()
    assert whole.state.global_step == 5
    stored = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [score["step"] for score in stored["stateful_callbacks"]["stop_when_forgotten"]["scores"]] == [1, 2, 3, 4]

    for step in range(resumed_from + 1, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}", ignore_errors=True)
    again, stop_again, _ = watched(monkeypatch, tmp_path / "run", scores, trainable, patience=3)
    again.args.save_strategy, again.args.save_steps = "steps", 2
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{resumed_from}"))
    assert again.state.global_step == 5
    assert stop_again.scores == stop.scores
    assert stop_again.base == stop.base
    assert same(weights(again.model), weights(whole.model))
    assert again.state.best_model_checkpoint == whole.state.best_model_checkpoint


def test_the_best_checkpoint_that_is_gone_raises(tmp_path, monkeypatch):
    class Losing(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            shutil.rmtree(state.best_model_checkpoint)

    trainer, *_ = watched(monkeypatch, tmp_path, {1: (60, 90), 2: (70, 90)})
    trainer.add_callback(Losing())
    with pytest.raises(FileNotFoundError, match=r"the best checkpoint of this training, .*checkpoint-1, is gone"):
        trainer.train()


def test_a_moved_run_resumes_and_one_without_its_best_checkpoint_says_so_at_once(tmp_path, monkeypatch):
    scores = {1: (60, 90), 2: (70, 90), 3: (80, 90)}
    trainer, _, kept = watched(monkeypatch, tmp_path / "run", scores)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
    trainer.train()
    (tmp_path / "run").rename(tmp_path / "moved")
    again, *_ = watched(monkeypatch, tmp_path / "moved", scores)
    again.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    assert same(weights(again.model), kept.after[1])
    shutil.rmtree(tmp_path / "moved" / "checkpoint-1")
    again, stop, _ = watched(monkeypatch, tmp_path / "moved", scores)
    with pytest.raises(FileNotFoundError, match="or resume from a checkpoint before it"):
        again.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    assert len(stop.scores) == 2


def test_scores_of_other_held_out_rows_are_not_gone_on_with(tmp_path, monkeypatch):
    scores = {1: (60, 90), 2: (40, 90)}
    watched(monkeypatch, tmp_path, {1: scores[1]})[0].train()
    again = trainer_of(tmp_path, max_steps=2)
    told(monkeypatch, again, scores)
    _, retain = held_out()
    again.add_callback(StopWhenForgotten(again, rows("jim", 4), retain, every=1))
    with pytest.raises(ValueError, match="has scores of other held-out forget rows than those passed"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 1


def test_a_checkpoint_of_before_held_out_rows_were_noted_resumes(tmp_path, monkeypatch):
    watched(monkeypatch, tmp_path, {1: (60, 90)})[0].train()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["stop_when_forgotten"]["rows"]
    path.write_text(json.dumps(state))
    trainer, stop, _ = watched(monkeypatch, tmp_path, {1: (60, 90), 2: (40, 90)})
    trainer.train(resume_from_checkpoint=True)
    assert [score.step for score in stop.scores] == [1, 2]


class Scores(TrainerCallback):
    """Asks for scores or logits in training, as a callback of the user's may."""

    def __init__(self, ask):
        self.ask = ask

    def on_step_end(self, args, state, control, **kwargs):
        self.ask()


@pytest.mark.parametrize("asks", ["score", "evaluate", "predict", "StopWhenForgotten", "eval_strategy"])
def test_memory_that_runs_out_in_scoring_does_not_begin_training_again_with_fewer_rows(tmp_path, monkeypatch, asks):
    begun = []

    def runs_out(*args, **kwargs):
        begun.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    of_trainer = {"eval_strategy": "steps", "eval_steps": 1} if asks == "eval_strategy" else {}
    some = rows("jane", 3)
    trainer = make_trainer(tmp_path, max_steps=1, auto_find_batch_size=True, eval_dataset=some, **of_trainer)
    calls = {"score": lambda: trainer.score(some, "rows"), "evaluate": trainer.evaluate}
    calls["predict"] = lambda: trainer.predict(some)
    if asks in calls:
        trainer.add_callback(Scores(calls[asks]))
    elif asks == "StopWhenForgotten":
        trainer.add_callback(StopWhenForgotten(trainer, *held_out()))
    for name in ("collect_answers", "predict_rows"):
        monkeypatch.setattr(f"spul.training.evaluation.{name}", runs_out)
    with pytest.raises(RuntimeError, match="per_device_eval_batch_size=8; lower it"):
        trainer.train()
    assert begun == [True]


def test_a_whole_model_resumed_without_its_bases_score_is_refused(tmp_path):
    before = trainer_of(tmp_path, "full", max_steps=2, save_strategy="steps", save_steps=1)
    before.train()
    trainer = trainer_of(tmp_path, "full", max_steps=2)
    trainer.add_callback(StopWhenForgotten(trainer, *held_out()))
    with pytest.raises(ValueError, match="from a checkpoint without scores of StopWhenForgotten"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"every": 0}, ValueError, "every=0; expected a whole number from 1"),
        ({"every": True}, ValueError, "every=True"),
        ({"every": 2.5}, ValueError, "every=2.5"),
        ({"patience": -1}, ValueError, "patience=-1; expected a whole number from 0"),
        ({"margin": -1}, ValueError, "margin=-1; expected points of accuracy"),
        ({"margin": "1"}, ValueError, "margin='1'"),
        ({"target": 100}, ValueError, "target=100"),
        ({"target": float("nan")}, ValueError, "target=nan"),
        ({"forget": [{"prompt": "a", "completion": "b"}]}, TypeError, "forget is a list"),
        ({"retain": Dataset.from_list([])}, ValueError, "retain is empty"),
        (
            {"retain": Dataset.from_list([{"prompt": "", "completion": " b"}])},
            ValueError,
            "retain: the prompt of a row",
        ),
        ({"retain": Dataset.from_list([{"prompt": "a"}])}, ValueError, "retain lacks the column"),
        ({"forget": rows("jane", 2)}, ValueError, r"2 prompt\(s\) of the held-out forget rows are trained on"),
        ({"retain": rows("film", 3)}, ValueError, r"3 prompt\(s\) of the held-out retain rows are trained on"),
        ({"trainer": None}, TypeError, "trainer is a NoneType"),
    ],
)
def test_bad_arguments_say_what_is_wrong(tmp_path, change, error, message):
    forget, retain = held_out()
    given = {"trainer": make_trainer(tmp_path), "forget": forget, "retain": retain, **change}
    with pytest.raises(error, match=message):
        StopWhenForgotten(**given)


def test_rows_drawn_by_weight_are_compared_with_held_out_ones_too(tmp_path):
    weighted = forget_retain_dataset(rows("jane", 4), rows("film", 4), retain_weight=[1.0, 2.0, 1.0, 1.0])
    trainer = make_trainer(tmp_path, dataset=weighted)
    with pytest.raises(ValueError, match="held-out forget rows are trained on"):
        StopWhenForgotten(trainer, rows("jane", 1), rows("play", 2))


def test_a_best_checkpoint_of_trainers_own_is_refused(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    trainer = make_trainer(tmp_path, unlearner=make_unlearner(), eval_dataset=rows("x", 2), **best)
    with pytest.raises(ValueError, match="load_best_model_at_end=True with metric_for_best_model='loss'"):
        StopWhenForgotten(trainer, *held_out())


def test_rows_held_out_of_a_set_stop_a_training_on_the_others(tmp_path):
    train, forget, retain = hold_out(make_dataset(), 0.3)
    trainer = make_trainer(tmp_path, dataset=train, max_steps=2)
    stop = StopWhenForgotten(trainer, forget, retain, every=2)
    trainer.add_callback(stop)
    trainer.train()
    assert len(stop.scores) == 1
