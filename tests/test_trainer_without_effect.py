"""Trainings that would change nothing, or what is not saved, are refused."""

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
    scored,
    trainable_model,
)
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from spul import UnlearningLoss, UnlearningTrainer


class AfterFirstStep(TrainerCallback):
    """Calls a function of the model after the first step."""

    def __init__(self, change):
        self.change = change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.change(model)


@pytest.mark.parametrize("change", ["set_adapter", "delete_adapter"])
def test_another_prompt_while_one_trains_is_refused_since_the_optimizer_has_none_of_it(tmp_path, change):
    unlearner = make_unlearner()
    unlearner.add_adapter("other", CONFIGS["prompt_tuning"](4))
    name = "other" if change == "set_adapter" else "default"
    after = AfterFirstStep(lambda model: getattr(model, change)(name))
    trainer = make_trainer(tmp_path, unlearner=unlearner, callbacks=[after], max_steps=3)
    with pytest.raises(ValueError, match="the optimizer has no parameter that trains, so that the prompt would stay"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_biases_that_lora_does_not_save_may_not_train(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", bias="lora_only")
    model = get_peft_model(build("opt"), config)
    model.get_base_model().model.decoder.final_layer_norm.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameter\(s\) of the base require .*final_layer_norm\.bias"):
        UnlearningTrainer(model, arguments(tmp_path), make_collator(), make_dataset(), loss=UnlearningLoss())


def delete_all(model):
    for name in list(model.peft_config):
        model.delete_adapter(name)


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate"])
def test_a_model_whose_only_prompt_is_deleted_while_it_trains_is_refused(tmp_path, event):
    class Deleting(TrainerCallback):
        pass

    setattr(Deleting, event, lambda self, *args, model=None, **kwargs: delete_all(model))
    sets = {"forget": rows("jane", 3)}
    settings = {"callbacks": [Deleting()], "eval_dataset": sets, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, max_steps=3, **settings)
    with pytest.raises(ValueError, match="the prompt is disabled, or was deleted, so that nothing would be trained"):
        trainer.train()
    assert trainer.state.global_step == (0 if "begin" in event else 1)


def test_a_model_without_prompts_is_not_trained_and_is_scored_as_its_base(tmp_path):
    model = make_unlearner()
    delete_all(model)
    assert model.spul_config is None
    for save in (model.save_pretrained, model.push_to_hub, model.create_or_update_model_card):
        with pytest.raises(ValueError, match="there is no prompt to save: all were deleted"):
            save(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"the last one was deleted, .* or add one with add_adapter"):
        make_trainer(tmp_path, unlearner=model)
    sets = {"forget": rows("jane", 3)}
    found = UnlearningTrainer(model, arguments(tmp_path), make_collator(), eval_dataset=sets).evaluate()
    assert found["eval_forget_loss"] == pytest.approx(scored(build("llama"), rows("jane", 3))["loss"])


@pytest.mark.parametrize("trainable", ["prompt", "layers", "lora"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_of_the_base_that_would_train_and_not_be_saved_are_refused(tmp_path, trainable, when):
    model = make_unlearner() if trainable == "prompt" else trainable_model(trainable, dtype=torch.float32)
    settings = {"loss": None if trainable == "prompt" else UnlearningLoss()}
    given = (model, arguments(tmp_path, max_steps=1), make_collator(), make_dataset())
    trainer = UnlearningTrainer(*given, **settings)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameter\(s\) of the base require gradients, the first is 'model\.embed"):
        UnlearningTrainer(*given, **settings) if when == "before" else trainer.train()


@pytest.mark.parametrize("saved", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_weights_of_the_base_that_lora_saves_may_train(tmp_path, saved):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", **saved)
    model = get_peft_model(build("opt"), config)
    trainer = UnlearningTrainer(
        model, arguments(tmp_path, max_steps=1), make_collator(), make_dataset(), loss=UnlearningLoss()
    )
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 33}, "an epoch has 32 rows, .* need 33"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 43, "forget_fraction": 0.5},
            "an epoch has 42 rows, .* need 43",
        ),
        ({"max_steps": 0}, "max_steps=0 with num_train_epochs=3 trains nothing"),
        ({"num_train_epochs": 0}, "max_steps=-1 with num_train_epochs=0 trains nothing"),
    ],
)
def test_a_training_that_would_take_no_step_is_refused(tmp_path, settings, message):
    trainer = make_trainer(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    enough = {**settings, "per_device_train_batch_size": 16, "max_steps": 1, "num_train_epochs": 1}
    make_trainer(tmp_path, **enough).train()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused(tmp_path, mode):
    trainer = make_trainer(tmp_path, max_steps=1)
    with mode(), pytest.raises(ValueError, match="gradients are turned off where train is called"):
        trainer.train()


def test_a_training_set_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no rows; expected"):
        make_trainer(tmp_path, dataset=make_dataset().select([]))


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    unlearner = make_unlearner()
    before, optimizer = prompt_state(unlearner), torch.optim.SGD(unlearner.get_base_model().parameters(), lr=0.1)
    settings = (unlearner, arguments(tmp_path, max_steps=1), make_collator(), make_dataset())
    trainer = UnlearningTrainer(*settings, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="the optimizer was made of other parameters"):
        trainer.train()
    assert_same(before, prompt_state(unlearner), rtol=0, atol=0)


class OnCopies(torch.optim.SGD):
    """Trains copies of parameters, as DeepSpeed's optimizers do, and those that step on the CPU."""

    def __init__(self, parameters):
        self.originals = [one for one in parameters if one.requires_grad]
        super().__init__([torch.nn.Parameter(one.detach().clone()) for one in self.originals], lr=0.1)

    def step(self, closure=None):
        copies = self.param_groups[0]["params"]
        for one, copied in zip(self.originals, copies, strict=True):
            copied.grad = one.grad
        super().step(closure)
        with torch.no_grad():
            for one, copied in zip(self.originals, copies, strict=True):
                one.copy_(copied)


@pytest.mark.parametrize("changes", [False, True])
def test_an_optimizer_of_copies_trains_until_another_prompt_takes_the_place(tmp_path, changes):
    unlearner = make_unlearner()
    before, optimizer = prompt_state(unlearner), OnCopies(unlearner.parameters())
    unlearner.add_adapter("other", CONFIGS["prompt_tuning"](4))
    after = [AfterFirstStep(lambda model: model.set_adapter("other"))] if changes else []
    settings = (unlearner, arguments(tmp_path, max_steps=2), make_collator(), make_dataset())
    trainer = UnlearningTrainer(*settings, optimizers=(optimizer, None), callbacks=after)
    if changes:
        with pytest.raises(ValueError, match="the optimizer has no parameter that trains"):
            trainer.train()
    else:
        trainer.train()
        assert any(not torch.equal(before[name], value) for name, value in prompt_state(unlearner).items())
    assert trainer.state.global_step == 2 - changes


def test_training_a_disabled_prompt_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    with trainer.model.disable_adapter(), pytest.raises(ValueError, match="the prompt is disabled"):
        trainer.train()
