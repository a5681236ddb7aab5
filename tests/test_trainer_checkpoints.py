"""Checkpoints: resuming to the bit, the best one, and one that a killed run left."""

import logging
import re
import shutil

import pytest
import torch
from helpers import (
    CONFIGS,
    arguments,
    assert_same,
    build,
    make_collator,
    make_dataset,
    make_trainer,
    make_unlearner,
    prompt_state,
    rows,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from spul import SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.data.dataset import forget_retain_dataset
from spul.models.noise import zero_dropout
from spul.training.resuming import last_complete_checkpoint

RESUMED = (  # forget_fraction, workers, sampling strategy, whether retain rows have weights
    (0.5, 2, "random", False),
    (None, 0, "random", False),
    (0.5, 0, "random", False),
    (None, 0, "group_by_length", False),
    (0.5, 0, "group_by_length", False),
    (0.5, 0, "random", True),
    (None, 2, "random", True),
    (None, 0, "group_by_length", True),
)


def test_resuming_gives_the_bits_of_a_run_that_never_stopped(tmp_path, prompt_type):
    """The order of rows is no matter of the prompt type, so one of these goes through all ways of sampling."""
    for forget_fraction, workers, strategy, weighted in RESUMED if prompt_type == "prompt_tuning" else RESUMED[:2]:
        folder = tmp_path / f"{forget_fraction}-{workers}-{strategy}-{weighted}"
        weights = [2.5, 0.5, *[1.0] * 19] if weighted else None
        settings = {
            "max_steps": 11,
            "save_strategy": "steps",
            "save_steps": 3,
            "lr_scheduler_type": "cosine",
            "gradient_accumulation_steps": 1,
            "forget_fraction": forget_fraction,
            "dataloader_num_workers": workers,
            "train_sampling_strategy": strategy,
            "dataset": forget_retain_dataset(rows("jane", 11), rows("film", 21), retain_weight=weights),
        }
        whole = make_trainer(folder, prompt_type, **settings)
        whole.train()
        expected = prompt_state(whole.model)
        for step in (9, 11):
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
        again = make_trainer(folder, prompt_type, **settings)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 11
        assert_same(prompt_state(again.model), expected, rtol=0, atol=0)
        losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)]
        assert losses[0] == losses[1]


def test_the_best_checkpoint_is_put_back(tmp_path, prompt_type):
    sets = {"forget": rows("jane", 11)}
    trainer = make_trainer(
        tmp_path,
        prompt_type,
        eval_dataset=sets,
        max_steps=4,
        learning_rate=0.3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_forget_loss",
        greater_is_better=False,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    measured = {e["step"]: e["eval_forget_loss"] for e in trainer.state.log_history if "eval_forget_loss" in e}
    assert best.endswith(f"checkpoint-{min(measured, key=measured.get)}")
    loaded = SoftPromptUnlearner.from_pretrained(build("llama"), best, is_trainable=True)
    assert_same(prompt_state(trainer.model), prompt_state(loaded), rtol=0, atol=0)
    assert trainer.evaluate()["eval_forget_loss"] == pytest.approx(min(measured.values()), rel=1e-5)


# Names of the adapters in the order they are added, and the one that trains.
SEVERAL = [(("jane",), "jane"), (("default", "other"), "other"), (("default", "other"), "default")]


def trainer_of_several(folder, kind, names, active):
    """Of prompts or LoRA, saved after every step; the evaluated loss rises, so that the first step is the best."""
    base, config = build("llama"), LoraConfig(task_type="CAUSAL_LM") if kind == "lora" else CONFIGS[kind](4)
    torch.manual_seed(3)
    if kind == "lora":
        zero_dropout(base)
        model = get_peft_model(base, config, adapter_name=names[0])
    else:
        model = SoftPromptUnlearner(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.set_adapter(active)
    settings = {"max_steps": 3, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "eval_rising", "greater_is_better": False}
    loss = UnlearningLoss(beta=0.0) if kind == "lora" else None
    trainer = UnlearningTrainer(
        model, arguments(folder, **settings), make_collator(), make_dataset(), rows("jane", 3), loss=loss
    )
    kept = Kept()
    trainer.add_callback(kept)
    return trainer, kept


class Kept(TrainerCallback):
    """Keeps all adapters after every step, and reports a metric that rises."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = adapter_state(model)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_rising"] = float(state.global_step)


def adapter_state(model):
    own = ("prompt_encoder", "lora_")
    return {name: p.detach().clone() for name, p in model.named_parameters() if any(part in name for part in own)}


@pytest.mark.parametrize("kind", ["p_tuning", "lora"])
@pytest.mark.parametrize(("names", "active"), SEVERAL)
def test_the_adapter_that_trains_is_restored_from_its_own_folder(tmp_path, kind, names, active):
    whole, kept = trainer_of_several(tmp_path, kind, names, active)
    whole.train()
    assert whole.state.best_model_checkpoint.endswith("checkpoint-1")
    assert_same(adapter_state(whole.model), kept.after[1], rtol=0, atol=0)
    assert any(not torch.equal(kept.after[1][name], kept.after[3][name]) for name in kept.after[1])
    assert whole.model.active_adapters == [active]
    assert whole.model.training is (kind != "lora")  # as after PEFT's loading
    again, resumed = trainer_of_several(tmp_path, kind, names, active)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(resumed.after[3], kept.after[3], rtol=0, atol=0)


def test_a_checkpoint_without_the_adapter_that_trains_is_refused(tmp_path):
    trainer_of_several(tmp_path, "prompt_tuning", ("default", "other"), "other")[0].train()
    trainer, _ = trainer_of_several(tmp_path, "prompt_tuning", ("jane",), "jane")
    before = prompt_state(trainer.model)
    with pytest.raises(ValueError, match=r"no adapter 'jane', which trains; it holds \['other', 'default'\]"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(prompt_state(trainer.model), before, rtol=0, atol=0)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path, caplog, monkeypatch):
    """A copy of the folder in the middle of the third save is what SIGKILL would leave there."""
    killed, really = tmp_path / "killed", torch.save

    def save(content, path, *args, **kwargs):
        if "checkpoint-3" in str(path) and "rng_state" in str(path):
            shutil.copytree(tmp_path / "whole", killed)
        return really(content, path, *args, **kwargs)

    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "whole", **steps)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        whole.train()
    assert (killed / "checkpoint-3" / "adapter_model.safetensors").exists()
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(killed) == str(killed / "checkpoint-2")
    assert "checkpoint-3 is incomplete" in caplog.text
    trainer = make_trainer(killed, **steps)
    trainer.train(resume_from_checkpoint=True)
    assert_same(prompt_state(trainer.model), prompt_state(whole.model), rtol=0, atol=0)
    assert PeftModel.from_pretrained(build("llama"), str(killed / "checkpoint-4"))


class Saves(TrainerCallback):
    """Has every step saved."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True


def test_a_checkpoint_that_a_callback_asked_for_resumes_with_its_own_rows_alone(tmp_path, caplog):
    make_trainer(tmp_path, callbacks=[Saves()], max_steps=2, save_strategy="no").train()
    checkpoint = str(tmp_path / "checkpoint-1")
    others = make_trainer(tmp_path, dataset=make_dataset(3, 5), max_steps=2)
    with pytest.raises(ValueError, match=r"other rows or settings: rows\.forget: 11 saved, 3"):
        others.train(resume_from_checkpoint=checkpoint)
    make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=checkpoint)
    assert "does not say what rows" not in caplog.text


def without(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def half(name):
    def cut(checkpoint):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return cut


INCOMPLETE = {  # what happened to a checkpoint, and what is said of it
    "no optimizer": (without("optimizer.pt"), "it has no state of the optimizer, as one .* save_only_model=True"),
    "no schedule": (without("scheduler.pt"), "it has no state of the schedule"),
    "half an optimizer": (half("optimizer.pt"), r"optimizer\.pt is damaged or was cut short"),
    "half of the random state": (half("rng_state.pth"), r"rng_state\.pth is damaged or was cut short"),
    "half of another prompt": (half("jane/adapter_model.safetensors"), r"adapter_model\.safetensors is damaged"),
    "half a prompt": (half("adapter_model.safetensors"), r"adapter_model\.safetensors is damaged or was cut short"),
    "no state": (without("trainer_state.json"), r"it has no trainer_state\.json that can be read"),
    "another state": (lambda folder: (folder / "trainer_state.json").write_text("[]"), "it has no trainer_state"),
    "another folder": (shutil.rmtree, "it is no folder"),
}


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A training with two checkpoints, of two prompts."""
    folder = tmp_path_factory.mktemp("twice")
    unlearner = make_unlearner()
    unlearner.add_adapter("jane", CONFIGS["prompt_tuning"](4))
    make_trainer(folder, unlearner=unlearner, max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_checkpoint_that_lacks_a_part_is_skipped_and_refused_by_what_it_lacks(twice, tmp_path, caplog, name):
    change, message = INCOMPLETE[name]
    shutil.copytree(twice, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    if name != "another folder":
        assert re.search(f"checkpoint-2 is incomplete and is skipped: {message}", caplog.text)
    trainer = make_trainer(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match=rf"checkpoint-2' cannot be resumed: {message}.*Give another checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 0


def test_checkpoints_without_the_optimizer_are_not_resumed(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(tmp_path, max_steps=1, **settings).train()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer(tmp_path, max_steps=2, **settings).train(resume_from_checkpoint=True)
    assert "no state of the optimizer" in caplog.text


def test_a_checkpoint_that_cannot_be_written_says_how_much_room_the_disk_has(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8512 vs 8406")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not be written to \(\[enforce fail .*\); its disk has [\d,]+ MiB free"):
        trainer.train()


def test_nothing_to_resume_from_raises(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
