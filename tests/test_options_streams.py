"""Streams of rows to train on: as the same rows in order, or refused with the options that they contradict."""

from __future__ import annotations

import pytest
import torch
from datasets import IterableDataset, concatenate_datasets
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
)
from small_trainings import logged, trained
from transformers import TrainerCallback
from transformers.trainer_pt_utils import AcceleratorConfig

from spul import SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.training.options import (
    check_dispatch,
)


def stream(dataset=None, torch_kind=False):
    dataset = make_dataset() if dataset is None else dataset
    if not torch_kind:
        return dataset.to_iterable_dataset()

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(dataset)

    return Rows()


@pytest.mark.parametrize("torch_kind", [False, True])
def test_a_stream_trains_as_the_same_rows_in_order(tmp_path, torch_kind):
    """Four passes: each draws other generic completions, as the epochs of a data set do."""
    settings = {"reference": "live", "max_steps": 16, "train_sampling_strategy": "sequential"}
    whole = trained(tmp_path, **settings)
    streamed = trained(tmp_path, dataset=stream(torch_kind=torch_kind), **settings)
    assert logged(streamed, "forget_loss") == logged(whole, "forget_loss")
    assert_same(prompt_state(streamed.model), prompt_state(whole.model), rtol=0, atol=0)
    record = streamed.model.spul_config
    assert record.generic_completions == make_collator().generic_completions
    assert record.forget is None
    assert record.retain is None
    streamed.save_model(str(tmp_path / "prompt"))
    assert SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path / "prompt").spul_config.forget is None


def test_a_stream_needs_no_reference_where_the_loss_needs_none(tmp_path):
    trained(tmp_path, make_unlearner(loss=UnlearningLoss(beta=0.0)), dataset=stream())


@pytest.mark.parametrize(
    ("own", "settings", "named"),
    [
        ({}, {}, "reference='cached' (use reference='live')"),
        ({"forget_fraction": 0.5}, {}, "reference='cached' (use reference='live') or forget_fraction"),
        ({"reference": "live", "alternate": True}, {}, "alternate=True"),
        ({"reference": "live"}, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy="),
    ],
)
def test_what_a_stream_cannot_do_is_one_sentence(tmp_path, own, settings, named):
    args = arguments(tmp_path, max_steps=2, **settings)
    with pytest.raises(ValueError, match="train_dataset is a stream") as error:
        UnlearningTrainer(make_unlearner(), args, make_collator(), stream(), **own)
    assert named in str(error.value)


def test_a_stream_without_flags_or_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no is_forget, only"):
        trained(tmp_path, dataset=stream(rows("a", 3)), reference="live")
    with pytest.raises(ValueError, match="has no is_forget"):
        trained(tmp_path, dataset=stream(rows("a", 3), torch_kind=True), reference="live")
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        trained(tmp_path, dataset=stream(), reference="live", max_steps=-1)


def test_a_stream_to_evaluate_on_is_refused(tmp_path):
    with pytest.raises(TypeError, match="eval_dataset is a stream"):
        make_trainer(tmp_path, eval_dataset=stream(rows("a", 3)))
    with pytest.raises(TypeError, match=r"forget is a stream .* Dataset\.from_list\(list\(rows\.take"):
        make_trainer(tmp_path, eval_dataset={"forget": stream(rows("a", 3))})
    with pytest.raises(TypeError, match="eval is a stream"):
        make_trainer(tmp_path).evaluate(stream(rows("a", 3)))


def test_batches_from_the_first_process_are_refused_where_there_are_others():
    table, lines = make_dataset(), stream()
    assert isinstance(lines, IterableDataset)
    for given, config in ((lines, {}), (table, {"dispatch_batches": True})):
        check_dispatch(given, AcceleratorConfig(**config), 1)
        with pytest.raises(ValueError, match="'dispatch_batches': False"):
            check_dispatch(given, AcceleratorConfig(**config), 2)
        check_dispatch(given, AcceleratorConfig(**{**config, "split_batches": True}), 2)
    check_dispatch(lines, AcceleratorConfig(dispatch_batches=False), 2)
    check_dispatch(table, AcceleratorConfig(), 2)


def test_the_rows_of_a_stream_are_not_digested(tmp_path):
    with pytest.raises(ValueError, match="the rows of a stream are not digested"):
        make_trainer(tmp_path, dataset=make_dataset().to_iterable_dataset(), reference="live", digest_key=bytes(32))


def no_rows():
    return iter(())


def torch_stream(rows_of_pass):
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return rows_of_pass()

    return Rows()


@pytest.mark.parametrize("dispatches", [True, False])
def test_a_stream_without_rows_is_refused(tmp_path, dispatches):
    config = {"accelerator_config": {"dispatch_batches": dispatches}, "reference": "live"}
    for given in (IterableDataset.from_generator(no_rows), torch_stream(no_rows)):
        with pytest.raises(ValueError, match=r"train_dataset, a stream .* gave no rows in a pass over it; expected"):
            trained(tmp_path, dataset=given, max_steps=9, **config)


def test_training_ends_with_a_warning_where_a_stream_that_is_read_once_has_no_more_rows(tmp_path, caplog):
    once = iter(list(make_dataset()))
    config = {"accelerator_config": {"dispatch_batches": False}, "reference": "live"}
    trainer = make_trainer(tmp_path, dataset=torch_stream(lambda: once), max_steps=99, **config)
    trainer.train()
    num_steps = len(make_dataset()) // trainer.args.per_device_train_batch_size
    assert trainer.state.global_step == num_steps
    assert "gave no rows in a pass over it; expected" in caplog.text
    assert caplog.text.count(f"Training ends after step {num_steps}.") == 1


def test_a_resumed_stream_goes_on_where_the_skipped_pass_has_no_rows_left(tmp_path):
    settings = {"reference": "live", "save_strategy": "steps", "save_steps": 6}
    make_trainer(tmp_path, dataset=stream(), max_steps=6, **settings).train()
    resumed = make_trainer(tmp_path, dataset=stream(), max_steps=8, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


@pytest.mark.parametrize(("flag", "message"), [(False, "nothing is forgotten"), (True, "nothing is retained")])
def test_a_stream_of_one_side_is_warned_of_once_after_a_pass(tmp_path, caplog, flag, message):
    some = make_dataset().filter(lambda row: row["is_forget"] == flag)
    trained(tmp_path, dataset=stream(some), reference="live", max_steps=9)
    assert caplog.text.count(message) == 1
    trained(tmp_path, dataset=stream(), reference="live", max_steps=9)
    assert caplog.text.count("nothing is") == 1


def test_rows_that_wait_for_the_next_pass_are_of_the_side_that_they_are(tmp_path, caplog):
    """In order, five batches a pass, four a step: the only retain rows are in the last."""
    ordered = make_dataset(16, 4).sort("is_forget", reverse=True)
    settings = {"reference": "live", "train_sampling_strategy": "sequential", "max_steps": 2}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    make_trainer(tmp_path, dataset=stream(ordered), **settings).train()
    assert "nothing is" not in caplog.text
    assert "is_forget" not in caplog.text


class Guard(TrainerCallback):
    """Ends a training that begins pass after pass."""

    def __init__(self, most=20):
        self.most = most

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.most -= 1
        if self.most < 0:
            raise AssertionError("passes without end")


def test_a_finished_training_on_a_stream_resumes_without_a_step(tmp_path):
    settings = {"reference": "live", "save_strategy": "steps", "save_steps": 6, "max_steps": 6}
    make_trainer(tmp_path, dataset=stream(), **settings).train()
    again = make_trainer(tmp_path, dataset=stream(), callbacks=[Guard()], **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_batches_that_a_pass_leaves_without_a_step_are_of_the_next_passs_first(tmp_path):
    """Five batches a pass, two a step: the third step has the last batch of one pass and the first of another."""
    short = make_dataset(5, 5)
    settings = {"reference": "live", "train_sampling_strategy": "sequential", "max_steps": 5, "learning_rate": 0.1}
    settings |= {"per_device_train_batch_size": 2, "callbacks": [Guard()], "collator": make_collator(resample=False)}
    twice = concatenate_datasets([short, short])
    twice = twice.remove_columns("row_id").add_column("row_id", [*short["row_id"], *short["row_id"]])
    streamed = make_trainer(tmp_path, dataset=stream(short), gradient_accumulation_steps=2, **settings)
    streamed.train()
    whole = make_trainer(tmp_path, dataset=stream(twice), gradient_accumulation_steps=2, **settings)
    whole.train()
    assert logged(streamed, "forget_loss") == logged(whole, "forget_loss")
    assert_same(prompt_state(streamed.model), prompt_state(whole.model), rtol=0, atol=0)


def test_a_stream_resumes_where_a_pass_leaves_batches_without_a_step(tmp_path):
    settings = {"reference": "live", "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    settings |= {"gradient_accumulation_steps": 3, "learning_rate": 0.1}  # of four batches
    whole = make_trainer(tmp_path, dataset=stream(), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, dataset=stream(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(prompt_state(resumed.model), prompt_state(whole.model), rtol=0, atol=0)


def test_a_stream_with_fewer_batches_than_a_step_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gave 4 batch\(es\) in a pass over it, .*gradient_accumulation_steps=5"):
        make_trainer(
            tmp_path,
            dataset=stream(),
            reference="live",
            max_steps=2,
            gradient_accumulation_steps=5,
            callbacks=[Guard()],
        ).train()


def test_draws_of_a_resumed_stream_are_those_of_its_pass(tmp_path, caplog):
    settings = {"reference": "live", "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    make_trainer(tmp_path, dataset=stream(), max_steps=2, **settings).train()  # half of the first pass
    whole = make_trainer(tmp_path / "whole", dataset=stream(), max_steps=6, **settings)
    whole.train()
    for folder, steps in ((tmp_path, 2), (tmp_path / "whole", 4)):  # within the first pass, and at its end
        resumed = make_trainer(tmp_path / f"{steps}", dataset=stream(), max_steps=6, **settings)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps}"))
        assert_same(prompt_state(resumed.model), prompt_state(whole.model), rtol=0, atol=0)
    assert "whose rows can be skipped" not in caplog.text
    later = make_trainer(tmp_path / "later", dataset=stream(), max_steps=6, **settings)
    later.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert "training goes on after step 5, in pass 2 over a stream" in caplog.text
    assert later.state.stateful_callbacks["passes"] == 3
