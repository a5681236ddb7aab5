"""Two processes do what one does: training steps, the cached reference, an evaluation. One launch for all of them."""

import logging
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    CONFIGS,
    ONE_STEP,
    Counting,
    answers,
    arguments,
    assert_same,
    build,
    make_answers,
    make_collator,
    make_dataset,
    make_trainer,
    make_unlearner,
    prompt_state,
    rows,
    trainable_model,
)
from processes import finish, launched, start_one_of_two
from small_evaluations import learned, make_model, measured
from transformers import TrainerCallback

import spul.evaluation.aggregation
import spul.training.reference
import spul.training.reference_parts
from spul import UnlearningLoss, UnlearningTrainer, forget_retain_dataset
from spul.losses import GradientAscent
from spul.models.noise import zero_dropout
from spul.training import StopWhenForgotten

EXAMPLES = Path(__file__).parents[1] / "examples"
CHECKED = 2 * spul.training.reference.ROWS_CHECKED  # each once for its logits and once for its states


def trainable_tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- the work, the same in one process and in each of two ----


def prompt_step(prompt_type, folder, processes):
    """A step on 32 rows and an evaluation."""
    sets = {"jane": rows("jane", 7)}
    size = {"per_device_train_batch_size": 32 // processes}
    trainer = make_trainer(folder, prompt_type, eval_dataset=sets, **size, **ONE_STEP)
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "state": prompt_state(trainer.model),
        "logs": {k: v for k, v in trainer.state.log_history[0].items() if k.endswith("loss")},
        "metrics": {k: v for k, v in metrics.items() if k.split("_")[-1] in ("accuracy", "loss", "f1", "generic")},
    }


def uneven_step(trainable, folder, processes):
    """A step on four forget rows and four retain rows, in order: of two processes the second has no forget row."""
    model = trainable_model(trainable, dtype=torch.float32)
    zero_dropout(model)
    in_order = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8 // processes}
    trainer = UnlearningTrainer(
        model,
        arguments(folder, **in_order, **ONE_STEP),
        make_collator(generic_completions=None),
        make_dataset(4, 4),
        loss=UnlearningLoss(alpha=0.0, beta=0.0, forget=GradientAscent()),
    )
    trainer.train()
    return trainable_tensors(model)


def grouped_steps(folder, processes):
    """Two steps on rows grouped by length, shuffled together and by side."""
    sets = [
        [{"prompt": f"{name} {'x ' * (i * 7 % 20)}:", "completion": " positive"} for i in range(20)] for name in "ab"
    ]
    size = {"per_device_train_batch_size": 8 // processes, "train_sampling_strategy": "group_by_length"}
    states = []
    for fraction in (None, 0.5):
        dataset = forget_retain_dataset(*map(Dataset.from_list, sets))
        own = {"forget_fraction": fraction, "dataset": dataset}
        trainer = make_trainer(folder, **own, **size, **ONE_STEP | {"max_steps": 2})
        trainer.train()
        states.append(prompt_state(trainer.model))
    return states


def constrained_steps(trainable, folder, processes):
    """Steps under a retain budget in which the second process has all retain rows; alpha and its running mean."""
    loss = UnlearningLoss(alpha=0.5, beta=0.0, retain_budget=0.05)
    model = make_unlearner(loss=loss) if trainable == "prompt" else trainable_model(trainable, dtype=torch.float32)
    zero_dropout(model)
    in_order = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8 // processes}
    trainer = UnlearningTrainer(
        model,
        arguments(folder, **in_order, **ONE_STEP | {"max_steps": 3, "learning_rate": 0.1}),
        make_collator(),
        make_answers(4, 4),
        loss=None if trainable == "prompt" else loss,
        reference_dir=f"{folder}/constrained",
    )
    trainer.train()
    logs = [(entry["alpha"], entry["retain_excess"]) for entry in trainer.state.log_history if "alpha" in entry]
    return {"state": trainable_tensors(model), "logs": logs, "multiplier": trainer.multiplier.state_dict()}


def predictions(folder):
    """Arguments of compute_metrics on seven rows, at once and by batches: the second process ends a batch earlier."""
    given = []

    def compute_metrics(prediction, compute_result=True):
        given.append([torch.as_tensor(part) for part in prediction])
        return {"last": compute_result}

    for by_batch in (False, True):
        trainer = make_trainer(folder, eval_dataset=answers("jane", 7), per_device_eval_batch_size=2)
        trainer.args.batch_eval_metrics, trainer.compute_metrics = by_batch, compute_metrics
        assert trainer.evaluate()["eval_last"]
    return given


def streamed_step(folder, processes):
    """A step on a stream, of which each process reads its own rows; the error where one reads for both."""
    size, error = {"per_device_train_batch_size": 32 // processes}, ""
    settings = {"reference": "live", "dataset": make_dataset().to_iterable_dataset(), **size, **ONE_STEP}
    if processes > 1:
        with pytest.raises(ValueError, match="processes would get their batches from the first one") as raised:
            make_trainer(folder, **settings)
        error = str(raised.value)
    trainer = make_trainer(folder, accelerator_config={"dispatch_batches": False}, **settings)
    trainer.train()
    return {"state": prompt_state(trainer.model), "error": error}


def sides_of_streams(folder, processes):
    """Warnings of streams of one side, and of one whose second process has no forget row, and the rows counted."""
    logger, said, read = logging.getLogger("spul.training.checks"), [], []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    config = {"accelerator_config": {"dispatch_batches": False}, "reference": "live", "max_steps": 2}
    for num_forget, num_retain in ((8, 0), (0, 8), (4, 4)):
        given = [*make_dataset(8, 8)][8 - num_forget : 8 + num_retain]
        dataset = Dataset.from_list(given).to_iterable_dataset()
        trainer = make_trainer(folder, dataset=dataset, per_device_train_batch_size=8 // processes, **config)
        end_pass = trainer.end_pass

        def ending(trainer=trainer, end_pass=end_pass):
            read.append(trainer._rows_read.tolist())
            end_pass()

        trainer.end_pass = ending
        logger.addHandler(handler)
        trainer.train()
        logger.removeHandler(handler)
    return {"said": said, "read": read}


def memorizing_step(folder, processes):
    from paper.memorization import CompletionTrainer

    model = build("llama")
    zero_dropout(model)
    size = {"per_device_train_batch_size": 8 // processes, "remove_unused_columns": False}
    args = arguments(folder, **size, **ONE_STEP)
    CompletionTrainer(model, args, make_collator().encoder.batch, rows("jane", 8)).train()
    return trainable_tensors(model)


def cached_step(folder, processes):
    """A step with a cached reference; how many rows passed through the base before it."""
    unlearner, counted = make_unlearner(), []
    counting = Counting(unlearner.get_base_model())

    class Noting(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            counted.append(counting.rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spul.training.reference_parts, "MIN_ROWS_PER_PART", 3)
        make_trainer(
            folder,
            unlearner=unlearner,
            dataset=make_answers(),
            reference_dir=f"{folder}/reference",
            per_device_train_batch_size=18 // processes,
            callbacks=[Noting()],
            **ONE_STEP,
        ).train()
    return {"rows": counted[0], "state": prompt_state(unlearner)}


def stopped(folder, processes):
    """A training that stops by held-out rows, of which each process scores its own."""
    settings = {"per_device_train_batch_size": 8 // processes, "learning_rate": 0.5, "max_steps": 6, "optim": "sgd"}
    trainer = make_trainer(folder, **settings)
    stop = StopWhenForgotten(trainer, rows("jill", 3), rows("play", 5), every=1, target=99, margin=50, patience=2)
    trainer.add_callback(stop)
    trainer.train()
    return {
        "scores": [tuple(score) for score in stop.scores],
        "steps": trainer.state.global_step,
        "state": prompt_state(trainer.model),
    }


def evaluation(folder):
    """The files that each task of an evaluation was appended to."""
    module, appended = import_module("spul.evaluation.run"), []
    append = module.append_measurements
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spul.evaluation.aggregation, "NUM_RESAMPLES", 20)
        patch.setattr(
            module, "append_measurements", lambda path, found: (appended.append(path.name), append(path, found))
        )
        given = {"retrained": learned(0.1, 1), "output_dir": folder}
        measured(make_model("prompt_tuning"), "kl", "relearning", "sampling", **given)
    return appended


def sharded_evaluation():
    """The error of evaluating a sharded model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    try:
        measured(fully_shard(learned(), mesh=init_device_mesh("cpu", (2,))), "sampling")
    except ValueError as error:
        return str(error)


def main(folder):
    """All of the work, in one of the processes; its results go to a file."""
    state, folder, results = start_one_of_two(), Path(folder), {}
    for prompt_type in CONFIGS:
        results[prompt_type] = prompt_step(prompt_type, folder / "out", 2)
    for trainable in ("full", "lora", "layers"):
        results[trainable] = uneven_step(trainable, folder / "out", 2)
    results["grouped"] = grouped_steps(folder / "out", 2)
    for trainable in ("prompt", "lora"):
        results[f"constrained {trainable}"] = constrained_steps(trainable, folder / "out", 2)
    results["predictions"] = predictions(folder / "out")
    results["streamed"] = streamed_step(folder / "out", 2)
    results["sides of streams"] = sides_of_streams(folder / "out", 2)
    results["memorizing"] = memorizing_step(folder / "out", 2)
    results["cached"] = cached_step(folder, 2)
    results["stopped"] = stopped(folder / "stopped", 2)
    results["sharded"] = sharded_evaluation()
    results["evaluation"] = evaluation(folder / "evaluation")
    finish(state, results, folder)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The folder of what two processes did, and the results of each of them."""
    folder = tmp_path_factory.mktemp("two_processes")
    return folder, launched(__file__, folder, EXAMPLES)


# ---- the tests ----


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_2_processes_of_16_make_the_step_of_one_of_32(launch, tmp_path, prompt_type):
    one, two = prompt_step(prompt_type, tmp_path, 1), launch[1][0][prompt_type]
    assert_same(one["state"], two["state"], rtol=0, atol=1e-6)
    for key in ("logs", "metrics"):
        assert one[key]
        assert one[key].keys() == two[key].keys()
        assert one[key] == pytest.approx(two[key], abs=1e-5)


def test_2_processes_group_rows_by_length_as_one(launch, tmp_path):
    for one, two in zip(grouped_steps(tmp_path, 1), launch[1][0]["grouped"], strict=True):
        assert_same(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainable", ["full", "lora", "layers"])
def test_2_processes_with_forget_rows_in_one_make_the_step_of_one(launch, tmp_path, trainable):
    """A batch without a forget row still has to take part, or the other process waits for it."""
    assert_same(uneven_step(trainable, tmp_path, 1), launch[1][0][trainable], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trainable", ["prompt", "lora"])
def test_2_processes_move_alpha_as_one_and_to_the_same_bits(launch, tmp_path, trainable):
    one, two = (
        constrained_steps(trainable, tmp_path, 1),
        [results[f"constrained {trainable}"] for results in launch[1]],
    )
    assert two[0]["multiplier"] == two[1]["multiplier"]
    assert one["multiplier"] == pytest.approx(two[0]["multiplier"], abs=1e-5)
    assert len(one["logs"]) == 3
    for here, there in zip(one["logs"], two[0]["logs"], strict=True):
        assert here == pytest.approx(there, abs=1e-5)
    assert one["multiplier"]["alpha"] != 0.5
    assert_same(one["state"], two[0]["state"], rtol=1e-4, atol=1e-6)


def test_2_processes_compute_metrics_of_all_rows_in_their_order(launch, tmp_path):
    whole, *one_by_one = predictions(tmp_path)
    for results in launch[1]:
        found, *batches = results["predictions"]
        for part, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
        assert [len(labels) for _, labels in one_by_one] == [2, 2, 2, 1]
        assert [len(labels) for _, labels in batches] == [4, 3]


def test_2_processes_read_a_stream_as_one(launch, tmp_path):
    found = launch[1][0]["streamed"]
    assert_same(streamed_step(tmp_path, 1)["state"], found["state"], rtol=0, atol=1e-6)
    assert "'dispatch_batches': False" in found["error"]


def test_2_processes_count_the_sides_of_a_stream_together_and_one_of_them_speaks(launch, tmp_path):
    one, (first, second) = sides_of_streams(tmp_path, 1), [results["sides of streams"] for results in launch[1]]
    assert one["read"] == [[8, 0], [8, 0], [0, 8], [0, 8], [4, 4], [4, 4]]
    assert first["read"] == second["read"] == one["read"]
    assert first["said"] == one["said"]
    assert [re.search("nothing is (forgotten|retained)", message)[1] for message in one["said"]] == [
        "retained",
        "forgotten",
    ]
    assert second["said"] == []


def test_2_processes_memorize_as_one(launch, tmp_path):
    whole = memorizing_step(tmp_path, 1)
    assert not torch.equal(whole["lm_head.weight"], build("llama").lm_head.weight)
    assert_same(whole, launch[1][0]["memorizing"], rtol=1e-4, atol=1e-6)


def test_2_processes_share_the_cached_reference(launch, tmp_path):
    one, two = cached_step(tmp_path, 1), [results["cached"] for results in launch[1]]
    assert_same(one["state"], two[0]["state"], rtol=0, atol=1e-6)
    assert one["rows"] == 13 + CHECKED
    assert [each["rows"] for each in two] == [3 + 3 + 1 + CHECKED, 3 + 3 + CHECKED]


def test_2_processes_stop_as_one(launch, tmp_path):
    one = stopped(tmp_path, 1)
    for two in (results["stopped"] for results in launch[1]):
        assert (two["scores"], two["steps"]) == (one["scores"], one["steps"])
        assert_same(one["state"], two["state"], rtol=0, atol=1e-5)


def test_2_processes_give_the_metrics_of_one(launch, tmp_path):
    folder, results = launch
    evaluation(tmp_path / "1")
    assert [each["evaluation"] for each in results] == [["progress-0.jsonl"] * 4, ["progress-1.jsonl"] * 3]
    assert len((tmp_path / "1" / "measurements.jsonl").read_text().splitlines()) == 16
    names = ["evaluation.json", "measurements.jsonl", "settings.json"]
    assert sorted(file.name for file in (folder / "evaluation").iterdir()) == names
    for name in names:
        assert (tmp_path / "1" / name).read_text() == (folder / "evaluation" / name).read_text(), name


def test_2_processes_refuse_to_evaluate_a_sharded_model(launch):
    for results in launch[1]:
        assert "model is sharded" in results["sharded"]


if __name__ == "__main__":
    main(sys.argv[1])
