"""Options of Trainer: each is honored or refused; those that touch the loss, batches or evaluation, at work."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re

import pytest
import torch
from datasets import Dataset
from helpers import (
    arguments,
    assert_same,
    build,
    make_collator,
    make_dataset,
    make_trainer,
    make_unlearner,
    prompt_state,
    rows,
    trainable_model,
)
from small_trainings import logged, trained
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback, TrainingArguments

from spul import SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.training.options import AS_IN_TRAINER, BATCH_ENTRIES, HONORED, REFUSED

LISTED = [*HONORED, *REFUSED, *(name for names in AS_IN_TRAINER.values() for name in names.split())]


def options():
    """Every field of TrainingArguments and every parameter of Trainer, of the version at hand."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    return fields | set(inspect.signature(Trainer.__init__).parameters) - {"self"}


# ---- the lists ----


def test_every_option_is_in_one_list_and_one_only():
    unsorted = options() - set(LISTED)
    assert not unsorted, f"add to the tables of spul/training/options.py: {sorted(unsorted)}"
    assert sorted(set(LISTED)) == sorted(LISTED)


def test_the_lists_hold_no_option_that_trainer_never_had():
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # transformers 5.20 and later
    assert set(LISTED) - options() <= newer


VALUES = {
    "compute_loss_func": print,
    "label_smoothing_factor": 0.1,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "parallelism_config": object(),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_option_is_named_with_its_value_and_the_reason(tmp_path, name):
    args, given = arguments(tmp_path), {}
    if hasattr(args, name):
        setattr(args, name, VALUES[name])
    else:
        given[name] = VALUES[name]
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        UnlearningTrainer(make_unlearner(), args, make_collator(), make_dataset(), **given)
    assert str(error.value) == f"{name}={VALUES[name]!r} {REFUSED[name].reason}"


IGNORED = {
    "train_sampling_strategy": ("by_length", "'by_length' is unknown; expected random, sequential, group_by_length"),
    "include_for_metrics": (["inputs", "losses"], "'losses' is unknown; expected inputs, loss"),
    "learning_rate": (float("nan"), "expected a finite number of at least 0"),
    "per_device_train_batch_size": (0, "expected a whole number from 1"),
    "per_device_eval_batch_size": (0, "expected a whole number from 1"),
    "gradient_accumulation_steps": (0, "expected a whole number from 1"),
    "neftune_noise_alpha": (-5.0, "expected a finite number from 0"),
    "optim_target_modules": (["q_proj"], "is read by GaLore and APOLLO only, and not by optim='adamw_torch'"),
}


@pytest.mark.parametrize("name", IGNORED)
def test_values_that_trainer_ignores_or_fails_at_later_are_refused_with_those_expected(tmp_path, name):
    value, message = IGNORED[name]
    args = arguments(tmp_path, optim="adamw_torch")
    setattr(args, name, value)
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}") + f".*{message}"):
        UnlearningTrainer(make_unlearner(), args, make_collator(), make_dataset())


@pytest.mark.parametrize(
    "given",
    [
        {"include_for_metrics": ["loss"]},
        {"include_for_metrics": "inputs"},
        {"include_for_metrics": None},
        {"neftune_noise_alpha": 0},
        {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},
        {"train_sampling_strategy": "group_by_length"},
    ],
)
def test_values_that_trainer_takes_are_taken(tmp_path, given):
    args = arguments(tmp_path)
    for name, value in given.items():
        setattr(args, name, value)
    UnlearningTrainer(make_unlearner(), args, make_collator(), make_dataset())


# ---- auto_find_batch_size ----


class OutOfMemory(UnlearningTrainer):
    """Has no memory for batches of more than four rows, from the second batch on."""

    num_batches = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.num_batches += 1
        if self.num_batches > 1 and len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"forget_fraction": 0.5}, {"train_sampling_strategy": "group_by_length"}])
def test_a_smaller_batch_that_was_found_trains_as_if_it_had_been_given(tmp_path, settings):
    """The aborted try ends within its first step, so that only sums, samplers and draws could remember it."""
    settings = dict(settings)
    own = {"forget_fraction": settings.pop("forget_fraction")} if "forget_fraction" in settings else {}
    logs = []
    for kind, size, find in ((UnlearningTrainer, 4, False), (OutOfMemory, 8, True)):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            auto_find_batch_size=find,
            gradient_accumulation_steps=2,
            max_steps=6,
            logging_steps=2,
            **settings,
        )
        trainer = kind(make_unlearner(), args, make_collator(), make_dataset(), **own)
        trainer.train()
        logs.append([[entry[name] for name in ("loss", "forget_loss", "kl_loss")] for entry in entries(trainer)])
    assert logs[1] == logs[0]


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "kl_loss" in entry]


# ---- other options that touch batches, the loss or the model ----


@pytest.mark.parametrize("trainable", ["prompt", "layers", "lora", "all"])
def test_a_compiled_model_trains_the_same(tmp_path, trainable):
    losses, graphs = [], []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = make_unlearner() if trainable == "prompt" else trainable_model(trainable, dtype=torch.float32)
        loss = None if trainable == "prompt" else UnlearningLoss()
        counters.clear()
        losses.append(logged(trained(tmp_path, model, loss, max_steps=3, **settings)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert graphs[0] == 0 < graphs[1]


def test_lengths_to_rebalance_by_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset\.map\(data_collator\.tokenize\)"):
        trained(tmp_path, train_sampling_strategy="batch_rebalance")
    tokenized = make_dataset().map(make_collator().tokenize)
    assert len(logged(trained(tmp_path, dataset=tokenized, train_sampling_strategy="batch_rebalance"))) == 2


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_a_column_of_lengths_that_is_not_there_is_refused(tmp_path, strategy):
    tokenized = make_dataset().map(make_collator().tokenize)
    with pytest.raises(ValueError, match=r"length_column_name='num' names no column of train_dataset, which has \["):
        trained(tmp_path, dataset=tokenized, train_sampling_strategy=strategy, length_column_name="num")


def test_optimizers_of_the_users_take_the_steps(tmp_path):
    model = make_unlearner()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    given = trained(tmp_path, model, optimizers=(optimizer, None), max_grad_norm=0.0)
    made = trained(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}), max_grad_norm=0.0)
    assert_same(prompt_state(made.model), prompt_state(given.model), rtol=0, atol=0)
    assert any(not torch.equal(value, prompt_state(make_unlearner())[name]) for name, value in made_state(made))


class TwoWeights(torch.optim.SGD):
    """Trains weights one above those that it evaluates, as schedule-free optimizers have two of each."""

    is_training = False

    def train(self):
        self._shift(True)

    def eval(self):
        self._shift(False)

    def _shift(self, is_training):
        if is_training != self.is_training:
            self.is_training = is_training
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.add_(1.0 if is_training else -1.0)


@pytest.mark.parametrize("scores", ["evaluate", "predict", "score"])
def test_what_is_scored_has_the_weights_that_the_optimizer_evaluates(tmp_path, scores):
    model = make_unlearner()
    before = prompt_state(model)
    optimizer = TwoWeights([p for p in model.parameters() if p.requires_grad], lr=0.0)
    trainer = trained(tmp_path, model, optimizers=(optimizer, None))
    calls = {
        "evaluate": lambda: trainer.evaluate(rows("jane", 3)),
        "predict": lambda: trainer.predict(rows("jane", 3)),
        "score": lambda: trainer.score(rows("jane", 3), "rows"),  # of StopWhenForgotten
    }
    optimizer.train()
    calls[scores]()
    assert_same(before, prompt_state(model), rtol=0, atol=1e-6)


def test_what_is_trained_and_saved_are_the_weights_that_the_optimizer_evaluates(tmp_path):
    model = make_unlearner()
    before = prompt_state(model)
    optimizer = TwoWeights([p for p in model.parameters() if p.requires_grad], lr=0.0)
    saves = {"save_strategy": "steps", "save_steps": 1}
    trainer = trained(tmp_path, model, optimizers=(optimizer, None), **saves)
    assert not optimizer.is_training
    assert_same(before, prompt_state(model), rtol=0, atol=1e-6)
    saved = SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path / "checkpoint-1", is_trainable=True)
    assert_same(before, prompt_state(saved), rtol=0, atol=1e-6)
    assert trainer.state.global_step == 2  # the first save did not end it


class SavesBeforeSteps(TrainerCallback):
    """Saves between the gradients of a step and the step, as `enable_jit_checkpoint` does."""

    trainer: UnlearningTrainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._save_checkpoint(self.trainer.model, trial=None)


def test_a_step_trains_the_weights_of_its_gradients_also_after_a_save_between_them(tmp_path):
    class Steps(TwoWeights):
        def step(self, *args, **kwargs):
            assert self.is_training
            return super().step(*args, **kwargs)

    model = make_unlearner()
    before = prompt_state(model)
    optimizer = Steps([p for p in model.parameters() if p.requires_grad], lr=0.0)
    saves = SavesBeforeSteps()
    given = {"callbacks": [saves], "optimizers": (optimizer, None)}
    saves.trainer = UnlearningTrainer(
        model, arguments(tmp_path, max_steps=2), make_collator(), make_dataset(), **given
    )
    saves.trainer.train()
    assert saves.trainer.state.global_step == 2
    saved = SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path / "checkpoint-1", is_trainable=True)
    assert_same(before, prompt_state(saved), rtol=0, atol=1e-6)


def made_state(trainer):
    return prompt_state(trainer.model).items()


def test_every_entry_of_a_batch_may_be_a_label():
    collator = make_collator(pairs=True, text_field="text", prompt_position="message")
    row = {"prompt": "review jane :", "text": "jane", "completion": " good", "is_forget": True, "row_id": 0}
    assert set(collator([row])) == set(BATCH_ENTRIES)


SAME = [
    {"remove_unused_columns": False},
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1},
    {"accelerator_config": {"split_batches": True}},
    {"accelerator_config": {"dispatch_batches": True}},
    {"include_num_input_tokens_seen": "non_padding"},
    {"average_tokens_across_devices": False},
    {"label_names": ["labels"]},
    {"use_cache": True},
    {"enable_jit_checkpoint": True},
    {"torch_empty_cache_steps": 1},
    {"logging_nan_inf_filter": False},
    {"full_determinism": True},
    {"debug": "underflow_overflow"},
    {"gradient_checkpointing": True},
]


def test_options_beside_the_loss_do_not_change_it(tmp_path):
    deterministic = torch.are_deterministic_algorithms_enabled()
    expected = logged(trained(tmp_path, max_steps=5))
    for settings in SAME:
        found = logged(trained(tmp_path, max_steps=5, **settings))
        torch.use_deterministic_algorithms(deterministic)
        assert found == pytest.approx(expected, rel=1e-5), settings


def test_the_last_rows_are_dropped_where_that_is_asked_for(tmp_path):
    dataset = make_dataset(11, 24)
    for drop, num in ((False, 5), (True, 4)):
        trainer = trained(tmp_path, dataset=dataset, dataloader_drop_last=drop, num_train_epochs=1, max_steps=-1)
        assert trainer.state.global_step == num


def test_tokens_and_memory_are_counted(tmp_path):
    trainer = trained(tmp_path, include_num_input_tokens_seen="non_padding", eval_dataset=rows("jane", 5))
    assert trainer.state.num_input_tokens_seen > 0
    trainer = trained(tmp_path, skip_memory_metrics=False, eval_dataset=rows("jane", 5))
    assert "eval_mem_cpu_alloc_delta" in trainer.evaluate()


def test_a_tokenizer_of_the_trainers_is_saved_and_leaves_the_prompt_as_it_was(tmp_path):
    collator = make_collator()
    collator.tokenizer.eos_token = "<unk>"  # so that Trainer changes the model's config
    trainer, other = (
        make_trainer(tmp_path, collator=collator, max_steps=2, processing_class=given)
        for given in (collator.tokenizer, None)
    )
    trainer.train()
    other.train()
    assert_same(prompt_state(trainer.model), prompt_state(other.model), rtol=0, atol=0)
    trainer.save_model(str(tmp_path / "prompt"))
    assert (tmp_path / "prompt" / "tokenizer.json").exists()


@pytest.mark.parametrize("trainable", ["prompt", "layers"])
def test_the_model_card_of_the_unlearner_outlives_trainers(tmp_path, trainable):
    model = make_unlearner() if trainable == "prompt" else trainable_model(trainable, dtype=torch.float32)
    trainer = trained(tmp_path, model, None if trainable == "prompt" else UnlearningLoss())
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == card


def test_evaluation_before_the_first_step_and_the_best_checkpoint(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        trainer = trained(
            tmp_path,
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="best",
            metric_for_best_model="loss",
            eval_dataset=Dataset.from_list(list(rows("jane", 5))),
        )
    assert len(logged(trainer, "eval_loss")) == 3
    assert trainer.state.best_metric == min(logged(trainer, "eval_loss")[1:])
